#include "transport/sync/handover_record.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace presync {
namespace {

constexpr size_t kBlockBytes = 4096;
// A record has at most a handful of entries a handover; retries of one session add to it.
constexpr uint64_t kPreallocatedBlocks = 8;
constexpr size_t kChecksumDigits = 16;

constexpr std::array<std::pair<HandoverPhase, absl::string_view>, 9> kPhaseNames = {{
    {HandoverPhase::kPreparing, "preparing"},
    {HandoverPhase::kGivenUp, "given-up"},
    {HandoverPhase::kMoved, "moved"},
    {HandoverPhase::kTakenBack, "taken-back"},
    {HandoverPhase::kWaiting, "waiting"},
    {HandoverPhase::kToldToRun, "told-to-run"},
    {HandoverPhase::kRunning, "running"},
    {HandoverPhase::kNeverRan, "never-ran"},
    {HandoverPhase::kRanUntold, "ran-untold"},
}};

std::string Checksum(absl::string_view text) {
  return absl::StrFormat("%016x", XXH3_64bits(text.data(), text.size()));
}

// One block: JSON, padding, checksum, newline.
absl::StatusOr<std::string> EncodeBlock(const HandoverEntry& entry) {
  const nlohmann::json json = {
      {"role", entry.role == HandoverRole::kSource ? "source" : "target"},
      {"phase", std::string(PhaseName(entry.phase))},
      {"guest", entry.guest},
      {"session", IdToHex(entry.session)},
      {"peer", entry.peer},
      {"peer_name", entry.peer_name},
      {"detail", entry.detail},
      {"process", entry.process},
      {"sequence", entry.sequence},
      {"boot", entry.at.boot},
      {"uptime_s", entry.at.uptime_s},
  };
  std::string block = json.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (block.size() > kBlockBytes - kChecksumDigits - 2) {
    return absl::InvalidArgumentError("a handover record's names are too long");
  }
  block.resize(kBlockBytes - kChecksumDigits - 1, ' ');
  absl::StrAppend(&block, Checksum(block), "\n");
  return block;
}

std::optional<HandoverEntry> DecodeBlock(absl::string_view block) {
  const absl::string_view text = block.substr(0, kBlockBytes - kChecksumDigits - 1);
  if (Checksum(text) != block.substr(text.size(), kChecksumDigits)) return std::nullopt;
  const nlohmann::json json = nlohmann::json::parse(text.begin(), text.end(), nullptr, false);
  if (!json.is_object()) return std::nullopt;
  const auto field = [&json](const char* name) {
    const auto it = json.find(name);
    return it != json.end() && it->is_string() ? it->get<std::string>() : std::string();
  };
  // Bounded: sums of these never overflow.
  const auto number = [&json](const char* name) -> uint64_t {
    const auto it = json.find(name);
    if (it == json.end() || !it->is_number_unsigned()) return 0;
    return std::min<uint64_t>(it->get<uint64_t>(), uint64_t{1} << 62);
  };
  HandoverEntry entry;
  entry.role = field("role") == "target" ? HandoverRole::kTarget : HandoverRole::kSource;
  entry.guest = field("guest");
  entry.peer = field("peer");
  entry.peer_name = field("peer_name");
  entry.detail = field("detail");
  entry.process = field("process");
  entry.sequence = number("sequence");
  entry.at = {.boot = field("boot"), .uptime_s = static_cast<int64_t>(number("uptime_s"))};
  const absl::StatusOr<SessionId> id = IdFromHex(field("session"));
  if (!id.ok()) return std::nullopt;
  entry.session = *id;
  const std::string phase = field("phase");
  for (const auto& [value, name] : kPhaseNames) {
    if (name != phase) continue;
    entry.phase = value;
    return entry;
  }
  return std::nullopt;
}

absl::Status FileError(absl::string_view what, const std::string& path) {
  return absl::UnavailableError(
      absl::StrCat("handover record: ", what, " ", path, ": ", std::strerror(errno)));
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (in.bad() || !in.is_open()) return FileError("read", path);
  return bytes;
}

// A guest's name may hold anything; the file's name must not.
std::string FileNameOf(const std::string& guest) {
  std::string safe;
  for (const char c : guest) {
    const bool plain = absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_';
    safe += plain ? c : '_';
  }
  return safe.substr(0, 64);
}

std::string FileName(const HandoverEntry& entry) {
  return absl::StrCat(FileNameOf(entry.guest), ".", IdToHex(entry.session),
                      entry.role == HandoverRole::kSource ? ".source" : ".target");
}

std::vector<std::string> RecordFiles(const std::string& folder) {
  std::vector<std::string> paths;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error)) {
    const std::string extension = file.path().extension();
    if (extension == ".source" || extension == ".target") paths.push_back(file.path());
  }
  return paths;
}

