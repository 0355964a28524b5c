#include "transport/sync/source_handover.h"

#include <algorithm>
#include <future>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "transport/sync/conversation.h"
#include "transport/sync/guest_switchover.h"
#include "transport/sync/page_hash.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

// Ranges of 256 KiB keep the hashes of 1 GiB within 64 KiB; the pages are told apart only where
// ranges differ.
constexpr PageCount kPagesPerHash = 64;
// One request's hashes fit a control frame with room to spare.
constexpr PageCount kPagesPerHashRequest = kPagesPerHash * 32768;

// How long a round waits for the link before it goes on: while there is much to send, and once it
// only waits for the guest to stop and looks what was written meanwhile.
constexpr absl::Duration kBusyStep = absl::Milliseconds(1);
constexpr absl::Duration kRoundStep = absl::Milliseconds(4);

class Handover {
 public:
  Handover(ControlChannel* channel, SourceSync* sync, SourceGuest* guest, const GuestMemory& memory,
           HandoverRecord* record, const HandoverOptions& options)
      : channel_(channel),
        sync_(sync),
        guest_(guest),
        memory_(memory),
        record_(record),
        options_(options),
        start_(absl::Now()) {}

  HandoverEnd Run();

 private:
  absl::Status BeforeGivingUp();
  absl::Status Rounds(GuestSwitchover* guest);
  absl::Status Drain();
  void StartHashing();
  absl::Status Verify(bool written_since_stop);
  absl::Status CountDiffering(const std::vector<PageRun>& ranges);
  absl::StatusOr<std::string> TakeHashes(PageRun run, PageCount pages_per_hash);
  absl::StatusOr<std::vector<PageRun>> CompareHashes(PageRun run, PageCount pages_per_hash,
                                                     absl::FunctionRef<absl::Status()> meanwhile);
  absl::Status OrderLoad();
  absl::Status AwaitLoaded();
  absl::Status LoadOnTarget();
  HandoverEnd AfterGivingUp();
  HandoverEnd CallOff(absl::Status why);
  HandoverEnd End(HandoverResult result, absl::Status why) {
    return {.result = result, .why = std::move(why), .report = report_};
  }

  absl::Status SendBody(const Body& message) { return channel_->Send(message, deadline_); }
  void Mark(absl::string_view step) {
    report_.steps.emplace_back(std::string(step), absl::Now() - start_);
  }

  ControlChannel* const channel_;
  SourceSync* const sync_;
  SourceGuest* const guest_;
  const GuestMemory& memory_;
  HandoverRecord* const record_;
  const HandoverOptions options_;
  const absl::Time start_;
  absl::Time stopped_at_;
  absl::Time deadline_;
  bool loaded_ = false;
  std::future<absl::StatusOr<std::string>> hashing_;
  HandoverReport report_;
};

HandoverEnd Handover::Run() {
  deadline_ = start_ + options_.rounds_timeout;
  const uint64_t wire_bytes_before = sync_->progress().wire_bytes;
  if (absl::Status s = BeforeGivingUp(); !s.ok()) return CallOff(std::move(s));
  report_.wire_bytes = sync_->progress().wire_bytes - wire_bytes_before;

  // From here on the guest is the target's, unless the target says that it never ran it. An append
  // that failed may be on disk all the same, but the target was not told: the guest is still ours.
  if (absl::Status s = record_->Append(HandoverPhase::kGivenUp); !s.ok()) {
    return CallOff(std::move(s));
  }
  Mark("given up");
  return AfterGivingUp();
}

absl::Status Handover::BeforeGivingUp() {
  Body begin;
  begin.mutable_begin_handover();
  if (absl::Status s = SendBody(begin); !s.ok()) return s;
  {
    GuestSwitchover guest(guest_, channel_, deadline_, options_.switchover_timeout);
    if (absl::Status s = Rounds(&guest); !s.ok()) return s;
    if (!guest.stopped_at()) return guest.Finish().status();
    stopped_at_ = *guest.stopped_at();
    deadline_ = absl::Now() + options_.switchover_timeout;
    Mark("stopped");
    StartHashing();
    // The residual travels while the device state is saved.
    const absl::Status drained = Drain();
    absl::StatusOr<uint64_t> state_bytes = guest.Finish();
    if (!state_bytes.ok()) return state_bytes.status();
    if (!drained.ok()) return drained;
    report_.state_bytes = *state_bytes;
    Mark("state saved");
  }
  // Device code may have written guest RAM while its state was saved.
  const uint64_t writes_before = sync_->progress().write_faults;
  if (absl::Status s = sync_->Scan(); !s.ok()) return s;
  const bool written = sync_->progress().write_faults != writes_before;
  if (absl::Status s = sync_->Flush(deadline_); !s.ok()) return s;
  Mark("last scan");
  if (!options_.verify) return LoadOnTarget();
  // The target hashes its memory while it loads the device state.
  return Verify(written);
}

