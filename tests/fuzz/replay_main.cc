// Runs a fuzz target once over every file in the folders of the command line, and over the
// beginnings of each, for an end in the wrong place is what a decoder meets most: the seeds, and
// the inputs that were found before, so that what was mended stays mended.
#include <signal.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>

#include "tests/fuzz/fuzz_input.h"

namespace {

constexpr size_t kBeginnings = 8;  // of each file

void Run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

}  // namespace

int main(int argc, char** argv) {
  ::signal(SIGPIPE, SIG_IGN);  // as the daemon has it
  size_t files = 0;
  for (int i = 1; i < argc; ++i) {
    std::set<std::filesystem::path> paths;  // in order
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) paths.insert(entry);
    for (const std::filesystem::path& path : paths) {
      // Shown only if it fails; then the last one is it.
      std::fprintf(stderr, "%s\n", path.c_str());
      std::ifstream in(path, std::ios::binary);
      const std::string input((std::istreambuf_iterator<char>(in)),
                              std::istreambuf_iterator<char>());
      Run(input);
      for (size_t part = 0; part < kBeginnings; ++part) {
        Run(input.substr(0, input.size() * part / kBeginnings));
      }
      ++files;
    }
  }
  std::printf("%zu inputs\n", files);
  if (files == 0) std::fprintf(stderr, "no input: nothing was tested\n");
  return files == 0 ? 1 : 0;
}
