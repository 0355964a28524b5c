#include "transport/sync/settlement.h"

#include "absl/strings/str_cat.h"
#include "transport/printable.h"
#include "transport/sync/conversation.h"
#include "transport/sync/handover_record.h"

namespace presync {

std::string SettleCommand(const std::string& guest, const std::string& how) {
  return absl::StrCat("presync settle ", guest, " ", how);
}

std::string LookAndSettle(const std::string& guest, const std::string& peer) {
  return absl::StrCat(
      "look at ", peer, " whether ", guest,
      " runs there. If it does, there or wherever it moved on to: ", SettleCommand(guest, "there"),
      ". If it certainly does not, and never will: ", SettleCommand(guest, "here"));
}

bool RanUntold(const wire::Outcome& outcome) {
  return outcome.value() == wire::Outcome::RUNNING ||
         outcome.phase() == PhaseName(HandoverPhase::kRanUntold);
}

std::string SayThereWhoGoesOn(const std::string& guest) {
  return absl::StrCat("look there which of the two is to go on, and say so there. The one there: ",
                      SettleCommand(guest, "ran"), ". The one here, if the other has ended: ",
                      SettleCommand(guest, "never-ran"));
}

absl::Status CheckWord(const std::string& guest, const std::string& peer, const Word& word,
                       const absl::StatusOr<wire::Outcome>& outcome) {
  if (word.force || !outcome.ok()) return absl::OkStatus();
  const std::string says = absl::StrCat(peer, " answers: ", PrintableText(outcome->text()));
  if (word.decision == Decision::kRunsThere) {
    if (outcome->value() != wire::Outcome::NEVER_RAN) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat(
        guest, " does not run there: ", says,
        ". It goes on here by itself in a moment. With --force its QEMU here, which holds the only "
        "copy that ",
        peer, " knows of, is ended"));
  }
  const bool may_run = outcome->value() == wire::Outcome::RUNNING ||
                       (outcome->value() == wire::Outcome::UNKNOWN && !outcome->phase().empty());
  if (!may_run) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(guest, " runs there, or may: ", says,
                   ". With --force it goes on here all the same, and if it runs there two of it "
                   "run, on the same "
                   "disks: end it there first"));
}

}  // namespace presync
