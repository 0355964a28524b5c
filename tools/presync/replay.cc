#include "tools/presync/replay.h"

#include <time.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "predictor/policy.h"
#include "predictor/replay.h"
#include "tools/common/trace_file.h"
#include "tools/common/units.h"

namespace presync {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kOptimum = "optimum";
// Only by name, not part of "all".
constexpr const char* kKnownRates = "known-rates";

absl::Duration ThreadCpuTime() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return absl::DurationFromTimespec(now);
}

struct Plan {
  std::vector<std::string> policies;
  std::vector<PageCount> set_points;
  LaunchCost cost;
  absl::Duration rates_within;
};

absl::StatusOr<std::vector<std::string>> Policies(const std::vector<std::string>& asked) {
  std::vector<std::string> known = {kOptimum};
  for (const std::string_view name : PolicyNames()) known.emplace_back(name);
  std::reverse(known.begin(), known.end());  // baselines first
  std::vector<std::string> policies;
  for (const std::string& name : asked) {
    if (name == "all") return known;
    if (name != kKnownRates && std::find(known.begin(), known.end(), name) == known.end()) {
      std::string names;
      for (const std::string& each : known) absl::StrAppend(&names, each, ", ");
      return absl::InvalidArgumentError(absl::StrCat(
          "--policy: no policy \"", name, "\"; there are ", names, kKnownRates, ", all"));
    }
    policies.push_back(name);
  }
  return policies;
}

absl::StatusOr<Plan> MakePlan(const ReplayCommand& command) {
  Plan plan;
  absl::StatusOr<std::vector<std::string>> policies = Policies(command.policies);
  if (!policies.ok()) return policies.status();
  plan.policies = *std::move(policies);
  if (!command.link.empty()) {
    const absl::StatusOr<uint64_t> rate = ParseRate(command.link);
    if (!rate.ok()) return rate.status();
    plan.cost.link_bytes_per_s = *rate;
  }
  const absl::StatusOr<absl::Duration> fixed = ParsePositiveDuration(command.fixed_cost);
  if (!fixed.ok()) return fixed.status();
  plan.cost.fixed = *fixed;
  const absl::StatusOr<absl::Duration> within = ParsePositiveDuration(command.rates_within);
  if (!within.ok()) return within.status();
  plan.rates_within = *within;
  plan.set_points.assign(command.set_points.begin(), command.set_points.end());
  if (command.max_launch_time.empty() != !plan.set_points.empty()) {
    return absl::InvalidArgumentError("replay: give either --set-point or --max-launch-time");
  }
  if (command.max_launch_time.empty()) return plan;
  if (plan.cost.link_bytes_per_s == 0) {
    return absl::InvalidArgumentError("replay: --max-launch-time needs --link RATE above 0");
  }
  const absl::StatusOr<absl::Duration> promise = ParsePositiveDuration(command.max_launch_time);
  if (!promise.ok()) return promise.status();
  if (*promise <= plan.cost.fixed) {
    return absl::InvalidArgumentError(
        absl::StrCat("replay: a launch takes ", command.fixed_cost,
                     " besides moving memory (--fixed-cost), so it can't be promised in ",
                     command.max_launch_time));
  }
  plan.set_points = {SetPointPages(*promise, plan.cost)};
  return plan;
}

// One row of the answer.
struct Row {
  std::string trace, policy;
  PageCount set_point = 0;
  uint32_t page_bytes = 0;
  ReplayResult result;
  uint64_t every_scan = 0, once_a_second = 0, optimum = 0;
};

std::optional<double> Ratio(double a, double b) {
  return b == 0 ? std::nullopt : std::optional<double>(a / b);
}

Json OrNull(std::optional<double> value) { return value ? Json(*value) : Json(nullptr); }

Json DurationOrNull(absl::Duration duration) {
  return duration == absl::InfiniteDuration() ? Json(nullptr)
                                              : Json(absl::ToDoubleMilliseconds(duration));
}

