// presyncd's configuration: any text is either taken or refused with a line that says where.
#include "tests/fuzz/fuzz_input.h"
#include "tools/presyncd/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const absl::StatusOr<presync::Config> config = presync::ParseConfig(text, "fuzz.toml");
  if (config.ok()) {
    FUZZ_REQUIRE(config->tcp_streams >= 1 && config->rdma_queue_pairs >= 1);
    FUZZ_REQUIRE(config->max_launch_time > absl::ZeroDuration());
    FUZZ_REQUIRE(config->scan_interval > absl::ZeroDuration());
  } else {
    FUZZ_REQUIRE(absl::IsInvalidArgument(config.status()));
    FUZZ_REQUIRE(config.status().message().find("fuzz.toml") != absl::string_view::npos);
  }
  return 0;
}
