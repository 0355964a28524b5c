#include "tools/presync/scan_source.h"

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "qemu-glue/open_guest.h"
#include "tools/common/local_api.h"
#include "transport/clock.h"
#include "transport/sync/write_recorder.h"

namespace presync {
namespace {

using Json = nlohmann::json;

constexpr absl::Duration kFetchEvery = absl::Milliseconds(500);
constexpr absl::Duration kAnswerWithin = absl::Seconds(10);

class LogSource final : public ScanSource {
 public:
  LogSource(std::unique_ptr<DirtyLog> log, const GuestMemory* memory, absl::Duration interval)
      : recorder_(std::move(log), memory), pages_(memory->pages()), interval_(interval) {}

  absl::Status Start() {
    next_scan_ = MonotonicNow() + interval_;
    return recorder_.StartRecording();
  }

  PageCount pages() const override { return pages_; }

  absl::Status Next(absl::Duration longest, std::vector<std::vector<PageRun>>* scans) override {
    const absl::Time until = MonotonicNow() + longest;
    absl::SleepFor(std::min(until, next_scan_) - MonotonicNow());
    if (MonotonicNow() < next_scan_) return absl::OkStatus();
    std::vector<PageRun> written;
    if (absl::Status s = recorder_.TakeScan(&written); !s.ok()) return s;
    for (next_scan_ += interval_; next_scan_ <= MonotonicNow(); next_scan_ += interval_) {
      scans->emplace_back();
      ++missed_;
    }
    scans->push_back(std::move(written));
    return absl::OkStatus();
  }

  uint64_t missed() const override { return missed_; }
  absl::Status Stop() override { return absl::OkStatus(); }

 private:
  WriteRecorder recorder_;
  const PageCount pages_;
  const absl::Duration interval_;
  absl::Time next_scan_;
  uint64_t missed_ = 0;
};

// The guest, and a LogSource over it.
class QemuSource final : public ScanSource {
 public:
  explicit QemuSource(OpenedGuest guest) : guest_(std::move(guest)) {}

  absl::Status Start(absl::Duration interval) {
    absl::StatusOr<std::unique_ptr<ScanSource>> log =
        RecordLog(std::move(guest_.log), &guest_.memory, interval);
    if (log.ok()) log_ = *std::move(log);
    return log.status();
  }

  PageCount pages() const override { return log_->pages(); }
  absl::Status Next(absl::Duration longest, std::vector<std::vector<PageRun>>* scans) override {
    return log_->Next(longest, scans);
  }
  uint64_t missed() const override { return log_->missed(); }
  absl::Status Stop() override {
    log_.reset();  // tracking can be taken off when nobody uses it any more
    return guest_.stop_tracking();
  }

 private:
  OpenedGuest guest_;
  std::unique_ptr<ScanSource> log_;
};

class SyncSource final : public ScanSource {
 public:
  SyncSource(std::string socket, std::string name)
      : socket_(std::move(socket)), name_(std::move(name)) {}

  absl::Status Start(absl::Duration interval) {
    absl::StatusOr<Json> answer =
        Ask("start", {{"interval_us", absl::ToInt64Microseconds(interval)}});
    if (!answer.ok()) return answer.status();
    pages_ =
        static_cast<PageCount>(std::clamp<int64_t>(NumberOr(*answer, "pages", 0), 0, UINT32_MAX));
    if (pages_ == 0) return absl::InternalError("presyncd named no size of the guest");
    return absl::OkStatus();
  }

  PageCount pages() const override { return pages_; }

  absl::Status Next(absl::Duration longest, std::vector<std::vector<PageRun>>* scans) override {
    absl::SleepFor(std::min(longest, kFetchEvery));
    bool more = true;
    while (more) {
      absl::StatusOr<Json> part = Ask("take", Json::object());
      if (!part.ok()) return absl::UnavailableError(part.status().message());
      if (absl::Status s = Add(*part, scans); !s.ok()) return s;
      // A scan that was cut goes on at once.
      more = !scan_.empty();
      if (FlagOr(*part, "ended", false)) {
        const std::string why = TextOr(*part, "problem", "");
        return absl::UnavailableError(why.empty() ? "the recording was stopped" : why);
      }
    }
    return absl::OkStatus();
  }