std::optional<double> Times(double factor, std::optional<double> value) {
  return value ? std::optional<double>(factor * *value) : std::nullopt;
}

Json ToJson(const Row& row) {
  const ReplayResult& r = row.result;
  const auto sent = static_cast<double>(r.pages_sent);
  return {
      {"trace", row.trace},
      {"policy", row.policy},
      {"set_point_pages", row.set_point},
      {"scans", r.scans},
      {"pages_written", r.pages_written},
      {"pages_sent", r.pages_sent},
      {"bytes_sent", r.pages_sent * row.page_bytes},
      {"percent_of_every_scan", OrNull(Times(100, Ratio(sent, row.every_scan)))},
      {"percent_of_once_a_second", OrNull(Times(100, Ratio(sent, row.once_a_second)))},
      {"optimum_ratio", OrNull(Ratio(sent, row.optimum))},
      {"residual_mean_pages", r.residual_mean_pages},
      {"residual_p95_pages", r.residual_p95_pages},
      {"residual_max_pages", r.residual_max_pages},
      {"launch_mean_ms", DurationOrNull(r.launch_mean)},
      {"launch_p95_ms", DurationOrNull(r.launch_p95)},
      {"faults", r.write_faults},
      {"percent_of_all_faults", OrNull(Times(100, Ratio(r.write_faults, r.pages_written)))},
      {"ns_per_dirty_page",
       OrNull(Ratio(absl::ToDoubleNanoseconds(r.policy_cpu), r.pages_written))},
  };
}

std::string Cell(std::optional<double> value, const char* format) {
  char text[32] = "-";
  if (value) std::snprintf(text, sizeof(text), format, *value);
  return text;
}

void PrintHeader() {
  std::printf("%-16s %-13s %9s %10s %7s %7s %7s %8s %8s %8s %8s %8s %9s %7s\n", "trace", "policy",
              "set-point", "sent", "% scan", "% 1/s", "/ opt", "residual", "p95", "max", "launch",
              "p95 (ms)", "faults", "ns/page");
}

void Print(const Row& row) {
  const ReplayResult& r = row.result;
  const auto sent = static_cast<double>(r.pages_sent);
  const auto millis = [](absl::Duration d) {
    return d == absl::InfiniteDuration() ? std::nullopt
                                         : std::optional(absl::ToDoubleMilliseconds(d));
  };
  std::printf(
      "%-16s %-13s %9u %10s %7s %7s %7s %8.0f %8u %8u %8s %8s %9llu %7s\n", row.trace.c_str(),
      row.policy.c_str(), row.set_point, FormatBytes(r.pages_sent * row.page_bytes).c_str(),
      Cell(Times(100, Ratio(sent, row.every_scan)), "%.1f").c_str(),
      Cell(Times(100, Ratio(sent, row.once_a_second)), "%.1f").c_str(),
      Cell(Ratio(sent, row.optimum), "%.3f").c_str(), r.residual_mean_pages, r.residual_p95_pages,
      r.residual_max_pages, Cell(millis(r.launch_mean), "%.1f").c_str(),
      Cell(millis(r.launch_p95), "%.1f").c_str(), static_cast<unsigned long long>(r.write_faults),
      Cell(Ratio(absl::ToDoubleNanoseconds(r.policy_cpu), r.pages_written), "%.0f").c_str());
}

// text.pstrace.zst is "text".
std::string TraceName(const std::string& path) {
  std::string name = std::filesystem::path(path).filename().string();
  return name.substr(0, name.find('.', 1));
}