// Sends what is stale, again and again, while the guest runs. The guest is told to stop when little
// enough is left or another round would not make it less; sending goes on until it stands still.
absl::Status Handover::Rounds(GuestSwitchover* guest) {
  if (absl::Status s = sync_->Scan(); !s.ok()) return s;
  report_.residual_at_launch = sync_->residual();
  const uint64_t free_bytes =
      static_cast<uint64_t>(static_cast<double>(sync_->link_bytes_per_s()) *
                            absl::ToDoubleSeconds(options_.overlapped_transfer));
  const auto little = [&] { return PagesToBytes(sync_->unsent()) <= free_bytes; };
  PageCount before = UINT32_MAX;
  bool ready = false;
  bool gone = false;
  while (!guest->stopped()) {
    if (absl::Now() >= deadline_) {
      return absl::DeadlineExceededError("the memory could not be sent in time");
    }
    if (absl::Status s = sync_->PushAll(); !s.ok()) return s;
    if (little()) {  // what was known is nearly out: look again
      if (absl::Status s = sync_->Scan(); !s.ok()) return s;
      if (absl::Status s = sync_->PushAll(); !s.ok()) return s;
      ++report_.rounds;
      if (!ready) {
        if (auto r = Expect(channel_, Body::kHandoverReady, deadline_); !r.ok()) return r.status();
        ready = true;
        Mark("target ready");
      }
      const PageCount unsent = sync_->unsent();
      if (little() || unsent >= before - before / 4) {
        if (!gone) Mark("told to stop");
        gone = true;
        guest->Go();
      }
      before = unsent;
    }
    const absl::Duration step = ready ? kRoundStep : kBusyStep;
    if (absl::Status s = sync_->AwaitLink(absl::Now() + step); !s.ok()) return s;
  }
  return absl::OkStatus();
}

// The guest stands still: whatever is left goes over, and is confirmed.
absl::Status Handover::Drain() {
  if (absl::Status s = sync_->Scan(); !s.ok()) return s;
  report_.residual_at_stop = sync_->residual();
  if (absl::Status s = sync_->PushAll(); !s.ok()) return s;
  if (absl::Status s = sync_->FindDiscarded(); !s.ok()) return s;
  if (absl::Status s = sync_->Flush(deadline_); !s.ok()) return s;
  Mark("residual confirmed");
  return absl::OkStatus();
}

// The target answers requests in their order, but Loaded may come between.
absl::StatusOr<std::string> Handover::TakeHashes(PageRun run, PageCount pages_per_hash) {
  while (true) {
    absl::StatusOr<Body> reply = channel_->Receive(deadline_);
    if (!reply.ok()) return reply.status();
    if (IsAside(*reply)) continue;
    switch (reply->body_case()) {
      case Body::kRefused:
        return RefusedStatus(reply->refused(), channel_->peer());
      case Body::kLoaded:
        loaded_ = true;
        Mark("loaded on target");
        continue;
      default:
        break;
    }
    const size_t ranges = (size_t{run.count} + pages_per_hash - 1) / pages_per_hash;
    if (reply->hash_reply().first_page() != run.first ||
        reply->hash_reply().hashes().size() != ranges * kHashBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat(channel_->peer(), " answered with other hashes than it was asked for"));
    }
    return reply->hash_reply().hashes();
  }
}

// Both sides hash at the same time. `meanwhile` runs once the target was asked.
absl::StatusOr<std::vector<PageRun>> Handover::CompareHashes(
    PageRun run, PageCount pages_per_hash, absl::FunctionRef<absl::Status()> meanwhile) {
  Body request;
  request.mutable_hash_request()->set_first_page(run.first);
  request.mutable_hash_request()->set_pages(run.count);
  request.mutable_hash_request()->set_pages_per_hash(pages_per_hash);
  if (absl::Status s = SendBody(request); !s.ok()) return s;
  if (absl::Status s = meanwhile(); !s.ok()) return s;
  const absl::StatusOr<std::string> mine =
      hashing_.valid() ? hashing_.get() : HashPages(memory_, run, pages_per_hash);
  if (!mine.ok()) return mine.status();
  Mark("hashed here");
  const absl::StatusOr<std::string> theirs = TakeHashes(run, pages_per_hash);
  if (!theirs.ok()) return theirs.status();
  return DifferingRanges(run, pages_per_hash, *mine, *theirs);
}

// The memory stands still from the stop on, but for what device code may write: hashing it while
// the residual travels costs no time. For a guest that one request covers.
void Handover::StartHashing() {
  if (!options_.verify || memory_.pages() > kPagesPerHashRequest) return;
  hashing_ = std::async(std::launch::async, [this] {
    return HashPages(memory_, {0, memory_.pages()}, kPagesPerHash);
  });
}

