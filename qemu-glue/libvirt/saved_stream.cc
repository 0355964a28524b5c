#include "qemu-glue/libvirt/saved_stream.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "qemu-glue/libvirt/unix_socket.h"
#include "transport/clock.h"

namespace presync {
namespace {

constexpr size_t kBufferBytes = 64 << 10;
// The description of a machine with some devices has 20 to 60 KB.
constexpr size_t kMostTailBytes = size_t{8} << 20;
constexpr size_t kHeaderBytes = 6;  // QEMU_VM_EOF, QEMU_VM_VMDESCRIPTION, big-endian length
constexpr std::string_view kMarks("\0\6", 2);

uint32_t BigEndian(std::string_view bytes) {
  uint32_t value = 0;
  for (const char c : bytes.substr(0, 4)) value = value << 8 | static_cast<unsigned char>(c);
  return value;
}

}  // namespace

bool StreamEnd::Take(std::string_view piece) {
  tail_.append(piece);
  if (tail_.size() > kMostTailBytes) tail_.erase(0, tail_.size() - kMostTailBytes / 2);
  if (tail_.empty() || tail_.back() != '}') return false;
  // The description's own length says where its header would be.
  const std::string_view tail = tail_;
  for (size_t at = tail.rfind(kMarks);
       at != std::string_view::npos && at + kHeaderBytes < tail.size();
       at = at == 0 ? std::string_view::npos : tail.rfind(kMarks, at - 1)) {
    const size_t json = at + kHeaderBytes;
    if (tail[json] == '{' && BigEndian(tail.substr(at + 2)) == tail.size() - json) return true;
  }
  return false;
}

SavedStream::SavedStream(UniqueFd qemu, UniqueFd out)
    : qemu_(std::move(qemu)),
      out_(std::move(out)),
      wake_(::eventfd(0, EFD_CLOEXEC)),
      quiet_since_(MonotonicNow()),
      thread_([this] { Pass(); }) {}

SavedStream::~SavedStream() {
  TakeAsWhole();
  if (thread_.joinable()) thread_.join();
}

void SavedStream::Pass() {
  StreamEnd end;
  std::string buffer(kBufferBytes, '\0');
  while (PassSome(&end, &buffer)) {
  }
  out_.reset();
}

// False: nothing more is to come.
bool SavedStream::PassSome(StreamEnd* end, std::string* buffer) {
  pollfd p[2] = {{.fd = qemu_.get(), .events = POLLIN, .revents = 0},
                 {.fd = wake_.get(), .events = POLLIN, .revents = 0}};
  if (::poll(p, 2, -1) < 0) return errno == EINTR;
  if (p[0].revents != 0) {
    const ssize_t n = ::recv(qemu_.get(), buffer->data(), buffer->size(), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (n <= 0) {
      End(absl::UnavailableError("QEMU's device state broke off before its end"));
      return false;
    }
    const std::string_view piece(buffer->data(), static_cast<size_t>(n));
    if (!WriteToSocket(out_.get(), piece)) {
      End(absl::UnavailableError("the device state is not wanted any more"));
      return false;
    }
    {
      MutexLock lock(&mutex_);
      quiet_since_ = MonotonicNow();
    }
    if (end->Take(piece)) {
      End(absl::OkStatus());
      return false;
    }
    return true;
  }
  End(absl::OkStatus());  // woken, and nothing is left to read
  return false;
}

void SavedStream::End(absl::Status status) {
  MutexLock lock(&mutex_);
  over_ = true;
  status_ = std::move(status);
}

absl::Status SavedStream::AwaitWhole(absl::Time deadline) const {
  MutexLock lock(&mutex_);
  const auto over = [this] {
    mutex_.AssertHeld();
    return over_;
  };
  if (mutex_.AwaitWithDeadline(over, deadline)) return status_;
  return absl::DeadlineExceededError("QEMU has not saved all of its device state");
}

absl::Time SavedStream::quiet_since() const {
  MutexLock lock(&mutex_);
  return quiet_since_;
}

void SavedStream::TakeAsWhole() {
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof(one));
}

}  // namespace presync