absl::StatusOr<ReplayResult> ReplayOne(const Trace& trace, const std::string& name,
                                       const ReplayOptions& options, absl::Duration rates_within,
                                       uint32_t max_back_off_log2) {
  std::unique_ptr<SendPolicy> policy;
  if (name == kOptimum) {
    policy = MakeOptimum(trace);
  } else if (name == kKnownRates) {
    const absl::Duration scan = absl::Microseconds(trace.header().scan_interval_us);
    policy = MakeKnownRates(trace, static_cast<size_t>(rates_within / scan));
  } else {
    auto made = MakePolicy(name, trace.header().pages,
                           {.max_back_off_log2 = max_back_off_log2,
                            .scans_per_second = ScansPerSecond(trace.header())});
    if (!made.ok()) return made.status();
    policy = *std::move(made);
  }
  return Replay(trace, *policy, options);
}

absl::Status ReplayTrace(const std::string& path, const Plan& plan, const ReplayCommand& command,
                         Json* rows) {
  const absl::StatusOr<Trace> trace = ReadTraceFile(path);
  if (!trace.ok()) return trace.status();
  Row row = {.trace = TraceName(path), .page_bytes = trace->header().page_bytes};
  row.every_scan = EveryScanPages(*trace);
  row.once_a_second = OnceASecondPages(*trace);
  for (const PageCount set_point : plan.set_points) {
    const ReplayOptions options = {
        .set_point = set_point, .cost = plan.cost, .cpu_time = ThreadCpuTime};
    row.set_point = set_point;
    row.optimum = Replay(*trace, *MakeOptimum(*trace), options).pages_sent;
    for (const std::string& policy : plan.policies) {
      absl::StatusOr<ReplayResult> result =
          ReplayOne(*trace, policy, options, plan.rates_within, command.max_back_off_log2);
      if (!result.ok()) return result.status();
      row.policy = policy;
      row.result = *std::move(result);
      if (command.json) {
        rows->push_back(ToJson(row));
      } else {
        Print(row);
        std::fflush(stdout);
      }
    }
  }
  return absl::OkStatus();
}

int Complain(const absl::Status& status, int code) {
  std::fprintf(stderr, "presync: %s\n", std::string(status.message()).c_str());
  return code;
}

}  // namespace

int RunReplay(const ReplayCommand& command) {
  const absl::StatusOr<Plan> plan = MakePlan(command);
  if (!plan.ok()) return Complain(plan.status(), 2);
  Json rows = Json::array();
  if (!command.json) PrintHeader();
  for (const std::string& path : command.traces) {
    if (absl::Status s = ReplayTrace(path, *plan, command, &rows); !s.ok()) return Complain(s, 1);
  }
  if (command.json) std::printf("%s\n", rows.dump(1).c_str());
  return 0;
}

RunCommand AddReplay(CLI::App* app, CommandContext* context) {
  auto r = std::make_shared<ReplayCommand>();
  app->add_option("--trace", r->traces, "Trace files, plain or zstd-compressed")->required();
  app->add_option(
         "--policy", r->policies,
         "every-scan, once-a-second, skip-if-dirty, oldest, ewma, learned, optimum or all; "
         "known-rates: a bound, told how often each page is written around each moment")
      ->required()
      ->delimiter(',');
  auto* set_point = app->add_option("--set-point", r->set_points, "Stale pages to hold at most")
                        ->delimiter(',')
                        ->check(CLI::NonNegativeNumber);
  app->add_option("--max-launch-time", r->max_launch_time,
                  "Instead: what a launch may take, e.g. 100ms; needs --link")
      ->excludes(set_point);
  app->add_option("--link", r->link,
                  "The link's goodput, e.g. 1Gbit: limits each scan, and predicts launch times");
  r->fixed_cost = "60ms";
  app->add_option("--fixed-cost", r->fixed_cost, "What a launch takes besides moving memory")
      ->capture_default_str();
  app->add_option("--rates-within", r->rates_within,
                  "For known-rates: how long before and after a moment writes are counted")
      ->capture_default_str();
  app->add_option("--back-off", r->max_back_off_log2,
                  "Arming back-off of up to 2^this scans; 0 is off")
      ->capture_default_str()
      ->check(CLI::Range(0, 5));
  return [r, context] {
    r->json = context->json;
    return RunReplay(*r);
  };
}

}  // namespace presync
