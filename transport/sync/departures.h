// Guests that left this host: so that whoever started one's QEMU here (a service that restarts it,
// libvirt's autostart, a reboot) does not start it again while it runs elsewhere.
//
// A file NAME.SESSION.left in presyncd's state folder, one a guest: one block of a handover record
// (handover_record.h). It goes when presync brings the guest back, or a person says so.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "transport/sync/handover_record.h"

namespace presync {

// Notes that the guest of such a record has left, in place of any earlier departure of it. Durable
// on return. UNAVAILABLE: the file system's own words; then an earlier one may be there.
absl::Status NoteDeparture(const std::string& folder, const HandoverEntry& entry);

// Where the note of such a guest lies.
std::string DeparturePath(const std::string& folder, const HandoverEntry& entry);

// The guest is here again, or a person says that it may be started. Ok if there is no note.
absl::Status ForgetDeparture(const std::string& folder, const std::string& guest);

// All of them; files that can't be read are named in `*unreadable`.
std::vector<HandoverEntry> ReadDepartures(const std::string& folder,
                                          std::vector<std::string>* unreadable);

// Whether a guest may be started on this host, as far as its records tell: FAILED_PRECONDITION if
// it left, or was given up, or something about it can't be read; the text says what to do.
absl::Status CheckMayStart(const std::string& folder, const std::string& guest);

}  // namespace presync
