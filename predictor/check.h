// PRESYNC_CHECK: guards invariants of our own code, in every build type. Debian 12's abseil has no
// absl/log/check.h yet.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace presync::internal {

[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, condition);
  std::abort();
}

}  // namespace presync::internal

// Ends the process when `condition` is false. Never for input from outside: that is a Status.
#define PRESYNC_CHECK(condition)      \
  (__builtin_expect(!!(condition), 1) \
       ? static_cast<void>(0)         \
       : ::presync::internal::CheckFailed(__FILE__, __LINE__, #condition))
