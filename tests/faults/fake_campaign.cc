// The fault campaign over the fake link: see tests/fault_campaign, which runs it.
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "tests/faults/scenario.h"
#include "transport/clock.h"
#include "transport/mutex.h"

namespace presync {
namespace {

struct Options {
  uint64_t runs = 1000;
  uint64_t seed = 1;
  int64_t only = -1;
  uint64_t repeat = 1;
  int jobs = 12;
  std::string json;
  bool actors = false;
  bool log = false;
  bool quiet = false;
};

std::atomic<bool> interrupted = false;
// What is under way, for the words of a crash.
std::atomic<int64_t> under_way[64];

void OnAbort(int) {
  char text[64];
  for (const std::atomic<int64_t>& run : under_way) {
    if (run <= 0) continue;
    const int n = std::snprintf(text, sizeof(text), "crashed in or beside run %lld\n",
                                static_cast<long long>(run - 1));
    (void)!::write(STDERR_FILENO, text, static_cast<size_t>(n));
  }
}

class Campaign {
 public:
  explicit Campaign(const Options& options) : options_(options), began_(MonotonicNow()) {}

  int Run() {
    std::vector<std::thread> workers;
    for (int i = 0; i < options_.jobs; ++i) workers.emplace_back([this, i] { Work(i); });
    for (std::thread& worker : workers) worker.join();
    return Report();
  }

 private:
  struct Row {
    uint64_t runs = 0;
    uint64_t struck = 0;
    std::map<std::string, uint64_t> outcomes;
    std::map<std::string, uint64_t> struck_at;  // by step
  };

  uint64_t Total() const { return options_.only >= 0 ? options_.repeat : options_.runs; }

  void Work(int worker) {
    while (!interrupted) {
      const uint64_t number = next_++;
      if (number >= Total()) return;
      const uint64_t run = options_.only >= 0 ? static_cast<uint64_t>(options_.only) : number;
      under_way[worker] = static_cast<int64_t>(run) + 1;
      const Plan plan = DrawPlan(options_.seed, run, options_.actors);
      const Outcome outcome = RunPlan(plan, options_.log);
      under_way[worker] = 0;
      Take(run, plan, outcome);
    }
  }

  void Take(uint64_t run, const Plan& plan, const Outcome& outcome) {
    MutexLock lock(&mutex_);
    ++done_;
    Row& row = by_fault_[FaultName(plan.strikes[0].fault)];
    ++row.runs;
    row.struck += outcome.struck ? 1 : 0;
    row.struck_at[Where(plan.strikes[0])] += outcome.struck ? 1 : 0;
    ++row.outcomes[outcome.ok() ? outcome.what : "violation"];
    lost_ += outcome.lost ? 1 : 0;
    doubled_ += outcome.doubled ? 1 : 0;
    differing_ += outcome.pages_differing;
    failed_ += outcome.restart_failed ? 1 : 0;
    by_force_ += outcome.doubled_by_force ? 1 : 0;
    lost_by_force_ += outcome.lost_by_force ? 1 : 0;
    unnoticed_ += outcome.doubled_unnoticed ? 1 : 0;
    if (!outcome.ok()) {
      std::printf(
          "run %llu: %s: %s\n  replay: tests/fault_campaign %s--seed %llu --run %llu --log\n",
          static_cast<unsigned long long>(run), PlanText(plan).c_str(), outcome.text.c_str(),
          options_.actors ? "--actors " : "", static_cast<unsigned long long>(options_.seed),
          static_cast<unsigned long long>(run));
      violations_.push_back({{"run", run}, {"plan", PlanText(plan)}, {"what", outcome.text}});
    } else if (options_.only >= 0) {
      std::printf("run %llu: %s: %s\n", static_cast<unsigned long long>(run),
                  PlanText(plan).c_str(), outcome.what.c_str());
    }
    if (!options_.quiet && MonotonicNow() - said_ > absl::Seconds(2)) {
      said_ = MonotonicNow();
      std::printf("%llu of %llu runs, %zu violations\n", static_cast<unsigned long long>(done_),
                  static_cast<unsigned long long>(Total()), violations_.size());
    }
    std::fflush(stdout);
  }

  int Report() {
    MutexLock lock(&mutex_);
    const double seconds = absl::ToDoubleSeconds(MonotonicNow() - began_);
    nlohmann::json rows = nlohmann::json::object();
    for (const auto& [fault, row] : by_fault_) {
      rows[fault] = {{"runs", row.runs}, {"struck", row.struck}, {"at", row.struck_at}};
      for (const auto& [what, count] : row.outcomes) rows[fault][what] = count;
    }
    const nlohmann::json report = {{"runs", done_},
                                   {"seed", options_.seed},
                                   {"real", false},
                                   {"by_fault", rows},
                                   {"guests_lost", lost_},
                                   {"guests_doubled", doubled_},
                                   {"pages_differing", differing_},
                                   {"restarts_failed", failed_},
                                   {"doubled_by_force", by_force_},
                                   {"lost_by_force", lost_by_force_},
                                   {"doubled_unnoticed", unnoticed_},
                                   {"violations", violations_},
                                   {"seconds", seconds}};
    if (!options_.json.empty()) std::ofstream(options_.json) << report.dump(1) << "\n";
    std::printf(
        "%llu runs in %.1f s (%.0f a second), seed %llu: guests lost %llu, doubled %llu, pages "
        "differing %llu, restarts failed %llu; doubled by force %llu, lost by force %llu, doubled "
        "unnoticed %llu\n",
        static_cast<unsigned long long>(done_), seconds, static_cast<double>(done_) / seconds,
        static_cast<unsigned long long>(options_.seed), static_cast<unsigned long long>(lost_),
        static_cast<unsigned long long>(doubled_), static_cast<unsigned long long>(differing_),
        static_cast<unsigned long long>(failed_), static_cast<unsigned long long>(by_force_),
        static_cast<unsigned long long>(lost_by_force_),
        static_cast<unsigned long long>(unnoticed_));
    return violations_.empty() && done_ > 0 ? 0 : 1;
  }

  const Options options_;
  const absl::Time began_;
  std::atomic<uint64_t> next_ = 0;
  Mutex mutex_;
  absl::Time said_ ABSL_GUARDED_BY(mutex_) = MonotonicNow();
  uint64_t done_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t lost_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t doubled_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t differing_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t failed_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t by_force_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t lost_by_force_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t unnoticed_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::string, Row> by_fault_ ABSL_GUARDED_BY(mutex_);
  nlohmann::json violations_ ABSL_GUARDED_BY(mutex_) = nlohmann::json::array();
};

int Main(int argc, char** argv) {
  CLI::App app{"The fault campaign over the fake link; tests/fault_campaign has the words."};
  Options options;
  app.add_option("--runs", options.runs);
  app.add_option("--seed", options.seed);
  app.add_option("--run", options.only);
  app.add_option("--repeat", options.repeat);
  app.add_option("--jobs", options.jobs)->check(CLI::Range(1, 64));
  app.add_option("--json", options.json);
  app.add_flag("--actors", options.actors);
  app.add_flag("--log", options.log);
  app.add_flag("--quiet", options.quiet);
  CLI11_PARSE(app, argc, argv);
  ::signal(SIGINT, [](int) { interrupted = true; });
  ::signal(SIGTERM, [](int) { interrupted = true; });
  ::signal(SIGABRT, OnAbort);
  ::signal(SIGPIPE, SIG_IGN);
  return Campaign(options).Run();
}

}  // namespace
}  // namespace presync

int main(int argc, char** argv) { return presync::Main(argc, argv); }
