#include "tools/presyncd/session_options.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "tools/common/local_api.h"
#include "tools/common/units.h"

namespace presync {
namespace {

using Json = nlohmann::json;

absl::StatusOr<Transport> ToTransport(const std::string& name) {
  if (name == "auto") return Transport::kAuto;
  if (name == "rdma") return Transport::kRdma;
  if (name == "tcp") return Transport::kTcp;
  return absl::InvalidArgumentError(
      absl::StrCat("'", name, "' is no transport; there are auto, rdma and tcp"));
}

absl::Status SetTransport(const Json& request, const Config& config,
                          SourceSessionOptions* options) {
  absl::StatusOr<Transport> transport = ToTransport(TextOr(request, "transport", config.transport));
  if (!transport.ok()) return transport.status();
  options->transport = *transport;
  const int64_t queue_pairs = NumberOr(request, "rdma_queue_pairs", config.rdma_queue_pairs);
  if (queue_pairs < 1 || queue_pairs > kMaxRdmaQueuePairs) {
    return absl::InvalidArgumentError(
        absl::StrCat("--rdma-queue-pairs takes 1 to ", kMaxRdmaQueuePairs, ", a device"));
  }
  options->rdma.queue_pairs = static_cast<uint32_t>(queue_pairs);
  options->rdma.devices = config.rdma_devices;
  const std::string devices = TextOr(request, "rdma_devices", "");
  if (!devices.empty()) options->rdma.devices = absl::StrSplit(devices, ',', absl::SkipEmpty());
  options->rdma.on_demand_paging = config.rdma_on_demand_paging;
  if (config.require_encryption) {
    if (options->transport == Transport::kRdma) {
      return absl::FailedPreconditionError(
          "RDMA data is not encrypted, and this host requires encryption (require_encryption): "
          "use --transport tcp");
    }
    options->transport = Transport::kTcp;
    options->tcp_reason = "TCP, for this host requires encryption";
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Compression> ToCompression(const std::string& name) {
  if (name == "none") return Compression::kNone;
  if (name == "lz4") return Compression::kLz4;
  if (name == "zstd") return Compression::kZstd;
  if (name == "auto") return Compression::kAuto;
  return absl::InvalidArgumentError(
      absl::StrCat("'", name, "' is no compression; there are none, lz4, zstd and auto"));
}

// The residual that a promise leaves room for must not be below what one page costs.
absl::Status CheckPromise(const SourceSyncOptions& options, const std::string& peer) {
  if (options.max_launch_time > options.fixed_cost) return absl::OkStatus();
  const absl::Duration least =
      absl::Ceil(options.fixed_cost + absl::Milliseconds(10), absl::Milliseconds(10));
  return absl::FailedPreconditionError(absl::StrFormat(
      "--max-launch-time %s can't be kept: a handover to %s takes about %s here before any memory "
      "moves; %s is the least that can be promised",
      absl::FormatDuration(options.max_launch_time), peer, FormatMillis(options.fixed_cost),
      absl::FormatDuration(least)));
}

absl::StatusOr<SourceSessionOptions> ReadSessionOptions(const Json& request, const Config& config,
                                                        absl::Duration fixed_cost) {
  SourceSessionOptions options;
  options.record_folder = config.state_folder;
  options.tcp_streams = config.tcp_streams;
  options.sync.scan_interval = config.scan_interval;
  options.sync.policy = config.policy;
  options.sync.fixed_cost = fixed_cost;
  options.sync.max_launch_time = config.max_launch_time;
  options.sync.max_bytes_per_s = config.max_bandwidth;
  options.audit_bytes_per_s = config.audit_rate;
  if (const std::string text = TextOr(request, "max_launch_time", ""); !text.empty()) {
    absl::StatusOr<absl::Duration> promise = ParsePositiveDuration(text);
    if (!promise.ok()) return promise.status();
    options.sync.max_launch_time = *promise;
  }
  if (const std::string text = TextOr(request, "max_bandwidth", ""); !text.empty()) {
    absl::StatusOr<uint64_t> rate = ParseRate(text);
    if (!rate.ok()) return rate.status();
    options.sync.max_bytes_per_s = *rate;
  }
  absl::StatusOr<Compression> compression =
      ToCompression(TextOr(request, "compression", config.compression));
  if (!compression.ok()) return compression.status();
  options.tcp.compression = *compression;
  if (absl::Status s = SetTransport(request, config, &options); !s.ok()) return s;
  return options;
}

}  // namespace presync
