#include <array>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "tests/faults/scenario.h"

namespace presync {
namespace {

constexpr std::array<std::pair<Fault, const char*>, 35> kNames = {{
    {Fault::kNone, "none"},
    {Fault::kCrashSource, "crash source presyncd"},
    {Fault::kCrashTarget, "crash target presyncd"},
    {Fault::kCrashBoth, "crash both presyncds"},
    {Fault::kStopSource, "stop source presyncd"},
    {Fault::kStopTarget, "stop target presyncd"},
    {Fault::kKillSourceQemu, "kill source QEMU"},
    {Fault::kKillTargetQemu, "kill target QEMU"},
    {Fault::kEndTargetQemu, "target QEMU ends in order"},
    {Fault::kLinkDown, "link down"},
    {Fault::kLinkFlaps, "link flaps"},
    {Fault::kLinkReset, "connections reset"},
    {Fault::kLinkSilent, "link silent"},
    {Fault::kLinkFails, "page link fails"},
    {Fault::kControlTruncated, "control truncated"},
    {Fault::kControlDuplicated, "control duplicated"},
    {Fault::kControlCorrupted, "control corrupted"},
    {Fault::kControlDelayed, "control delayed"},
    {Fault::kNoRoom, "no room at target"},
    {Fault::kSlowReads, "slow reads"},
    {Fault::kReadHangs, "a read hangs"},
    {Fault::kSourceMonitorErrs, "source QMP errs"},
    {Fault::kSourceMonitorCloses, "source QMP closes"},
    {Fault::kSourceMonitorStalls, "source QMP stalls"},
    {Fault::kTargetMonitorErrs, "target QMP errs"},
    {Fault::kTargetMonitorCloses, "target QMP closes"},
    {Fault::kTargetMonitorStalls, "target QMP stalls"},
    {Fault::kContSource, "cont at the source"},
    {Fault::kContTarget, "cont at the waiting QEMU"},
    {Fault::kPauseTarget, "pause at the target"},
    {Fault::kQuitTarget, "quit at the target"},
    {Fault::kMigrateAway, "QEMU's own migration"},
    {Fault::kService, "a service restarts QEMU"},
    {Fault::kSettleRight, "settle, right"},
    {Fault::kSettleWrong, "settle, wrong, with --force"},
}};

// The protocol's messages from the sync to the end, and the calls that reach the guests.
const std::vector<std::string>& MessageSteps() {
  static const std::vector<std::string> steps = {
      "hello",          "open_session", "session_opened",
      "open_link",      "link_offer",   "link_ready",
      "ping",           "pong",         "begin_handover",
      "handover_ready", "state_chunk",  "load",
      "loaded",         "run",          "running",
      "outcome",        "hash_reply",   "abort_handover"};
  return steps;
}
const std::vector<std::string>& GuestSteps() {
  static const std::vector<std::string> steps = {
      "source prepare-save", "source begin-save", "source stop",       "source finish-save",
      "source resume",       "source quit",       "target begin-load", "target await-loaded",
      "target run",          "target discard"};
  return steps;
}

bool IsControl(Fault fault) {
  return fault == Fault::kControlTruncated || fault == Fault::kControlDuplicated ||
         fault == Fault::kControlCorrupted || fault == Fault::kControlDelayed;
}

Strike DrawStrike(Fault fault, std::mt19937_64* random) {
  auto& rng = *random;
  Strike strike = {.fault = fault, .step = "", .before = rng() % 2 == 0};
  const uint64_t where = rng() % 10;
  if (IsControl(fault)) {
    strike.step = MessageSteps()[rng() % MessageSteps().size()];
    strike.before = true;
  } else if (where < 4) {
    strike.step = MessageSteps()[rng() % MessageSteps().size()];
  } else if (where < 7) {
    strike.step = GuestSteps()[rng() % GuestSteps().size()];
  } else {
    strike.in_sync = where == 7;
    strike.at = absl::Microseconds(rng() % 30'000);
  }
  if (fault == Fault::kNoRoom) strike.step = rng() % 2 == 0 ? "hello" : "open_session";
  if (fault == Fault::kSlowReads || fault == Fault::kReadHangs) {
    strike.step = "";
    strike.in_sync = fault == Fault::kSlowReads || rng() % 2 == 0;
    strike.at = absl::Microseconds(rng() % 30'000);
  }
  // Up to twice the time that a handover may take here.
  strike.lasts = absl::Milliseconds(5 + rng() % (rng() % 4 == 0 ? 800 : 120));
  return strike;
}

}  // namespace

const std::vector<Fault>& AllFaults() {
  static const std::vector<Fault>* const all = [] {
    auto* faults = new std::vector<Fault>;
    for (const auto& [fault, name] : kNames) {
      if (fault < Fault::kContSource) faults->push_back(fault);
    }
    return faults;
  }();
  return *all;
}

const std::vector<Fault>& AllActors() {
  static const std::vector<Fault>* const all = [] {
    auto* actors = new std::vector<Fault>;
    for (const auto& [fault, name] : kNames) {
      if (fault >= Fault::kContSource) actors->push_back(fault);
    }
    return actors;
  }();
  return *all;
}

const char* FaultName(Fault fault) {
  for (const auto& [value, name] : kNames) {
    if (value == fault) return name;
  }
  return "?";
}

// Where it matters what somebody does: from the moment on that the guest's state is saved.
Strike DrawActor(Fault actor, std::mt19937_64* random) {
  static const std::vector<std::string> steps = {
      "source finish-save",  "load",       "loaded",     "run", "running",
      "target await-loaded", "target run", "source quit"};
  auto& rng = *random;
  Strike strike = {.fault = actor, .step = "", .before = rng() % 2 == 0};
  if (actor == Fault::kService) {
    strike.in_sync = true;
  } else if (rng() % 4 != 0 && actor != Fault::kMigrateAway) {
    strike.step = steps[rng() % steps.size()];
  } else {
    strike.in_sync = rng() % 3 == 0;
    strike.at = absl::Microseconds(rng() % 40'000);
  }
  strike.lasts = absl::Milliseconds(rng() % 200);  // until a person has typed
  return strike;
}

Plan DrawPlan(uint64_t campaign_seed, uint64_t run, bool actors) {
  std::seed_seq mixed = {campaign_seed, campaign_seed >> 32, run, run >> 32};
  std::mt19937_64 rng(mixed);
  Plan plan = {.seed = rng(), .strikes = {}, .verify = rng() % 2 == 0};
  plan.strikes.push_back(DrawStrike(AllFaults()[run % AllFaults().size()], &rng));
  if (rng() % 4 == 0 && plan.strikes[0].fault != Fault::kNone) {
    plan.strikes.push_back(DrawStrike(AllFaults()[1 + rng() % (AllFaults().size() - 1)], &rng));
  }
  if (!actors) return plan;
  const std::vector<Fault>& all = AllActors();
  plan.strikes.insert(plan.strikes.begin(),
                      DrawActor(all[run / AllFaults().size() % all.size()], &rng));
  if (rng() % 2 == 0) plan.strikes.push_back(DrawActor(all[rng() % all.size()], &rng));
  return plan;
}

std::string Where(const Strike& strike) {
  if (strike.fault == Fault::kNone) return "nowhere";
  if (strike.step.empty()) return strike.in_sync ? "in the sync" : "in the launch";
  return absl::StrCat(strike.before ? "before " : "after ", strike.step);
}

std::string PlanText(const Plan& plan) {
  std::string text;
  for (const Strike& strike : plan.strikes) {
    absl::StrAppend(&text, text.empty() ? "" : "; ", FaultName(strike.fault));
    if (strike.fault == Fault::kNone) continue;
    if (!strike.step.empty()) {
      absl::StrAppend(&text, strike.before ? " before " : " after ", strike.step);
    } else {
      absl::StrAppend(&text, " ", absl::FormatDuration(strike.at), " into the ",
                      strike.in_sync ? "sync" : "launch");
    }
    absl::StrAppend(&text, " (", absl::FormatDuration(strike.lasts), ")");
  }
  return text;
}

}  // namespace presync
