#include "tests/fuzz/fuzz_input.h"

#include <unistd.h>

#include <filesystem>

namespace presync::fuzz {
namespace {

class Folder {
 public:
  Folder() : path_("/dev/shm/presync-fuzz-" + std::to_string(::getpid())) {
    std::filesystem::create_directory(path_);
  }
  ~Folder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

}  // namespace

const std::string& ScratchFolder() {
  static const Folder folder;
  return folder.path();
}

void EmptyScratchFolder() {
  for (const auto& entry : std::filesystem::directory_iterator(ScratchFolder())) {
    std::filesystem::remove_all(entry.path());
  }
}

size_t OpenDescriptors() {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    (void)entry;
    ++count;
  }
  return count;
}

}  // namespace presync::fuzz
