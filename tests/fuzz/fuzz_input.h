// What the fuzz targets share: an input cut into values, and a demand that ends the program.
//
// A target is LLVMFuzzerTestOneInput in a file NAME_fuzz.cc. libFuzzer runs it (preset fuzz), and
// replay_main.cc runs it over the seeds and over the inputs that were found before, in every build.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// A finding: what must hold did not.
#define FUZZ_REQUIRE(condition)                                                           \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                       \
    }                                                                                     \
  } while (false)

namespace presync::fuzz {

// Takes values from the front; once it is used up, zeros and empty texts. Points into the input.
class FuzzInput {
 public:
  FuzzInput(const uint8_t* data, size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

  bool empty() const { return rest_.empty(); }
  std::string_view rest() const { return rest_; }

  uint8_t Byte() { return static_cast<uint8_t>(Number(1)); }
  uint16_t U16() { return static_cast<uint16_t>(Number(2)); }
  uint32_t U32() { return static_cast<uint32_t>(Number(4)); }
  uint64_t U64() { return Number(8); }

  std::string_view Take(size_t bytes) {
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(taken.size());
    return taken;
  }
  // A length of two bytes and so many bytes, or what is left of them.
  std::string_view Chunk() { return Take(U16()); }

 private:
  uint64_t Number(size_t bytes) {
    uint64_t value = 0;
    const std::string_view taken = Take(bytes);
    for (size_t i = 0; i < taken.size(); ++i) {
      value |= uint64_t{static_cast<uint8_t>(taken[i])} << (8 * i);
    }
    return value;
  }

  std::string_view rest_;
};

// An input for FuzzInput, from the front as well: for seeds.
class FuzzOutput {
 public:
  FuzzOutput& Number(uint64_t value, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) text_ += static_cast<char>(value >> (8 * i));
    return *this;
  }
  FuzzOutput& Byte(uint8_t value) { return Number(value, 1); }
  FuzzOutput& Raw(std::string_view bytes) {
    text_ += bytes;
    return *this;
  }
  FuzzOutput& Chunk(std::string_view bytes) { return Number(bytes.size(), 2).Raw(bytes); }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// A folder in memory for this process; removed when the process ends in order.
const std::string& ScratchFolder();
// Removes what is in it.
void EmptyScratchFolder();

// Open descriptors of this process: an input must leave as many as it found.
size_t OpenDescriptors();

}  // namespace presync::fuzz
