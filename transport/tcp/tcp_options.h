// What can be set about a TCP link's source end.
#pragma once

#include <cstdint>

namespace presync {

enum class Compression { kNone, kLz4, kZstd, kAuto };

struct TcpSourceOptions {
  Compression compression = Compression::kNone;
  // What may be posted and not yet sent, for each stream. A longer queue only delays what is posted
  // after it; 1 MiB is 8 ms at 1 Gb/s.
  uint64_t queue_bytes_per_stream = uint64_t{1} << 20;
};

}  // namespace presync
