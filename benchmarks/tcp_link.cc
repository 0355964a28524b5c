// How many guest bytes a second does the TCP link carry over loopback, and what CPU does that cost?
// Beside it, in the same run, two bounds: copying the same bytes in memory, and one socket that
// sends and receives them in a plain loop. Counters: bytes_per_second (guest bytes), cpu_s_per_GB
// (user and system time of both ends, this being one process), wire (wire bytes per guest byte).
#include <benchmark/benchmark.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "tests/transport/loopback.h"
#include "tests/transport/scratch_memory.h"
#include "transport/tcp/codec.h"
#include "transport/tcp/tcp_source_link.h"
#include "transport/tcp/tcp_target_link.h"

namespace presync {
namespace {

constexpr PageCount kPages = 32768;  // 128 MiB: beyond any cache
constexpr uint64_t kBytes = uint64_t{kPages} * kPageBytes;

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  auto seconds = [](const timeval& time) { return time.tv_sec + time.tv_usec * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Source and target RAM, made once. Every second page is text-like (words from a small vocabulary),
// the others do not compress: together about what a desktop guest is like.
struct Memories {
  std::unique_ptr<ScratchMemory> source = *ScratchMemory::Create({kPages});
  std::unique_ptr<ScratchMemory> target = *ScratchMemory::Create({kPages});

  Memories() {
    std::mt19937 random(1);
    std::vector<std::string> words(500);
    for (std::string& word : words) {
      for (size_t i = 0; i < 3 + random() % 7; ++i) word += static_cast<char>('a' + random() % 26);
    }
    for (PageIndex page = 0; page < kPages; ++page) {
      source->FillPage(page, 1);

      if (page % 2 == 0) continue;
      std::string text;
      while (text.size() < kPageBytes) text += words[random() % words.size()] + ' ';
      memcpy(source->GuestPage(page), text.data(), kPageBytes);
    }
    // Touches both mappings, so that no page fault is measured.
    memcpy(target->memory().Bytes({0, kPages}).data(), source->memory().Bytes({0, kPages}).data(),
           kBytes);
  }
};

Memories& TheMemories() {
  static Memories memories;
  return memories;
}

void Report(benchmark::State& state, double cpu_s) {
  const double bytes = static_cast<double>(state.iterations()) * kBytes;
  state.SetBytesProcessed(static_cast<int64_t>(bytes));
  state.counters["cpu_s_per_GB"] = cpu_s / (bytes / 1e9);
}

void BM_Memcpy(benchmark::State& state) {
  const absl::Span<std::byte> from = TheMemories().source->memory().Bytes({0, kPages});
  const absl::Span<std::byte> to = TheMemories().target->memory().Bytes({0, kPages});
  const double cpu = CpuSeconds();
  for (auto _ : state) {
    memcpy(to.data(), from.data(), kBytes);
    benchmark::ClobberMemory();
  }
  Report(state, CpuSeconds() - cpu);
}
BENCHMARK(BM_Memcpy)->UseRealTime()->Unit(benchmark::kMillisecond);

// Sends `kBytes` in pieces of `arg` KiB.
void BM_PlainSocket(benchmark::State& state) {
  const size_t piece = static_cast<size_t>(state.range(0)) << 10;
  std::byte* from = TheMemories().source->memory().Bytes({0, kPages}).data();
  std::byte* to = TheMemories().target->memory().Bytes({0, kPages}).data();
  SocketPairs sockets = *ConnectLoopback(1);
  const double cpu = CpuSeconds();
  for (auto _ : state) {
    std::thread receiver([&] {
      for (size_t have = 0; have < kBytes;) {
        const ssize_t got =
            recv(sockets.target[0].get(), to + have, std::min(piece, kBytes - have), 0);
        if (got <= 0) return;
        have += static_cast<size_t>(got);
      }
    });
    for (size_t sent = 0; sent < kBytes;) {
      const ssize_t done = send(sockets.source[0].get(), from + sent,
                                std::min<size_t>(piece, kBytes - sent), MSG_NOSIGNAL);
      if (done <= 0) break;
      sent += static_cast<size_t>(done);
    }
    receiver.join();
  }
  Report(state, CpuSeconds() - cpu);
}
BENCHMARK(BM_PlainSocket)
    ->ArgName("KiB")
    ->Arg(4)
    ->Arg(256)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

// Args: pages a run, streams, compression.
void BM_TcpLink(benchmark::State& state) {
  Memories& memories = TheMemories();
  SocketPairs sockets = *ConnectLoopback(static_cast<size_t>(state.range(1)));
  TcpSourceOptions options;
  options.compression = static_cast<Compression>(state.range(2));
  auto source = *TcpSourceLink::Create(&memories.source->memory(), std::move(sockets.source),
                                       options, SocketOptions());
  auto target = *TcpTargetLink::Create(&memories.target->memory(), std::move(sockets.target),
                                       SocketOptions());
  std::vector<PageWrite> writes;
  const PageCount run = static_cast<PageCount>(state.range(0));
  for (PageIndex page = 0; page < kPages; page += run) writes.push_back({{page, run}});

  LinkEvents events;
  const double cpu = CpuSeconds();
  for (auto _ : state) {
    for (absl::Span<const PageWrite> left = writes; !left.empty();) {
      auto posted = source->Post(left);
      if (!posted.ok()) return state.SkipWithError(posted.status().ToString().c_str());
      left.remove_prefix(*posted);
      if (*posted > 0) continue;
      source->Wait(absl::InfiniteFuture()).IgnoreError();
      events.Clear();
      source->Poll(&events).IgnoreError();
    }
    const CommitId id = *source->PostCommit();
    while (events.committed < id) {
      source->Wait(absl::InfiniteFuture()).IgnoreError();
      events.Clear();
      if (auto status = source->Poll(&events); !status.ok()) {
        return state.SkipWithError(status.ToString().c_str());
      }
    }
  }
  Report(state, CpuSeconds() - cpu);
  const LinkStats stats = source->stats();
  state.counters["wire"] = static_cast<double>(stats.wire_bytes) / stats.payload_bytes;
}
BENCHMARK(BM_TcpLink)
    ->ArgNames({"pages", "streams", "codec"})
    ->ArgsProduct({{1, 16, 256}, {1, 2, 4}, {static_cast<int>(Compression::kNone)}})
    ->ArgsProduct({{1, 16, 256},
                   {2},
                   {static_cast<int>(Compression::kLz4), static_cast<int>(Compression::kZstd),
                    static_cast<int>(Compression::kAuto)}})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

// iperf3's own goodput over the same loopback, for two seconds: what perftest's users compare with.
void BM_Iperf3(benchmark::State& state) {
  const std::string server = "iperf3 -s -1 -B 127.0.0.1 -p 15201 >/dev/null 2>&1 &";
  const std::string client =
      "for i in 1 2 3 4 5 6 7 8 9 10; do "
      "iperf3 -c 127.0.0.1 -p 15201 -t 2 -J -P " +
      std::to_string(state.range(0)) + " 2>/dev/null && break; sleep 0.2; done";
  double bytes_per_s = 0;
  for (auto _ : state) {
    if (std::system(server.c_str()) != 0) return state.SkipWithError("iperf3 did not start");
    FILE* out = ::popen(client.c_str(), "r");
    std::string text;
    char buffer[4096];
    for (size_t n; (n = std::fread(buffer, 1, sizeof(buffer), out)) > 0;) text.append(buffer, n);
    ::pclose(out);
    const size_t sum = text.find("\"sum_received\"");
    const size_t rate = text.find("\"bits_per_second\":", sum);
    if (sum == std::string::npos || rate == std::string::npos) {
      return state.SkipWithError("iperf3 gave no result: is it installed? (tools/setup)");
    }
    bytes_per_s = std::strtod(text.c_str() + rate + 18, nullptr) / 8;
  }
  state.counters["bytes_per_second"] =
      benchmark::Counter(bytes_per_s, benchmark::Counter::kDefaults, benchmark::Counter::kIs1024);
}
BENCHMARK(BM_Iperf3)->ArgName("streams")->Arg(1)->Arg(4)->Iterations(1)->UseRealTime();

// What a sample of the automatic choice costs: 64 KiB with both codecs.
void BM_CodecSample(benchmark::State& state) {
  const auto in = TheMemories().source->memory().Bytes({0, 16});
  std::vector<std::byte> out(in.size());
  Compressor compressor;
  for (auto _ : state) {
    benchmark::DoNotOptimize(compressor.Compress(Codec::kLz4, in, absl::MakeSpan(out)));
    benchmark::DoNotOptimize(compressor.Compress(Codec::kZstd, in, absl::MakeSpan(out)));
  }
}
BENCHMARK(BM_CodecSample)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace presync