absl::StatusOr<HandoverEntry> ReadNewest(const std::string& path) {
  const absl::StatusOr<std::string> bytes = ReadFile(path);
  if (!bytes.ok()) return bytes.status();
  return HandoverRecord::Parse(*bytes);
}

uint64_t NewestSequence(const std::string& folder) {
  uint64_t newest = 0;
  for (const std::string& path : RecordFiles(folder)) {
    const absl::StatusOr<HandoverEntry> entry = ReadNewest(path);
    if (entry.ok()) newest = std::max(newest, entry->sequence);
  }
  return newest;
}

}  // namespace

absl::string_view PhaseName(HandoverPhase phase) {
  for (const auto& [value, name] : kPhaseNames) {
    if (value == phase) return name;
  }
  return "unknown";
}

bool IsSettled(HandoverPhase phase) {
  return phase == HandoverPhase::kRunning || phase == HandoverPhase::kNeverRan;
}

bool CanFollow(std::optional<HandoverPhase> from, HandoverPhase to) {
  using enum HandoverPhase;
  if (!from) return true;
  switch (*from) {
    case kPreparing:  // a launch that was called off is followed by the next one
      return to == kPreparing || to == kGivenUp;
    case kGivenUp:
      return to == kMoved || to == kTakenBack;
    case kMoved:
      return to == kMoved;
    case kTakenBack:
      return to == kTakenBack || to == kPreparing;
    case kWaiting:
      return to == kWaiting || to == kToldToRun || to == kNeverRan || to == kRanUntold;
    case kToldToRun:  // it refused, and the order is taken back; or it runs
      return to == kRunning || to == kWaiting;
    case kRunning:
      return to == kRunning;
    case kNeverRan:  // the same session's next handover
      return to == kNeverRan || to == kWaiting;
    case kRanUntold:
      return to == kRanUntold || to == kWaiting || to == kToldToRun;
  }
  return false;
}

BootMoment NowInBoot() {
  BootMoment now;
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  file >> now.boot;
  timespec up = {};
  if (::clock_gettime(CLOCK_BOOTTIME, &up) == 0) now.uptime_s = up.tv_sec;
  return now;
}

absl::StatusOr<HandoverRecord> HandoverRecord::Open(const std::string& folder,
                                                    HandoverEntry entry) {
  const HandoverPhase phase = entry.phase;
  absl::StatusOr<HandoverRecord> record = Reserve(folder, std::move(entry));
  if (!record.ok()) return record.status();
  if (absl::Status s = record->Append(phase); !s.ok()) return s;
  return record;
}

