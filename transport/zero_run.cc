#include "transport/zero_run.h"

#include <cstring>
#include <vector>

namespace presync {
namespace {

bool IsZero(const std::byte* page) {
  // The first byte is zero and each byte equals the one before it.
  return page[0] == std::byte{0} && memcmp(page, page + 1, kPageBytes - 1) == 0;
}

}  // namespace

void ZeroRun(const GuestMemory& memory, PageRun run) {
  auto holes = memory.Holes(run);
  if (!holes.ok()) holes = std::vector<PageRun>();  // then every page is looked at
  PageIndex page = run.first;
  auto zero_until = [&](PageIndex end) {
    for (; page < end; ++page) {
      std::byte* bytes = memory.Bytes({page, 1}).data();
      if (!IsZero(bytes)) memset(bytes, 0, kPageBytes);
    }
  };
  for (const PageRun hole : *holes) {
    zero_until(hole.first);
    page = hole.end();
  }
  zero_until(run.end());
}

}  // namespace presync