// Compares all memory; has the target load the device state while it hashes the last part.
absl::Status Handover::Verify(bool written_since_stop) {
  if (written_since_stop && hashing_.valid()) (void)hashing_.get();  // outdated
  std::vector<PageRun> differing;
  for (PageIndex first = 0; first < memory_.pages(); first += kPagesPerHashRequest) {
    const PageRun run = {first, std::min(kPagesPerHashRequest, memory_.pages() - first)};
    const bool last = run.end() == memory_.pages();
    absl::StatusOr<std::vector<PageRun>> ranges =
        CompareHashes(run, kPagesPerHash, [&] { return last ? OrderLoad() : absl::OkStatus(); });
    if (!ranges.ok()) return ranges.status();
    differing.insert(differing.end(), ranges->begin(), ranges->end());
    report_.pages_compared += run.count;
  }
  Mark("compared");
  if (absl::Status s = AwaitLoaded(); !s.ok()) return s;
  return differing.empty() ? absl::OkStatus() : CountDiffering(differing);
}

absl::Status Handover::CountDiffering(const std::vector<PageRun>& ranges) {
  std::string first_pages;
  for (const PageRun& range : ranges) {
    absl::StatusOr<std::vector<PageRun>> pages =
        CompareHashes(range, /*pages_per_hash=*/1, [] { return absl::OkStatus(); });
    if (!pages.ok()) return pages.status();
    for (const PageRun& page : *pages) {
      if (++report_.pages_differing <= 8) absl::StrAppend(&first_pages, " ", page.first);
    }
  }
  return absl::DataLossError(absl::StrCat(
      report_.pages_differing, " pages differ on the target (first:", first_pages,
      "): something writes guest memory that dirty tracking does not see, or presync is at fault; "
      "the guest stays here. Keep the logs of both presyncd and report it"));
}

absl::Status Handover::OrderLoad() {
  Body load;
  load.mutable_load()->set_state_bytes(report_.state_bytes);
  return SendBody(load);
}

absl::Status Handover::AwaitLoaded() {
  if (loaded_) return absl::OkStatus();
  absl::StatusOr<Body> loaded = Expect(channel_, Body::kLoaded, deadline_);
  if (!loaded.ok()) return loaded.status();
  loaded_ = true;
  Mark("loaded on target");
  return absl::OkStatus();
}

absl::Status Handover::LoadOnTarget() {
  if (absl::Status s = OrderLoad(); !s.ok()) return s;
  return AwaitLoaded();
}

HandoverEnd Handover::AfterGivingUp() {
  deadline_ = absl::Now() + options_.switchover_timeout;
  Body run;
  run.mutable_run();
  absl::Status sent = SendBody(run);
  if (!sent.ok()) return End(HandoverResult::kInDoubt, std::move(sent));
  absl::StatusOr<Body> answer = channel_->Receive(deadline_);
  while (answer.ok() && IsAside(*answer)) answer = channel_->Receive(deadline_);
  if (!answer.ok()) return End(HandoverResult::kInDoubt, answer.status());

  const bool never_ran = answer->body_case() == Body::kOutcome &&
                         answer->outcome().value() == wire::Outcome::NEVER_RAN;
  if (never_ran) {
    record_->Append(HandoverPhase::kTakenBack).IgnoreError();  // without it, recovery asks again
    return CallOff(absl::AbortedError(absl::StrCat(
        channel_->peer(), " could not run the guest: ", PrintableText(answer->outcome().text()))));
  }
  if (answer->body_case() != Body::kRunning) {
    return End(
        HandoverResult::kInDoubt,
        absl::InvalidArgumentError(absl::StrCat(
            channel_->peer(), " answered the order to run with message ", answer->body_case())));
  }
  report_.launch = absl::Now() - start_;
  report_.downtime = absl::Now() - stopped_at_;
  Mark("running on target");
  return End(HandoverResult::kMoved, absl::OkStatus());
}

// Gives the guest back to its vCPUs first, then tells the target.
HandoverEnd Handover::CallOff(absl::Status why) {
  const absl::Status resumed = guest_->Resume(absl::Now() + absl::Seconds(30));
  Mark("called off");
  if (!resumed.ok()) {
    why = absl::Status(why.code(), absl::StrCat(why.message(),
                                                "; and then the guest could not be "
                                                "resumed here: ",
                                                resumed.message()));
  }
  Body abort;
  abort.mutable_abort_handover()->set_reason(std::string(why.message()));
  channel_->Send(abort, absl::Now() + absl::Seconds(1)).IgnoreError();
  return End(resumed.ok() ? HandoverResult::kHere : HandoverResult::kStuck, std::move(why));
}

}  // namespace

HandoverEnd RunSourceHandover(ControlChannel* channel, SourceSync* sync, SourceGuest* guest,
                              const GuestMemory& memory, HandoverRecord* record,
                              const HandoverOptions& options) {
  return Handover(channel, sync, guest, memory, record, options).Run();
}

}  // namespace presync
