// Ends of a link in a process of their own, over a small guest of 600 pages.
//
//   rdma_probe ADDRESS          brings both ends up and says how that went, a line an end:
//                               "target: OK", "source: RESOURCE_EXHAUSTED: ..."
//   rdma_probe ADDRESS serve    a target with one queue pair and a token of 0x5a bytes: prints its
//                               port and its windows' numbers, a line each, and waits to be killed
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <string>

#include "tests/transport/scratch_memory.h"
#include "transport/clock.h"
#include "transport/rdma/rdma_link.h"

namespace presync {
namespace {

int Serve(const GuestMemory& memory, const std::string& address) {
  RdmaListen listen = {.addresses = {address}, .queue_pairs = 1};
  listen.token.fill(0x5a);
  const auto target = ListenRdma(&memory, listen);
  if (!target.ok()) return 1;
  const RdmaEndpoint& endpoint = (*target)->offer().endpoints[0];
  std::printf("%u\n", endpoint.port);
  for (const RdmaWindow& w : endpoint.windows) {
    std::printf("%u %" PRIu64 " %" PRIu64 " %" PRIu64 " %u\n", w.region, w.offset_bytes,
                w.size_bytes, w.address, w.key);
  }
  std::fclose(stdout);
  while (true) ::pause();
}

int BringUp(const GuestMemory& source_memory, const GuestMemory& target_memory,
            const std::string& address) {
  const auto target = ListenRdma(&target_memory, {.addresses = {address}, .queue_pairs = 1});
  std::printf("target: %s\n", target.status().ToString().c_str());
  if (!target.ok()) return 0;
  const auto source = ConnectRdma(&source_memory, (*target)->offer(), RdmaSourceOptions(),
                                  MonotonicNow() + absl::Seconds(60));
  std::printf("source: %s\n", source.status().ToString().c_str());
  return 0;
}

}  // namespace
}  // namespace presync

int main(int argc, char** argv) {
  const auto source_ram = presync::ScratchMemory::Create({500, 100});
  const auto target_ram = presync::ScratchMemory::Create({500, 100});
  if (argc < 2 || !source_ram.ok() || !target_ram.ok()) return 2;
  if (argc > 2) return presync::Serve((*target_ram)->memory(), argv[1]);
  return presync::BringUp((*source_ram)->memory(), (*target_ram)->memory(), argv[1]);
}
