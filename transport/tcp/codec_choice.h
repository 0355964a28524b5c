// Which codec carries the most guest bytes per second over one stream, from what was measured
// there.
//
// The model, costs in seconds per byte. With W the wire's cost of a byte, S what a byte costs the
// sending CPU, and for a codec C (compressing a guest byte) and R (wire bytes per guest byte):
//
//   none: W        codec: max(C + R x S, R x W)
//
// since the wire goes on draining the socket's buffer while the next chunk is compressed. W shows
// only while the wire is the bottleneck. While compressing is, a phase of plain bytes is tried now
// and then, ever more seldom as long as it changes nothing.
#pragma once

#include <array>
#include <cstdint>

#include "absl/time/time.h"
#include "transport/tcp/codec.h"

namespace presync {

// Pure policy: times come in as values. Not thread-safe.
class CodecChooser {
 public:
  // Bytes of a window: some buffers of a socket, so that they do not hide the wire.
  static constexpr uint64_t kWindowBytes = uint64_t{2} << 20;
  // A probe first empties into the socket's buffers: only its last window counts.
  static constexpr uint64_t kProbeBytes = 2 * kWindowBytes;
  // A sample takes 0.15 ms of a core (2026-11-22, BM_CodecSample of benchmarks/tcp_link.cc): 1 % of
  // the 16 ms that its interval lasts at 1 GB/s.
  static constexpr uint64_t kFirstSampleInterval = uint64_t{16} << 20;
  static constexpr uint64_t kLastSampleInterval = uint64_t{256} << 20;
  static constexpr uint64_t kFirstProbeInterval = uint64_t{128} << 20;
  static constexpr uint64_t kLastProbeInterval = uint64_t{2} << 30;

  // What the next chunk should be carried with.
  Codec codec() const { return probe_left_ > 0 ? Codec::kNone : choice_; }

  // Whether the next chunk should be measured with every codec first, by OnCompressed for each.
  bool WantsSample() const { return guest_bytes_ >= next_sample_; }
  // After the sample.
  void OnSampled();

  // A chunk was compressed: `wire_bytes` is as sent, so `guest_bytes` where it was not worth it.
  void OnCompressed(Codec codec, uint64_t guest_bytes, uint64_t wire_bytes, absl::Duration time);

  struct Sent {
    uint64_t guest_bytes = 0;
    uint64_t wire_bytes = 0;
    absl::Duration compressing;  // and all else before the send
    absl::Duration sending;
    absl::Duration
        sending_cpu;          // the part of `sending` that the CPU worked: the rest is the wire's
    bool backlogged = false;  // more was waiting: only then it shows what the stream can do
  };
  // A batch was sent.
  void OnSent(const Sent& sent);

 private:
  struct Measure {
    double compress = 0;  // C
    double ratio = 1;     // R
    bool known = false;
  };
  struct Window {
    uint64_t wire_bytes = 0;
    double compressing = 0;
    double sending = 0;
    double sending_cpu = 0;
  };

  double Cost(Codec codec) const;
  void Choose();
  void CloseWindow();

  Codec choice_ = Codec::kNone;
  std::array<Measure, 3> measures_;
  Window window_;
  bool has_wire_cost_ = false;
  double wire_cost_ = 0;  // W
  double send_cost_ = 0;  // S
  uint64_t guest_bytes_ = 0;
  uint64_t next_sample_ = 0;
  uint64_t sample_interval_ = kFirstSampleInterval;
  uint64_t next_probe_ = 0;
  uint64_t probe_interval_ = kFirstProbeInterval;
  uint64_t probe_left_ = 0;
};

}  // namespace presync
