// Brings both ends of a link up over a small guest and says how that went, a line an end:
// "target: OK", "source: RESOURCE_EXHAUSTED: ...".
//
//   rdma_probe ADDRESS
#include <cstdio>
#include <string>

#include "absl/time/clock.h"
#include "tests/transport/scratch_memory.h"
#include "transport/rdma/rdma_link.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const auto source_ram = presync::ScratchMemory::Create({500, 100});
  const auto target_ram = presync::ScratchMemory::Create({500, 100});
  if (!source_ram.ok() || !target_ram.ok()) return 1;
  const auto target =
      presync::ListenRdma(&(*target_ram)->memory(), {.addresses = {argv[1]}, .queue_pairs = 1});
  std::printf("target: %s\n", target.status().ToString().c_str());
  if (!target.ok()) return 0;
  const auto source =
      presync::ConnectRdma(&(*source_ram)->memory(), (*target)->offer(),
                           presync::RdmaSourceOptions(), absl::Now() + absl::Seconds(60));
  std::printf("source: %s\n", source.status().ToString().c_str());
  return 0;
}
