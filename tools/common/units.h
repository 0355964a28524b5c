// Durations, rates and sizes as operators type and read them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace presync {

// "100ms", "1.5s", "2m": positive. INVALID_ARGUMENT with an example otherwise.
absl::StatusOr<absl::Duration> ParsePositiveDuration(absl::string_view text);

// Bytes per second. Bits with "bit" ("800Mbit", "1Gbit"), bytes with "B" ("100MB", "1GiB"), as tc
// and QEMU write them; "/s" may follow; "0" means no limit.
absl::StatusOr<uint64_t> ParseRate(absl::string_view text);

// Bytes: "256M", "64G", "1T" (powers of 1024, as QEMU's -m), or plain bytes.
absl::StatusOr<uint64_t> ParseSize(absl::string_view text);

// HOST, HOST:PORT or [IPV6]:PORT.
struct HostAndPort {
  std::string host;
  uint16_t port = 0;
};
absl::StatusOr<HostAndPort> ParseHostPort(absl::string_view text, uint16_t default_port);

std::string FormatBytes(uint64_t bytes);            // "3.2 MB"
std::string FormatRate(uint64_t bytes_per_s);       // "112.0 MB/s"
std::string FormatMillis(absl::Duration duration);  // "43.1 ms", "-" for infinite

}  // namespace presync
