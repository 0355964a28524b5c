#include "tools/presync/bench.h"

#include <signal.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tools/bench/bench_target_host.h"
#include "tools/bench/link_bench.h"
#include "tools/common/local_api.h"
#include "tools/common/units.h"
#include "transport/clock.h"
#include "transport/rdma/rdma_options.h"
#include "transport/sync/dialer.h"
#include "transport/sync/source_connection.h"
#include "transport/sync/target_service.h"
#include "transport/tcp/socket.h"

namespace presync {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kSmallestMessage = 4 << 10;
constexpr uint64_t kLargestMessage = 4 << 20;
constexpr absl::Duration kConnectTimeout = absl::Seconds(30);
constexpr absl::Duration kStallTimeout = absl::Seconds(10);

std::atomic<bool> interrupted = false;

int Fail(const absl::Status& status, bool json, int code) {
  if (json) std::printf("%s\n", StatusToJson(status).dump().c_str());
  std::fprintf(stderr, "presync bench: %s\n", std::string(status.message()).c_str());
  return code;
}

absl::StatusOr<uint64_t> MemoryBytes(const BenchLinkCommand& command, const char* fallback) {
  absl::StatusOr<uint64_t> bytes = ParseSize(command.memory.empty() ? fallback : command.memory);
  if (bytes.ok() && (*bytes < kPageBytes || *bytes % kPageBytes != 0)) {
    return absl::InvalidArgumentError("--memory has whole pages of 4096 bytes");
  }
  return bytes;
}

// A benchmark gives scratch memory to anybody who comes.
absl::StatusOr<PeerSecurity> LoadSecurity(const BenchLinkCommand& command) {
  PeerSecurity security = {.plain = PlainPeers::kAnyone};
  const TlsFiles& files = command.tls;
  if (files.certificate.empty() && files.key.empty() && files.ca.empty()) {
    if (command.encryption == "plain") return security;
    return absl::InvalidArgumentError("--encryption needs --certificate, --key and --ca");
  }
  absl::StatusOr<std::unique_ptr<TlsIdentity>> identity = TlsIdentity::Load(files);
  if (!identity.ok()) return identity.status();
  security.identity = *std::move(identity);
  return security;
}

int Serve(const BenchLinkCommand& command) {
  const absl::StatusOr<uint64_t> max_bytes = MemoryBytes(command, "4G");
  if (!max_bytes.ok()) return Fail(max_bytes.status(), command.json, kUsage);
  absl::StatusOr<UniqueFd> listener = Listen(command.listen, command.port);
  if (!listener.ok()) return Fail(listener.status(), command.json, kFailed);
  const absl::StatusOr<uint16_t> port = BoundPort(listener->get());
  if (!port.ok()) return Fail(port.status(), command.json, kFailed);

  const auto records = TemporaryFolder::Create();
  if (!records.ok()) return Fail(records.status(), command.json, kFailed);

  const absl::StatusOr<PeerSecurity> security = LoadSecurity(command);
  if (!security.ok()) return Fail(security.status(), command.json, kUsage);
  BenchTargetHost host(command.folder, *max_bytes);
  TargetServiceOptions options;
  options.admission = {.security = *security, .plain_beside_tls = true};
  options.record_folder = (*records)->path();
  // A client measures and says nothing meanwhile; that it died shows by its connection.
  options.idle_timeout = absl::Hours(1);
  options.keep_lost_session = absl::ZeroDuration();
  options.log = [](bool, const std::string& line) {
    std::fprintf(stderr, "presync bench: %s\n", line.c_str());
  };
  const std::unique_ptr<TargetService> service =
      TargetService::Start(*std::move(listener), &host, options);
  std::fprintf(stderr, "presync bench: waiting on port %u\n", unsigned{*port});
  while (!interrupted && (command.keep || host.places_ended() == 0)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return kOk;
}

// What the client's words say.
struct ClientPlan {
  SessionRequest request;
  uint64_t memory_bytes = 0;
  std::vector<LinkBenchOptions> runs;
};

// One way to the server, of those that are measured in turns.
struct Way {
  std::string encryption;  // "plain", "tls"
  SourceConnection connection;
};

absl::StatusOr<ClientPlan> MakePlan(const BenchLinkCommand& command) {
  ClientPlan plan;
  const absl::StatusOr<uint64_t> memory = MemoryBytes(command, "256M");
  const absl::StatusOr<uint64_t> size = ParseSize(command.size);
  const absl::StatusOr<absl::Duration> duration = ParsePositiveDuration(command.duration);
  if (!memory.ok()) return memory.status();
  if (!size.ok()) return size.status();
  if (!duration.ok()) return duration.status();
  if (!command.all_sizes &&
      (*size < kSmallestMessage || *size > kLargestMessage || *size % kPageBytes != 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--size ", command.size, ": from 4K to 4M, in whole pages of 4096 bytes"));
  }
  plan.memory_bytes = *memory;
  plan.request.tcp_streams = command.tcp_streams;
  plan.request.transport = command.transport == "tcp"    ? Transport::kTcp
                           : command.transport == "rdma" ? Transport::kRdma
                                                         : Transport::kAuto;
  plan.request.rdma.queue_pairs = command.queue_pairs;
  plan.request.rdma.devices = command.devices;
  // A device made of software may take that long for one completion; falling to TCP in time is not
  // what is measured.
  plan.request.rdma.stall_timeout = kStallTimeout;
  if (!command.max_write.empty()) {
    const absl::StatusOr<uint64_t> max_write = ParseSize(command.max_write);
    if (!max_write.ok()) return max_write.status();
    plan.request.rdma.max_write_bytes = *max_write;
  }
  LinkBenchOptions options;
  options.pattern =
      command.pattern == "scattered" ? LinkPattern::kScattered : LinkPattern::kContiguous;
  options.depth = command.depth;
  options.messages = command.iterations;
  options.duration = *duration;
  const uint64_t first = command.all_sizes ? kSmallestMessage : *size;
  const uint64_t last = command.all_sizes ? kLargestMessage : *size;
  for (options.message_bytes = first; options.message_bytes <= last; options.message_bytes *= 2) {
    plan.runs.push_back(options);
  }
  return plan;
}

// Bytes that don't compress and are nowhere zero: no link can make less of them.
void FillRandomly(const GuestMemory& memory) {
  std::mt19937_64 random(1);
  for (const Region& region : memory.regions()) {
    auto* words = reinterpret_cast<uint64_t*>(region.data());
    for (uint64_t i = 0; i < region.size_bytes() / sizeof(uint64_t); ++i) words[i] = random() | 1;
  }
}

Json ResultToJson(const Way& way, const LinkBenchResult& result) {
  const auto micros = [](absl::Duration d) { return absl::ToDoubleMicroseconds(d); };
  return {{"encryption", way.encryption},
          {"size_bytes", result.message_bytes},
          {"depth", result.depth},
          {"messages", result.messages},
          {"seconds", result.seconds()},
          {"bytes_per_s", result.bytes_per_s()},
          {"messages_per_s", result.messages_per_s()},
          {"latency_us",
           {{"p50", micros(result.latency_p50)},
            {"p90", micros(result.latency_p90)},
            {"p99", micros(result.latency_p99)}}},
          {"cpu_s_per_gb", result.cpu_s_per_gb()}};
}

void PrintHeader() {
  std::printf("%5s %9s %10s %12s %12s %10s %10s %10s %10s\n", "", "#bytes", "#messages",
              "BW [MB/s]", "rate [1/s]", "p50 [us]", "p90 [us]", "p99 [us]", "CPU [s/GB]");
}

void PrintRow(const Way& way, const LinkBenchResult& r) {
  const auto micros = [](absl::Duration d) { return absl::ToDoubleMicroseconds(d); };
  std::printf("%5s %9llu %10llu %12.1f %12.0f %10.1f %10.1f %10.1f %10.3f\n",
              way.encryption.c_str(), static_cast<unsigned long long>(r.message_bytes),
              static_cast<unsigned long long>(r.messages), r.bytes_per_s() / 1e6,
              r.messages_per_s(), micros(r.latency_p50), micros(r.latency_p90),
              micros(r.latency_p99), r.cpu_s_per_gb());
  std::fflush(stdout);
}

// What "both" is for: the bandwidth within TLS by the plain one's.
void ReportRatio(const std::vector<double>& bandwidths, uint64_t size_bytes, bool json,
                 Json* report) {
  if (bandwidths.size() != 2) return;
  const double ratio = bandwidths[1] / bandwidths[0];
  (*report)["ratios"].push_back({{"size_bytes", size_bytes}, {"tls_to_plain", ratio}});
  if (!json) std::printf("%5s %9s tls to plain: %.3f\n", "", "", ratio);
}

absl::Status Measure(std::vector<Way>* ways, const GuestMemory& memory, const ClientPlan& plan,
                     const BenchLinkCommand& command) {
  const SourceConnection& first = ways->front().connection;
  Json report = {{"ok", true},
                 {"link", std::string(first.link->name())},
                 {"devices", first.devices},
                 {"why", first.why},
                 {"peer", first.channel->peer()},
                 {"pattern", command.pattern},
                 {"rows", Json::array()}};
  if (!command.json) {
    std::printf("presync bench link: %s to %s, %s, depth %u, memory %s\n",
                std::string(first.link->name()).c_str(), first.channel->peer().c_str(),
                command.pattern.c_str(), command.depth, FormatBytes(plan.memory_bytes).c_str());
    if (!first.why.empty()) std::printf("  %s\n", first.why.c_str());
    PrintHeader();
  }
  for (const LinkBenchOptions& options : plan.runs) {
    std::vector<double> bandwidths;
    for (const Way& way : *ways) {
      const absl::StatusOr<LinkBenchResult> result =
          MeasureLink(way.connection.link.get(), memory, options);
      if (!result.ok()) return result.status();
      if (command.json) report["rows"].push_back(ResultToJson(way, *result));
      if (!command.json) PrintRow(way, *result);
      bandwidths.push_back(result->bytes_per_s());
    }
    ReportRatio(bandwidths, options.message_bytes, command.json, &report);
  }
  if (command.json) std::printf("%s\n", report.dump().c_str());
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Way>> ConnectWays(const BenchLinkCommand& command, const HostAndPort& to,
                                             const GuestMemory& memory, ClientPlan plan) {
  absl::StatusOr<PeerSecurity> security = LoadSecurity(command);
  if (!security.ok()) return security.status();
  const bool both = command.encryption == "both";
  std::vector<Way> ways;
  for (const char* encryption : {"plain", "tls"}) {
    if (!both && command.encryption != encryption) continue;
    const bool tls = std::string(encryption) == "tls";
    TcpDialer dialer(to.host, to.port,
                     tls ? *security : PeerSecurity{.plain = PlainPeers::kAnyone});
    plan.request.session = RandomId();
    plan.request.guest = "bench-" + IdToHex(plan.request.session);
    if (both) plan.request.transport = Transport::kTcp;  // RDMA knows no encryption
    absl::StatusOr<SourceConnection> connection =
        ConnectSource(&dialer, &memory, plan.request, MonotonicNow() + kConnectTimeout);
    if (!connection.ok()) return connection.status();
    ways.push_back({encryption, *std::move(connection)});
  }
  return ways;
}

int Measure(const BenchLinkCommand& command) {
  const absl::StatusOr<HostAndPort> to = ParseHostPort(command.peer, command.port);
  if (!to.ok()) return Fail(to.status(), command.json, kUsage);
  const absl::StatusOr<ClientPlan> plan = MakePlan(command);
  if (!plan.ok()) return Fail(plan.status(), command.json, kUsage);
  const absl::StatusOr<GuestMemory> memory = MakeScratchMemory(command.folder, plan->memory_bytes);
  if (!memory.ok()) return Fail(memory.status(), command.json, kFailed);
  FillRandomly(*memory);

  absl::StatusOr<std::vector<Way>> ways = ConnectWays(command, *to, *memory, *plan);
  if (!ways.ok()) {
    return Fail(ways.status(), command.json,
                absl::IsUnavailable(ways.status()) ? kNoDaemon : kFailed);
  }
  const absl::Status measured = Measure(&*ways, *memory, *plan, command);
  wire::ControlMessage close;
  close.mutable_close_session();
  for (const Way& way : *ways) {
    way.connection.channel->Send(close, MonotonicNow() + absl::Seconds(5)).IgnoreError();
  }
  return measured.ok() ? kOk : Fail(measured, command.json, kFailed);
}

void AddLinkOptions(CLI::App* link, BenchLinkCommand* o) {
  link->add_option("host", o->peer, "HOST or HOST:PORT of the server");
  link->add_option("-p,--port", o->port, "The server's port")->capture_default_str();
  link->add_option("--listen", o->listen, "Server: only on this address");
  link->add_flag("--keep", o->keep, "Server: serve until interrupted");
  link->add_option("--memory", o->memory,
                   "Memory that is written to; server: the most it gives away (256M; server: 4G)");
  link->add_option("--folder", o->folder, "Where that memory is: on tmpfs or hugetlbfs")
      ->capture_default_str();
  link->add_option("--transport", o->transport, "auto, rdma or tcp")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "rdma", "tcp"}));
  link->add_option("-s,--size", o->size, "Bytes of a message, 4K to 4M")->capture_default_str();
  link->add_flag("-a,--all", o->all_sizes, "All sizes from 4K to 4M");
  link->add_option("--pattern", o->pattern,
                   "contiguous: messages follow each other in memory; scattered: they lie apart")
      ->capture_default_str()
      ->check(CLI::IsMember({"contiguous", "scattered"}));
  link->add_option("-t,--depth", o->depth, "Messages under way at a time")
      ->capture_default_str()
      ->check(CLI::Range(1u, 65536u));
  link->add_option("-n,--iterations", o->iterations, "Messages of each size (else: --duration)");
  link->add_option("-D,--duration", o->duration, "Time for each size")->capture_default_str();
  link->add_option("--tcp-streams", o->tcp_streams, "Connections of the TCP link")
      ->capture_default_str()
      ->check(CLI::Range(1u, 64u));
  link->add_option("-q,--queue-pairs", o->queue_pairs, "Queue pairs on each RDMA device")
      ->capture_default_str()
      ->check(CLI::Range(1u, kMaxRdmaQueuePairs));
  link->add_option("-d,--devices", o->devices, "RDMA devices of this host to use (else any)")
      ->delimiter(',');
  link->add_option("--max-write", o->max_write,
                   "Longest single RDMA write: neighbouring messages are joined up to it (1M)");
  link->add_option("--encryption", o->encryption,
                   "plain, tls, or both: TCP in turns without and with TLS, and the ratio")
      ->capture_default_str()
      ->check(CLI::IsMember({"plain", "tls", "both"}));
  link->add_option("--certificate", o->tls.certificate,
                   "For TLS, on both sides: as presyncd.toml's");
  link->add_option("--key", o->tls.key, "The certificate's key");
  link->add_option("--ca", o->tls.ca, "The authority's certificate");
}

}  // namespace

int RunBenchLink(const BenchLinkCommand& command) {
  ::signal(SIGINT, [](int) { interrupted = true; });
  ::signal(SIGTERM, [](int) { interrupted = true; });
  return command.peer.empty() ? Serve(command) : Measure(command);
}

RunCommand AddBench(CLI::App* app, CommandContext* context) {
  app->require_subcommand(1);
  CLI::App* link = app->add_subcommand(
      "link",
      "How fast is the page link? Without HOST: the server, which ends with its first client. With "
      "HOST: measure the link to the server there, as ib_write_bw does");
  link->add_flag("--json", context->json, "Print JSON");
  auto o = std::make_shared<BenchLinkCommand>();
  AddLinkOptions(link, o.get());
  return [o, context] {
    o->json = context->json;
    return RunBenchLink(*o);
  };
}

}  // namespace presync
