// The TCP link against a peer that sends what it likes. At the target: a guest of two regions, with
// bytes of somebody else's behind each, which no frame may touch. At the source: answers to what it
// sent. The first byte says which end, and how many streams.
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "tests/fuzz/fuzz_input.h"
#include "tests/transport/scratch_memory.h"
#include "transport/clock.h"
#include "transport/tcp/tcp_source_link.h"
#include "transport/tcp/tcp_target_link.h"

namespace presync {
namespace {

constexpr PageCount kFirstPages = 520;  // beyond one group of 512
constexpr PageCount kSecondPages = 24;

// Gives the peer's bytes in pieces, then hangs up; takes anything.
class ScriptedStream final : public ByteStream {
 public:
  ScriptedStream(std::string_view bytes, size_t piece) : bytes_(bytes), piece_(piece) {}

  absl::Status Send(absl::Span<iovec> parts) override {
    for (iovec& part : parts) part.iov_len = 0;
    return over_ ? absl::UnavailableError("hung up") : absl::OkStatus();
  }
  absl::StatusOr<size_t> Receive(absl::Span<const iovec> parts) override {
    size_t given = 0;
    for (const iovec& part : parts) {
      const size_t n = std::min({part.iov_len, bytes_.size(), piece_ - given});
      std::memcpy(part.iov_base, bytes_.data(), n);
      bytes_.remove_prefix(n);
      given += n;
    }
    if (given == 0) return absl::UnavailableError("hung up");
    return given;
  }
  void Shutdown() override { over_ = true; }
  void SetPacing(uint64_t) override {}

 private:
  std::string_view bytes_;
  const size_t piece_;
  std::atomic<bool> over_ = false;
};

ScratchMemory& Memory() {
  static const auto memory = ScratchMemory::Create({kFirstPages, kSecondPages}).value();
  return *memory;
}

std::vector<std::unique_ptr<ByteStream>> TakeStreams(fuzz::FuzzInput* input, size_t count) {
  const size_t piece = 1 + input->U16();
  std::vector<std::unique_ptr<ByteStream>> streams;
  for (size_t i = 0; i < count; ++i) {
    const bool last = i + 1 == count;
    streams.push_back(
        std::make_unique<ScriptedStream>(last ? input->rest() : input->Chunk(), piece));
  }
  return streams;
}

// Every stream ends, so the link does, with a reason.
void TryTarget(fuzz::FuzzInput* input, size_t count) {
  auto link = TcpTargetLink::Create(&Memory().memory(), TakeStreams(input, count));
  FUZZ_REQUIRE(link.ok());
  while ((*link)->health().ok()) std::this_thread::yield();
  (*link)->Close();
  FUZZ_REQUIRE(!absl::IsInternal((*link)->health()));
}

// No answer confirms what was never asked for, or before it was sent.
void TrySource(fuzz::FuzzInput* input, size_t count) {
  const uint8_t writes = input->Byte();
  TcpSourceOptions options;
  options.compression = writes % 2 == 0 ? Compression::kNone : Compression::kLz4;
  auto link = TcpSourceLink::Create(&Memory().memory(), TakeStreams(input, count), options);
  FUZZ_REQUIRE(link.ok());
  CommitId newest = 0;
  for (PageIndex page = 0; page < writes % 16u; ++page) {
    const PageWrite write = {.run = {page * 30, 10 + page}, .zero = page % 3 == 0};
    if (!(*link)->Post(absl::MakeConstSpan(&write, 1)).ok()) break;
    if (const auto commit = (*link)->PostCommit(); commit.ok()) newest = *commit;
  }
  LinkEvents events;
  absl::Status status;
  while (status.ok()) {
    status = (*link)->Wait(MonotonicNow() + absl::Seconds(1));
    if (status.ok()) status = (*link)->Poll(&events);
    FUZZ_REQUIRE(events.committed <= newest);
  }
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  presync::fuzz::FuzzInput input(data, size);
  const uint8_t first = input.Byte();
  const size_t count = 1 + (first >> 1) % 3;
  if (first % 2 == 0) {
    presync::TryTarget(&input, count);
  } else {
    presync::TrySource(&input, count);
  }
  return 0;
}