absl::StatusOr<HandoverRecord> HandoverRecord::Reserve(const std::string& folder,
                                                       HandoverEntry entry) {
  HandoverRecord record;
  record.path_ = Path(folder, entry);
  record.fd_.reset(::open(record.path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!record.fd_.valid()) return FileError("open", record.path_);
  struct stat st;
  if (::fstat(record.fd_.get(), &st) != 0) return FileError("stat", record.path_);
  const absl::StatusOr<std::string> old = ReadFile(record.path_);
  if (!old.ok()) return old.status();
  for (size_t at = 0; at + kBlockBytes <= old->size(); at += kBlockBytes) {
    if ((*old)[at] != '\0') record.blocks_ = at / kBlockBytes + 1;
  }
  const absl::StatusOr<HandoverEntry> newest = Parse(*old);
  if (newest.ok()) record.newest_ = newest->phase;
  entry.sequence =
      newest.ok() && newest->sequence > 0 ? newest->sequence : NewestSequence(folder) + 1;
  // Written zeros, not fallocate: an unwritten extent would need metadata at the next sync. Only
  // behind what is there: no entry is ever overwritten.
  const uint64_t wanted = (record.blocks_ + kPreallocatedBlocks) * kBlockBytes;
  const uint64_t there = old->size() / kBlockBytes * kBlockBytes;
  const std::string zeros(wanted > there ? wanted - there : 0, '\0');
  if (::pwrite(record.fd_.get(), zeros.data(), zeros.size(), static_cast<off_t>(there)) !=
      static_cast<ssize_t>(zeros.size())) {
    return FileError("write", record.path_);
  }
  const UniqueFd dir(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (::fsync(record.fd_.get()) != 0 || !dir.valid() || ::fsync(dir.get()) != 0) {
    return FileError("sync", record.path_);
  }
  record.entry_ = std::move(entry);
  return record;
}

// Whoever appends knows what was written last: it may be a while since it was read.
absl::Status HandoverRecord::CheckNext(HandoverPhase phase) const {
  if (!CanFollow(newest_, phase)) {
    return absl::FailedPreconditionError(
        absl::StrCat("handover record ", path_, " says ", newest_ ? PhaseName(*newest_) : "nothing",
                     ": ", PhaseName(phase), " can't come after that"));
  }
  char first = '\0';
  const auto offset = static_cast<off_t>(blocks_ * kBlockBytes);
  if (unsure_ || ::pread(fd_.get(), &first, 1, offset) != 1 || first == '\0') {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      absl::StrCat("handover record ", path_, " was written by somebody else meanwhile"));
}

absl::Status HandoverRecord::Append(HandoverPhase phase) {
  if (absl::Status s = CheckNext(phase); !s.ok()) return s;
  HandoverEntry next = entry_;
  next.phase = phase;
  next.at = NowInBoot();
  const absl::StatusOr<std::string> block = EncodeBlock(next);
  if (!block.ok()) return block.status();
  const auto offset = static_cast<off_t>(blocks_ * kBlockBytes);
  if (::pwrite(fd_.get(), block->data(), block->size(), offset) !=
          static_cast<ssize_t>(block->size()) ||
      ::fdatasync(fd_.get()) != 0) {
    unsure_ = true;
    return FileError("write", path_);
  }
  ++blocks_;
  unsure_ = false;
  newest_ = phase;
  entry_ = std::move(next);
  return absl::OkStatus();
}

absl::StatusOr<std::string> HandoverRecord::Encode(const HandoverEntry& entry) {
  return EncodeBlock(entry);
}

absl::StatusOr<HandoverEntry> HandoverRecord::Parse(absl::string_view bytes) {
  if (bytes.find_first_not_of('\0') == absl::string_view::npos) {
    return absl::NotFoundError("a handover record that was never used");
  }
  std::optional<HandoverEntry> newest;
  for (size_t at = 0; at + kBlockBytes <= bytes.size(); at += kBlockBytes) {
    if (std::optional<HandoverEntry> entry = DecodeBlock(bytes.substr(at, kBlockBytes))) {
      newest = std::move(entry);
    }
  }
  if (!newest) return absl::InvalidArgumentError("no whole entry in the handover record");
  return *std::move(newest);
}

absl::StatusOr<HandoverEntry> HandoverRecord::Read(const std::string& folder,
                                                   const HandoverEntry& entry) {
  const std::string path = Path(folder, entry);
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return absl::NotFoundError(absl::StrCat("there is no handover record ", path));
  }
  return ReadNewest(path);
}

std::vector<HandoverEntry> HandoverRecord::ReadAll(const std::string& folder,
                                                   std::vector<std::string>* unreadable) {
  std::vector<HandoverEntry> entries;
  for (const std::string& path : RecordFiles(folder)) {
    const absl::StatusOr<HandoverEntry> entry = ReadNewest(path);
    if (entry.ok()) {
      entries.push_back(*entry);
    } else if (!absl::IsNotFound(entry.status())) {
      unreadable->push_back(path);
    }
  }
  return entries;
}

std::string HandoverRecord::Path(const std::string& folder, const HandoverEntry& entry) {
  return absl::StrCat(folder, "/", FileName(entry));
}

bool HandoverRecord::MayBeOf(const std::string& path, const std::string& guest) {
  return absl::StartsWith(std::filesystem::path(path).filename().string(),
                          absl::StrCat(FileNameOf(guest), "."));
}

absl::Status HandoverRecord::Forget(const std::string& folder, const HandoverEntry& entry) {
  const std::string path = Path(folder, entry);
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) return FileError("remove", path);
  return absl::OkStatus();
}

void HandoverRecord::RemoveUnused(const std::string& folder) {
  for (const std::string& path : RecordFiles(folder)) {
    if (absl::IsNotFound(ReadNewest(path).status())) ::unlink(path.c_str());
  }
}

absl::Status HandoverRecord::Remove() {
  if (::unlink(path_.c_str()) != 0 && errno != ENOENT) return FileError("remove", path_);
  return absl::OkStatus();
}

}  // namespace presync
