// What presyncd finds in its folders when it starts: handover records, measured costs, and notes of
// copies, of syncs and of QEMUs. The first byte says which, and for those with checksums whether
// these are made right, so that what lies behind them is reached.
#include <xxhash.h>

#include <cstdio>
#include <fstream>

#include "absl/strings/str_format.h"
#include "qemu-glue/copy_note.h"
#include "qemu-glue/guest_notes.h"
#include "tests/fuzz/fuzz_input.h"
#include "tools/presyncd/fixed_costs.h"
#include "tools/presyncd/sync_note.h"
#include "transport/sync/handover_record.h"

namespace presync {
namespace {

constexpr size_t kBlockBytes = 4096;
constexpr size_t kTextBytes = kBlockBytes - 17;

// Each piece becomes a block: padded, and with its checksum.
std::string BlocksOf(fuzz::FuzzInput* input) {
  std::string file;
  while (!input->empty() && file.size() < 8 * kBlockBytes) {
    std::string text(input->Chunk().substr(0, kTextBytes));
    text.resize(kTextBytes, ' ');
    absl::StrAppendFormat(&text, "%016x\n", XXH3_64bits(text.data(), text.size()));
    file += text;
  }
  return file;
}

void WriteFile(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

// A record is read, and then gone on with: the new entry has to be the one that counts.
void TryRecord(const std::string& bytes) {
  const absl::StatusOr<HandoverEntry> parsed = HandoverRecord::Parse(bytes);
  HandoverEntry mine;
  mine.role = HandoverRole::kTarget;
  mine.guest = parsed.ok() ? parsed->guest : "g";
  mine.session = parsed.ok() ? parsed->session : SessionId{1};
  const std::string& folder = fuzz::ScratchFolder();
  absl::StatusOr<HandoverRecord> record = HandoverRecord::Reserve(folder, mine);
  FUZZ_REQUIRE(record.ok());
  const std::string path = record->path();
  WriteFile(path, bytes);

  std::vector<std::string> unreadable;
  const std::vector<HandoverEntry> all = HandoverRecord::ReadAll(folder, &unreadable);
  FUZZ_REQUIRE(all.size() == (parsed.ok() ? 1 : 0));
  record = HandoverRecord::Reserve(folder, mine);
  FUZZ_REQUIRE(record.ok());
  if (record->Append(HandoverPhase::kToldToRun).ok()) {
    const std::vector<HandoverEntry> after = HandoverRecord::ReadAll(folder, &unreadable);
    FUZZ_REQUIRE(after.size() == 1 && after[0].phase == HandoverPhase::kToldToRun);
    FUZZ_REQUIRE(after[0].session == mine.session);
  }
  HandoverRecord::RemoveUnused(folder);
  ::remove(path.c_str());
}

void TryCosts(std::string_view bytes) {
  const std::string path = fuzz::ScratchFolder() + "/fixed-costs.json";
  WriteFile(path, bytes);
  FixedCosts costs(path);
  const absl::Duration expected = absl::Milliseconds(45);
  FUZZ_REQUIRE(costs.For("peer", expected) > absl::ZeroDuration());
  costs.Learn("peer", absl::Milliseconds(40));
  FUZZ_REQUIRE(FixedCosts(path).For("peer", expected) > absl::ZeroDuration());
  ::remove(path.c_str());
}

void TryCopyNote(std::string_view bytes) {
  const std::string path = fuzz::ScratchFolder() + "/g.copy";
  WriteFile(path, bytes);
  const std::vector<CopyNote> notes = ReadCopyNotes(fuzz::ScratchFolder());
  FUZZ_REQUIRE(notes.size() <= 1);
  if (!notes.empty()) {
    const CopyNote& note = notes[0];
    FUZZ_REQUIRE(note.path == path && note.holder_pid > 0 && !note.files.empty());
    FUZZ_REQUIRE(WriteCopyNote(path, note.owner, note.files).ok());
    const std::vector<CopyNote> again = ReadCopyNotes(fuzz::ScratchFolder());
    FUZZ_REQUIRE(again.size() == 1 && again[0].owner.session == note.owner.session);
    FUZZ_REQUIRE(again[0].files.size() == note.files.size());
  }
  ::remove(path.c_str());
}

// What is taken for a note says all that a later presyncd needs, and is the same when it is written
// again.
void TrySyncNote(const std::string& bytes) {
  const absl::StatusOr<SyncNote> note = ParseSyncNote(bytes);
  SyncNotes notes(fuzz::ScratchFolder());
  const std::string path = notes.PathOf(note.ok() ? note->guest : "g");
  WriteFile(path, bytes);
  std::vector<std::string> unreadable;
  const std::vector<SyncNote> all = notes.ReadAll(&unreadable);
  FUZZ_REQUIRE(all.size() + unreadable.size() <= 1 && (note.ok() || all.empty()));
  if (!all.empty()) {
    FUZZ_REQUIRE(all[0].qemu.known() && all[0].order.contains("to"));
    FUZZ_REQUIRE(SyncOrder(all[0].order) == all[0].order);
    if (notes.Write(all[0]).ok()) {
      const std::vector<SyncNote> again = notes.ReadAll(&unreadable);
      FUZZ_REQUIRE(again.size() == 1 && again[0].guest == all[0].guest);
      FUZZ_REQUIRE(again[0].order == all[0].order && again[0].qemu.pid == all[0].qemu.pid);
    }
    FUZZ_REQUIRE(notes.Remove(all[0].guest).ok());
  }
  ::remove(path.c_str());
}

// A note that is taken names a process, and says the same when it is written again.
void TryGuestNote(std::string_view bytes) {
  const std::string path = fuzz::ScratchFolder() + "/g.guest";
  WriteFile(path, bytes);
  const std::vector<GuestNote> notes = ReadGuestNotes(fuzz::ScratchFolder());
  FUZZ_REQUIRE(notes.size() <= 1);
  if (!notes.empty()) {
    FUZZ_REQUIRE(notes[0].guest == "g" && notes[0].pid > 0);
    (void)IsAlive(notes[0]);
    FUZZ_REQUIRE(WriteGuestNote(fuzz::ScratchFolder(), notes[0]).ok());
    const std::vector<GuestNote> again = ReadGuestNotes(fuzz::ScratchFolder());
    FUZZ_REQUIRE(again.size() == 1 && again[0].pid == notes[0].pid);
    FUZZ_REQUIRE(again[0].qmp == notes[0].qmp && again[0].regions == notes[0].regions);
  }
  ::remove(path.c_str());
}

std::string WithChecksum(std::string_view text) {
  std::string line(text.substr(0, text.find('\n')));
  line += "\n";
  return line + absl::StrFormat("%016x\n", XXH3_64bits(line.data(), line.size()));
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  presync::fuzz::FuzzInput input(data, size);
  switch (input.Byte() % 7) {
    case 0:
      presync::TryRecord(std::string(input.rest()));
      break;
    case 1:
      presync::TryRecord(presync::BlocksOf(&input));
      break;
    case 2:
      presync::TryCosts(input.rest());
      break;
    case 3:
      presync::TryCopyNote(input.rest());
      break;
    case 4:
      presync::TrySyncNote(std::string(input.rest()));
      break;
    case 5:
      presync::TrySyncNote(presync::WithChecksum(input.rest()));
      break;
    default:
      presync::TryGuestNote(input.rest());
  }
  return 0;
}
