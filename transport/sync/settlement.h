// What a person says about a guest whose fate is open, and whether that fits what the other host
// says: for sessions in doubt and for recovery alike.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transport/wire/control.pb.h"

namespace presync {

// What a person found out (`presync settle`). Of a guest that was given up here:
enum class Decision {
  kRunsHere,   // it certainly does not run on the other host: it goes on here
  kRunsThere,  // it runs there, or wherever it moved on to: it must not run here
  kForget,     // the QEMU that stands at its address is another guest's
  // Of a guest that came here:
  kRan,       // it runs here, or did: its source must not go on with its copy
  kNeverRan,  // it never ran here and never will: its source may
};

struct Word {
  Decision decision = Decision::kRunsHere;
  bool force = false;  // although the other host says otherwise
};

// "presync settle web1 there".
std::string SettleCommand(const std::string& guest, const std::string& how);

// A guest whose process its source could not run again: its disks may be locked because it runs at
// the target, where somebody ran it by hand. Once they are free, what the source has of it is old.
// Whether the target's answer says so, and what a person has to do then.
bool RanUntold(const wire::Outcome& outcome);
std::string SayThereWhoGoesOn(const std::string& guest);

// Where only a person can know where a guest that was given up to `peer` runs: what to look at, and
// what to type.
std::string LookAndSettle(const std::string& guest, const std::string& peer);

// Whether a word about a guest that was given up to `peer` may be acted upon, as far as the target
// knows. `outcome` is its answer, or why there is none: then the word counts. FAILED_PRECONDITION:
// the target knows better; the text says what --force would do.
absl::Status CheckWord(const std::string& guest, const std::string& peer, const Word& word,
                       const absl::StatusOr<wire::Outcome>& outcome);

}  // namespace presync