  uint64_t missed() const override { return missed_; }
  absl::Status Stop() override { return Ask("stop", Json::object()).status(); }

 private:
  absl::StatusOr<Json> Ask(const std::string& action, Json request) {
    request.update({{"command", "record"}, {"name", name_}, {"action", action}});
    absl::StatusOr<Json> answer = CallLocal(socket_, request, MonotonicNow() + kAnswerWithin);
    if (!answer.ok()) return answer.status();
    if (absl::Status s = JsonToStatus(*answer); !s.ok()) return s;
    return answer;
  }

  absl::Status Add(const Json& part, std::vector<std::vector<PageRun>>* scans) {
    missed_ = static_cast<uint64_t>(NumberOr(part, "missed_scans", 0));
    const std::vector<uint64_t> numbers = Numbers(part, "runs");
    const std::vector<uint64_t> ends = Numbers(part, "ends");
    size_t next_end = 0;
    for (size_t run = 0; run <= numbers.size() / 2; ++run) {
      for (; next_end < ends.size() && ends[next_end] == run; ++next_end) {
        scans->push_back(std::exchange(scan_, {}));
      }
      if (run == numbers.size() / 2) break;
      const uint64_t first = numbers[2 * run];
      const uint64_t count = numbers[2 * run + 1];
      const PageIndex from = scan_.empty() ? 0 : scan_.back().end();
      if (first < from || count == 0 || first > pages_ || count > pages_ - first) {
        return absl::UnavailableError("presyncd sent a page that the guest does not have");
      }
      scan_.push_back({static_cast<PageIndex>(first), static_cast<PageCount>(count)});
    }
    return absl::OkStatus();
  }

  static std::vector<uint64_t> Numbers(const Json& part, const char* key) {
    std::vector<uint64_t> numbers;
    const auto it = part.find(key);
    if (it == part.end() || !it->is_array()) return numbers;
    for (const Json& number : *it) {
      numbers.push_back(number.is_number_unsigned() ? number.get<uint64_t>() : UINT64_MAX);
    }
    return numbers;
  }

  const std::string socket_;
  const std::string name_;
  PageCount pages_ = 0;
  uint64_t missed_ = 0;
  std::vector<PageRun> scan_;  // the beginning of one
};

}  // namespace

absl::StatusOr<std::unique_ptr<ScanSource>> RecordLog(std::unique_ptr<DirtyLog> log,
                                                      const GuestMemory* memory,
                                                      absl::Duration interval) {
  auto source = std::make_unique<LogSource>(std::move(log), memory, interval);
  if (absl::Status s = source->Start(); !s.ok()) return s;
  return source;
}

absl::StatusOr<std::unique_ptr<ScanSource>> RecordQemu(const std::string& qmp_path,
                                                       const std::string& glue_path,
                                                       absl::Duration interval) {
  absl::StatusOr<OpenedGuest> guest =
      OpenGuest({.qmp_path = qmp_path, .glue_path = glue_path}, MonotonicNow() + absl::Seconds(20));
  if (!guest.ok()) return guest.status();
  auto source = std::make_unique<QemuSource>(*std::move(guest));
  if (absl::Status s = source->Start(interval); !s.ok()) return s;
  return source;
}

absl::StatusOr<std::unique_ptr<ScanSource>> RecordBesideSync(const std::string& socket,
                                                             const std::string& name,
                                                             absl::Duration interval) {
  auto source = std::make_unique<SyncSource>(socket, name);
  if (absl::Status s = source->Start(interval); !s.ok()) return s;
  return source;
}

}  // namespace presync
