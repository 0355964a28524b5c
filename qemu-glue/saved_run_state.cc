#include "qemu-glue/saved_run_state.h"

#include <algorithm>

namespace presync {
namespace {

// The section's name behind its length, its instance (0) and its version (1); then the text's
// length, which QEMU ignores, and the text in 100 bytes, ended by a zero.
constexpr absl::string_view kHead("\x0bglobalstate\0\0\0\0\0\0\0\1", 20);
constexpr size_t kLengthBytes = 4;
constexpr size_t kTextBytes = 32;  // no run state's name is longer
constexpr size_t kSectionBytes = kHead.size() + kLengthBytes + kTextBytes;

}  // namespace

void SavedRunState::Take(absl::string_view bytes) {
  window_.append(bytes.data(), bytes.size());
  for (size_t at = 0; (at = window_.find(kHead.data(), at, kHead.size())) != std::string::npos &&
                      window_.size() - at >= kSectionBytes;
       at += kHead.size()) {
    const std::string text = window_.substr(at + kHead.size() + kLengthBytes, kTextBytes);
    run_state_ = text.substr(0, text.find('\0'));
  }
  // What is left may be a section's beginning.
  window_.erase(0, window_.size() - std::min(window_.size(), kSectionBytes - 1));
}

}  // namespace presync
