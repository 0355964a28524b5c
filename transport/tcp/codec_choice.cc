#include "transport/tcp/codec_choice.h"

#include <algorithm>
#include <utility>

namespace presync {
namespace {

constexpr double kHysteresis = 0.95;   // what a change must promise
constexpr double kNewWeight = 0.25;    // of a new measure in the average
constexpr double kBlockedShare = 0.1;  // of the time, from which on the wire is the bottleneck

// What costs more CPU, on both hosts, must carry that much more.
constexpr double kHandicap[] = {1, 1.08, 1.12};

}  // namespace

double CodecChooser::Cost(Codec codec) const {
  const Measure& measure = measures_[static_cast<size_t>(codec)];
  const double cpu = measure.compress + measure.ratio * send_cost_;
  return std::max(cpu, measure.ratio * wire_cost_) * kHandicap[static_cast<size_t>(codec)];
}

void CodecChooser::Choose() {
  if (!has_wire_cost_) return;
  Codec best = choice_;
  for (const Codec codec : {Codec::kNone, Codec::kLz4, Codec::kZstd}) {
    const bool known = codec == Codec::kNone || measures_[static_cast<size_t>(codec)].known;
    if (known && Cost(codec) < Cost(best)) best = codec;
  }
  if (best == choice_ || Cost(best) > kHysteresis * Cost(choice_)) return;
  choice_ = best;
  window_ = {};
  sample_interval_ = kFirstSampleInterval;
  probe_interval_ = kFirstProbeInterval;
  next_probe_ = guest_bytes_ + probe_interval_;
}

void CodecChooser::OnCompressed(Codec codec, uint64_t guest_bytes, uint64_t wire_bytes,
                                absl::Duration time) {
  if (codec == Codec::kNone || guest_bytes == 0) return;
  Measure& measure = measures_[static_cast<size_t>(codec)];
  const double bytes = static_cast<double>(guest_bytes);
  const double compress = absl::ToDoubleSeconds(time) / bytes;
  const double ratio = static_cast<double>(wire_bytes) / bytes;
  // A chunk's weight grows with its size, so that lone pages do not outvote long runs.
  const double weight = measure.known ? kNewWeight * std::min(1.0, bytes / 65536) : 1;
  measure.compress += weight * (compress - measure.compress);
  measure.ratio += weight * (ratio - measure.ratio);
  measure.known = true;
}

void CodecChooser::OnSampled() {
  const Codec before = choice_;
  Choose();
  if (choice_ == before) sample_interval_ = std::min(2 * sample_interval_, kLastSampleInterval);
  next_sample_ = guest_bytes_ + sample_interval_;
}

void CodecChooser::OnSent(const Sent& sent) {
  guest_bytes_ += sent.guest_bytes;
  if (!sent.backlogged) return;
  window_.wire_bytes += sent.wire_bytes;
  window_.compressing += absl::ToDoubleSeconds(sent.compressing);
  window_.sending += absl::ToDoubleSeconds(sent.sending);
  window_.sending_cpu += absl::ToDoubleSeconds(sent.sending_cpu);
  if (window_.wire_bytes >= kWindowBytes) CloseWindow();
}

void CodecChooser::CloseWindow() {
  const Window window = std::exchange(window_, {});
  const bool plain = codec() == Codec::kNone;
  const bool settled = probe_left_ <= kWindowBytes;  // the first window of a probe fills buffers
  probe_left_ -= std::min(probe_left_, window.wire_bytes);
  if (!settled) return;

  const double bytes = static_cast<double>(window.wire_bytes);
  const double total = window.sending + window.compressing;
  const bool wire_bound = plain || window.sending - window.sending_cpu > kBlockedShare * total;
  if (wire_bound) {
    wire_cost_ = has_wire_cost_ ? wire_cost_ + 0.5 * (total / bytes - wire_cost_) : total / bytes;
    has_wire_cost_ = true;
  } else {
    wire_cost_ = std::min(wire_cost_, total / bytes);  // the wire did at least this
  }
  send_cost_ = window.sending_cpu / bytes;
  const Codec before = choice_;
  Choose();
  if (choice_ != before || wire_bound || guest_bytes_ < next_probe_) return;
  probe_left_ = kProbeBytes;
  next_probe_ = guest_bytes_ + probe_interval_;
  probe_interval_ = std::min(2 * probe_interval_, kLastProbeInterval);
}

}  // namespace presync
