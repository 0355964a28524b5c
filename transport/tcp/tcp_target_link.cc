#include "transport/tcp/tcp_target_link.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/tcp/codec.h"
#include "transport/tcp/frame.h"
#include "transport/zero_run.h"

namespace presync {

// Receives one stream.
class TcpTargetLink::Receiver {
 public:
  Receiver(TcpTargetLink* link, size_t index)
      : link_(link), index_(index), stream_(link->streams_[index].get()) {}

  // Returns why the stream ended.
  absl::Status Run() {
    while (true) {
      if (auto status = ReadPayload({}, /*header_too=*/true); !status.ok()) return status;
      auto frame = DecodeFrame(header_);
      if (!frame.ok()) return frame.status();
      header_have_ = 0;
      if (auto status = Apply(*frame); !status.ok()) return status;
    }
  }

 private:
  // Fills `payload`, and goes on into the header of the next frame as far as that has arrived: one
  // system call a frame instead of two. `header_too`: returns when the header is there as well.
  absl::Status ReadPayload(absl::Span<std::byte> payload, bool header_too) {
    while (!payload.empty() || (header_too && header_have_ < header_.size())) {
      if (link_->over_) return absl::CancelledError("the link is over");
      std::array<iovec, 2> parts;
      size_t count = 0;
      if (!payload.empty()) parts[count++] = {payload.data(), payload.size()};
      if (header_have_ < header_.size()) {
        parts[count++] = {header_.data() + header_have_, header_.size() - header_have_};
      }
      auto received = stream_->Receive(absl::MakeConstSpan(parts).first(count));
      if (!received.ok()) return received.status();
      const size_t of_payload = std::min(*received, payload.size());
      payload.remove_prefix(of_payload);
      header_have_ += *received - of_payload;
    }
    return absl::OkStatus();
  }

  absl::Status Apply(const Frame& frame) {
    if (frame.type == FrameType::kCommit) return Acknowledge(frame.commit);
    if (frame.type == FrameType::kAck) return absl::InvalidArgumentError("an ack from a source");
    auto placed = CheckPlace(frame, *link_->memory_, index_, link_->streams_.size());
    if (!placed.ok()) return placed;
    const absl::Span<std::byte> bytes = link_->memory_->Bytes(frame.run);
    if (frame.type == FrameType::kBytes) return ReadPayload(bytes, false);
    if (frame.type == FrameType::kZero) {
      if (!link_->over_) ZeroRun(*link_->memory_, frame.run);
      return absl::OkStatus();
    }
    compressed_.resize(PagesToBytes(kShardPages));  // more than any payload that was let through
    const auto payload = absl::MakeSpan(compressed_).first(frame.payload_bytes);
    if (auto status = ReadPayload(payload, false); !status.ok()) return status;
    if (link_->over_) return absl::CancelledError("the link is over");
    const Codec codec = frame.type == FrameType::kLz4 ? Codec::kLz4 : Codec::kZstd;
    return decompressor_.Decompress(codec, payload, bytes);
  }

  // Everything before the commit on this stream is in memory: frames are applied one by one.
  absl::Status Acknowledge(CommitId commit) {
    if (commit != last_commit_ + 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("commit ", commit, " follows commit ", last_commit_));
    }
    last_commit_ = commit;
    Frame ack;
    ack.type = FrameType::kAck;
    ack.commit = commit;
    std::array<std::byte, kFrameHeaderBytes> header;
    EncodeFrame(ack, header.data());
    iovec part = {header.data(), header.size()};
    return stream_->Send(absl::MakeSpan(&part, 1));
  }

  TcpTargetLink* const link_;
  const size_t index_;
  ByteStream* const stream_;
  std::array<std::byte, kFrameHeaderBytes> header_;
  size_t header_have_ = 0;
  CommitId last_commit_ = 0;
  std::vector<std::byte> compressed_;
  Decompressor decompressor_;
};

absl::StatusOr<std::unique_ptr<TcpTargetLink>> TcpTargetLink::Create(const GuestMemory* memory,
                                                                     std::vector<UniqueFd> sockets,
                                                                     const SocketOptions& options) {
  std::vector<std::unique_ptr<ByteStream>> streams;
  for (UniqueFd& socket : sockets) {
    auto stream = MakeSocketStream(std::move(socket), options);
    if (!stream.ok()) return stream.status();
    streams.push_back(*std::move(stream));
  }
  return Create(memory, std::move(streams));
}

absl::StatusOr<std::unique_ptr<TcpTargetLink>> TcpTargetLink::Create(
    const GuestMemory* memory, std::vector<std::unique_ptr<ByteStream>> streams) {
  if (streams.empty() || streams.size() > kMaxFrameStreams) {
    return absl::InvalidArgumentError(
        absl::StrCat("tcp link: ", streams.size(), " streams; 1 to ", kMaxFrameStreams, " work"));
  }
  auto link = std::unique_ptr<TcpTargetLink>(new TcpTargetLink(memory, std::move(streams)));
  link->Start();
  return link;
}

TcpTargetLink::TcpTargetLink(const GuestMemory* memory,
                             std::vector<std::unique_ptr<ByteStream>> streams)
    : memory_(memory), streams_(std::move(streams)) {}

TcpTargetLink::~TcpTargetLink() { Close(); }

void TcpTargetLink::Start() {
  MutexLock lock(&close_mu_);
  for (size_t i = 0; i < streams_.size(); ++i) {
    receivers_.push_back(std::make_unique<Receiver>(this, i));
    threads_.emplace_back([this, i, receiver = receivers_.back().get()] {
      const absl::Status status = receiver->Run();
      Fail(absl::Status(status.code(),
                        absl::StrCat("tcp link, stream ", i, ": ", status.message())));
    });
  }
}

void TcpTargetLink::Fail(const absl::Status& why) {
  MutexLock lock(&mu_);
  if (!status_.ok()) return;
  status_ = why;
  over_ = true;
  for (const auto& stream : streams_) stream->Shutdown();
}

absl::Status TcpTargetLink::health() const {
  MutexLock lock(&mu_);
  return status_;
}

void TcpTargetLink::Close() {
  MutexLock lock(&close_mu_);
  Fail(absl::CancelledError("tcp link: closed by this host"));
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace presync
