#include "tools/common/units.h"

#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"

namespace presync {
namespace {

// Splits "12.5Mbit" into 12.5 and "Mbit".
bool SplitNumber(absl::string_view text, double* number, absl::string_view* unit) {
  const size_t end = text.find_first_not_of("0123456789.");
  *unit = end == absl::string_view::npos ? absl::string_view() : text.substr(end);
  *unit = absl::StripAsciiWhitespace(*unit);
  return absl::SimpleAtod(text.substr(0, end), number) && *number >= 0 && *number < 1e15;
}

// A number of bytes as an integer; anything beyond 2^63 is no such number.
bool ToBytes(double number, double factor, uint64_t* bytes) {
  const double product = number * factor;
  if (!(product < 9.2e18)) return false;
  *bytes = static_cast<uint64_t>(product);
  return true;
}

// The factor of a prefix such as K, M, Gi; 0 if there is no such prefix.
double PrefixFactor(absl::string_view prefix) {
  if (prefix.empty()) return 1;
  const bool binary = absl::ConsumeSuffix(&prefix, "i");
  const double base = binary ? 1024 : 1000;
  static constexpr absl::string_view kPrefixes = "KMGT";
  if (prefix.size() != 1) return 0;
  const size_t power = kPrefixes.find(absl::ascii_toupper(prefix[0]));
  return power == absl::string_view::npos ? 0 : std::pow(base, static_cast<double>(power + 1));
}

}  // namespace

absl::StatusOr<absl::Duration> ParsePositiveDuration(absl::string_view text) {
  absl::Duration duration;
  if (absl::ParseDuration(text, &duration) && duration > absl::ZeroDuration() &&
      duration < absl::Hours(24)) {
    return duration;
  }
  return absl::InvalidArgumentError(absl::StrCat("'", text, "' is no duration; write 100ms or 2s"));
}

absl::StatusOr<uint64_t> ParseRate(absl::string_view text) {
  double number = 0;
  absl::string_view unit;
  if (SplitNumber(text, &number, &unit)) {
    if (number == 0 && unit.empty()) return uint64_t{0};
    absl::ConsumeSuffix(&unit, "/s");
    double factor = 0;
    if (absl::ConsumeSuffix(&unit, "bit")) {
      factor = PrefixFactor(unit) / 8;
    } else if (absl::ConsumeSuffix(&unit, "B")) {
      factor = PrefixFactor(unit);
    }
    uint64_t rate = 0;
    if (factor > 0 && ToBytes(number, factor, &rate) && rate >= 1) return rate;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("'", text, "' is no rate; write 800Mbit, 100MB or 0 for no limit"));
}

absl::StatusOr<uint64_t> ParseSize(absl::string_view text) {
  double number = 0;
  absl::string_view unit;
  if (SplitNumber(text, &number, &unit)) {
    absl::ConsumeSuffix(&unit, "iB");
    absl::ConsumeSuffix(&unit, "B");
    const double factor = unit.empty() ? 1 : PrefixFactor(absl::StrCat(unit, "i"));
    uint64_t size = 0;
    if (factor > 0 && ToBytes(number, factor, &size)) return size;
  }
  return absl::InvalidArgumentError(absl::StrCat("'", text, "' is no size; write 512M or 64G"));
}

absl::StatusOr<HostAndPort> ParseHostPort(absl::string_view text, uint16_t default_port) {
  HostAndPort result = {.host = {}, .port = default_port};
  absl::string_view port;
  if (absl::ConsumePrefix(&text, "[")) {
    const size_t end = text.find(']');
    if (end == absl::string_view::npos) {
      return absl::InvalidArgumentError("an IPv6 address is written [ADDRESS]:PORT");
    }
    result.host = std::string(text.substr(0, end));
    port = text.substr(end + 1);
  } else if (const size_t colon = text.rfind(':');
             colon != absl::string_view::npos && text.find(':') == colon) {
    result.host = std::string(text.substr(0, colon));
    port = text.substr(colon);
  } else {
    result.host = std::string(text);
  }
  if (absl::ConsumePrefix(&port, ":")) {
    uint32_t number = 0;
    if (!absl::SimpleAtoi(port, &number) || number == 0 || number > 65535) {
      return absl::InvalidArgumentError(absl::StrCat("'", port, "' is no port"));
    }
    result.port = static_cast<uint16_t>(number);
  } else if (!port.empty()) {
    return absl::InvalidArgumentError("an address is written HOST or HOST:PORT");
  }
  if (result.host.empty()) return absl::InvalidArgumentError("an address needs a host");
  return result;
}

std::string FormatBytes(uint64_t bytes) {
  if (bytes < 1'000'000) return absl::StrFormat("%.1f kB", bytes / 1e3);
  if (bytes < 1'000'000'000) return absl::StrFormat("%.1f MB", bytes / 1e6);
  return absl::StrFormat("%.2f GB", bytes / 1e9);
}

std::string FormatRate(uint64_t bytes_per_s) {
  return absl::StrCat(FormatBytes(bytes_per_s), "/s");
}

std::string FormatMillis(absl::Duration duration) {
  if (duration == absl::InfiniteDuration()) return "-";
  return absl::StrFormat("%.1f ms", absl::ToDoubleMilliseconds(duration));
}

}  // namespace presync
