// A comparison while the guest runs, with a target that answers what it likes, and guest, link and
// dirty log in any order. Required: it comes to its end, or to an error; what it counts fits; and
// as long as the target's answers were honest, both memories are equal once everything stale was
// sent.
//
// An input: flags (1: prove an older copy, else verify; 2: end with honest answers), pages of a
// piece, then steps: 0 a step, 1 the honest answer, 2 a chunk as the answer, 3 the guest writes a
// page, 4 the sync goes on, 5 an answer with the right id and so many bytes.
#include <optional>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz_input.h"
#include "tests/transport/sync/model_guest.h"
#include "transport/fake/fake_link.h"
#include "transport/sync/live_comparison.h"

namespace presync {
namespace {

using Goal = LiveComparison::Goal;

const std::vector<PageCount> kRegions = {40, 24};
constexpr PageCount kPages = 64;

class Run {
 public:
  Run(bool prove, PageCount piece_pages) : log_(source_.MakeLog()) {
    for (PageIndex page = 0; page < kPages; page += 3) {
      source_.Write(page, page + 1);
      if (prove && page % 2 == 0) target_.Write(page, page + 1);
    }
    SourceSyncOptions options;
    options.now = [this] { return now_; };
    sync_ = SourceSync::Create(&source_.memory(), log_.get(), options).value();
    FakeLinkOptions link;
    link.now = [this] { return now_; };
    link.wait_until = [this](absl::Time until) { now_ = std::max(now_, until); };
    link_ = FakeLink::Create(&source_.memory(), &target_.memory(), link).value();
    using Content = SourceSync::TargetContent;
    sync_->AttachLink(link_.source.get(), prove ? Content::kUnproven : Content::kZero);
    if (!prove) FUZZ_REQUIRE(sync_->Flush(now_ + absl::Seconds(60)).ok());
    comparison_.emplace(&source_.memory(), sync_.get(), prove ? Goal::kProve : Goal::kVerify,
                        PageRun{0, kPages}, piece_pages, &last_id_);
  }
  ~Run() { sync_->DetachLink(); }

  bool Step() {
    return comparison_
        ->Step([this](const wire::ControlMessage& message) {
          asked_ = message.hash_request();
          return absl::OkStatus();
        })
        .ok();
  }

  bool Answer(const wire::HashReply& reply, bool honest) {
    const bool counts = asked_ && reply.id() == asked_->id();
    const bool taken = comparison_->OnReply(reply).ok();
    if (counts) {
      honest_ = honest_ && (honest || !taken);
      asked_.reset();
    }
    return taken;
  }

  bool AnswerHonestly() {
    if (!asked_) return true;
    const HashPlan plan = {.run = {asked_->first_page(), asked_->pages()},
                           .pages_per_hash = asked_->pages_per_hash(),
                           .only = {asked_->only().begin(), asked_->only().end()}};
    wire::HashReply reply;
    reply.set_id(asked_->id());
    reply.set_first_page(asked_->first_page());
    reply.set_hashes(HashPages(target_.memory(), plan).value());
    const bool taken = Answer(reply, true);
    FUZZ_REQUIRE(taken);
    return true;
  }

  bool AnswerRaw(std::string_view bytes) {
    wire::HashReply reply;
    if (!reply.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return true;
    return Answer(reply, false);
  }

  bool AnswerBytes(std::string_view bytes) {
    wire::HashReply reply;
    if (asked_) {
      reply.set_id(asked_->id());
      reply.set_first_page(asked_->first_page());
    }
    reply.set_hashes(std::string(bytes));
    return Answer(reply, false);
  }

  void GuestWrites(uint8_t page, uint8_t value) { source_.Write(page % kPages, value); }
  bool GoOn() {
    now_ += absl::Milliseconds(30);
    return sync_->Tick().ok();
  }

  void ComeToAnEnd() {
    for (int i = 0; i < 10'000 && !comparison_->done(); ++i) {
      FUZZ_REQUIRE(Step());
      AnswerHonestly();
      FUZZ_REQUIRE(GoOn());
    }
    FUZZ_REQUIRE(comparison_->done());
    const ComparisonReport& report = comparison_->report();
    FUZZ_REQUIRE(report.compared + report.aside == kPages && report.differing <= report.compared);
    sync_->set_proven();
    FUZZ_REQUIRE(sync_->Scan().ok() && sync_->Flush(now_ + absl::Seconds(60)).ok());
    FUZZ_REQUIRE(!honest_ || source_.scratch().Differences(target_.scratch()).empty());
  }

 private:
  absl::Time now_ = absl::UnixEpoch() + absl::Hours(1);
  ModelMemory source_{kRegions}, target_{kRegions};
  std::unique_ptr<DirtyLog> log_;
  std::unique_ptr<SourceSync> sync_;
  FakeLink link_;
  uint32_t last_id_ = 0;
  std::optional<LiveComparison> comparison_;
  std::optional<wire::HashRequest> asked_;
  bool honest_ = true;
};

bool TakeStep(fuzz::FuzzInput* input, Run* run) {
  switch (input->Byte() % 6) {
    case 0:
      return run->Step();
    case 1:
      return run->AnswerHonestly();
    case 2:
      return run->AnswerRaw(input->Chunk());
    case 3: {
      const uint8_t page = input->Byte();
      run->GuestWrites(page, input->Byte());
      return true;
    }
    case 4:
      return run->GoOn();
    default:
      return run->AnswerBytes(input->Chunk());
  }
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  presync::fuzz::FuzzInput input(data, size);
  const uint8_t flags = input.Byte();
  presync::Run run((flags & 1) != 0, 1u + input.Byte() % 64);
  while (!input.empty()) {
    if (!presync::TakeStep(&input, &run)) return 0;
  }
  if ((flags & 2) != 0) run.ComeToAnEnd();
  return 0;
}
