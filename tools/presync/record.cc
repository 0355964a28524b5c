#include "tools/presync/record.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "predictor/bitmap.h"
#include "tools/common/local_api.h"
#include "tools/common/trace_file.h"
#include "tools/common/units.h"
#include "tools/presync/render.h"
#include "tools/presync/scan_source.h"
#include "transport/clock.h"
#include "transport/sync/session_recording.h"

namespace presync {
namespace {

constexpr absl::Duration kStep = absl::Milliseconds(200);  // Ctrl-C is heard this soon

struct Totals {
  uint64_t scans = 0;
  uint64_t pages = 0;   // sum over the scans
  uint64_t missed = 0;  // scans
  std::string ended;    // why the recording ended before its time
};

int Fail(const absl::Status& status, const RecordOptions& options, ExitCode code = kFailed) {
  if (options.json) std::printf("%s\n", StatusToJson(status).dump().c_str());
  std::fprintf(stderr, "presync: record %s: %s\n", options.name.c_str(),
               std::string(status.message()).c_str());
  return code;
}

// A guest has one tracker at a time.
absl::Status CheckNotInSync(const RecordOptions& options) {
  const absl::StatusOr<nlohmann::json> status =
      CallLocal(options.socket, {{"command", "status"}}, MonotonicNow() + absl::Seconds(5));
  if (!status.ok()) return absl::OkStatus();  // no presyncd here
  std::error_code error;
  const auto wanted = std::filesystem::weakly_canonical(options.qmp, error);
  for (const nlohmann::json& guest : status->value("guests", nlohmann::json::array())) {
    if (std::filesystem::weakly_canonical(TextOr(guest, "qmp", ""), error) == wanted) {
      const std::string name = TextOr(guest, "name", "");
      return absl::FailedPreconditionError(absl::StrCat("presyncd tracks this guest already, as ",
                                                        name, ": presync record ", name,
                                                        " without --qmp records it there"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ScanSource>> OpenSource(const RecordOptions& options,
                                                       absl::Duration interval) {
  if (options.qmp.empty()) return RecordBesideSync(options.socket, options.name, interval);
  if (::geteuid() != 0) {
    return absl::PermissionDeniedError("--qmp looks into QEMU's memory: run it as root");
  }
  if (absl::Status s = CheckNotInSync(options); !s.ok()) return s;
  absl::StatusOr<std::unique_ptr<ScanSource>> source =
      RecordQemu(options.qmp, options.glue, interval);
  if (absl::IsDeadlineExceeded(source.status()) ||
      absl::StrContains(source.status().message(), "another client")) {
    return absl::Status(source.status().code(),
                        absl::StrCat(source.status().message(),
                                     "; does another presyncd or presync have this guest open?"));
  }
  return source;
}

std::string ProgressLine(const Totals& totals, absl::Duration interval) {
  return absl::StrFormat(
      "%.1f s recorded, %d pages written, %.0f pages/s",
      totals.scans * absl::ToDoubleSeconds(interval), totals.pages,
      totals.scans == 0 ? 0.0 : totals.pages / (totals.scans * absl::ToDoubleSeconds(interval)));
}

// Until `scans` scans were written (0: no limit), or one of the other ends. Errors: of the file.
absl::StatusOr<Totals> Copy(ScanSource* source, TraceFileWriter* file, uint64_t scans,
                            absl::Duration interval, const RecordOptions& options,
                            const std::atomic<bool>* interrupted) {
  Totals totals;
  std::vector<std::vector<PageRun>> come;
  const auto over = [&] { return scans != 0 && totals.scans >= scans; };
  while (!*interrupted && !over() && totals.ended.empty()) {
    come.clear();
    if (absl::Status s = source->Next(kStep, &come); !s.ok()) {
      totals.ended = std::string(s.message());
    }
    for (const std::vector<PageRun>& scan : come) {
      if (over()) break;
      if (absl::Status s = file->AddScan(scan); !s.ok()) return s;
      ++totals.scans;
      totals.pages += CountPages(scan);
    }
    if (!options.json) ShowProgress(ProgressLine(totals, interval), false);
  }
  totals.missed = source->missed();
  if (!options.json) ShowProgress(ProgressLine(totals, interval), true);
  return totals;
}

absl::StatusOr<Totals> CopyToFile(ScanSource* source, absl::Duration interval,
                                  const RecordOptions& options,
                                  const std::atomic<bool>* interrupted) {
  const auto interval_us = static_cast<uint32_t>(absl::ToInt64Microseconds(interval));
  absl::StatusOr<TraceFileWriter> file = TraceFileWriter::Create(
      options.out, {.scan_interval_us = interval_us, .pages = source->pages()});
  if (!file.ok()) return file.status();
  const auto scans = static_cast<uint64_t>(options.seconds / absl::ToDoubleSeconds(interval));
  absl::StatusOr<Totals> totals = Copy(source, &*file, scans, interval, options, interrupted);
  if (absl::Status s = file->Close(); totals.ok() && !s.ok()) return s;
  return totals;
}

int Report(const RecordOptions& options, const Totals& totals, absl::Duration interval) {
  if (options.json) {
    std::printf("%s\n", nlohmann::json{{"ok", totals.ended.empty()},
                                       {"file", options.out},
                                       {"scans", totals.scans},
                                       {"interval_us", absl::ToInt64Microseconds(interval)},
                                       {"pages_written", totals.pages},
                                       {"missed_scans", totals.missed},
                                       {"error", totals.ended}}
                            .dump()
                            .c_str());
  } else {
    std::printf("%s: %d scans\n", options.out.c_str(), static_cast<int>(totals.scans));
  }
  if (totals.missed > 0) {
    std::fprintf(stderr,
                 "presync: %d scans came too late: they are empty, and their pages are in the scan "
                 "after them (is this host overloaded?)\n",
                 static_cast<int>(totals.missed));
  }
  if (totals.ended.empty()) return kOk;
  std::fprintf(stderr,
               "presync: record %s ended early: %s; %s holds what was recorded until then\n",
               options.name.c_str(), totals.ended.c_str(), options.out.c_str());
  return kFailed;
}

}  // namespace

int RunRecord(const RecordOptions& options, const std::atomic<bool>* interrupted) {
  absl::StatusOr<absl::Duration> interval = ParsePositiveDuration(options.interval);
  if (interval.ok() &&
      (*interval < SessionRecording::kShortest || *interval > SessionRecording::kLongest)) {
    interval = absl::OutOfRangeError("--interval is from 10ms to 60s");
  }
  if (!interval.ok()) return Fail(interval.status(), options);
  absl::StatusOr<std::unique_ptr<ScanSource>> source = OpenSource(options, *interval);
  if (!source.ok()) {
    const bool no_daemon = options.qmp.empty() && absl::IsUnavailable(source.status());
    return Fail(source.status(), options, no_daemon ? kNoDaemon : kFailed);
  }
  absl::StatusOr<Totals> totals = CopyToFile(source->get(), *interval, options, interrupted);
  const absl::Status stopped = (*source)->Stop();
  if (!totals.ok()) return Fail(totals.status(), options);
  if (!stopped.ok() && totals->ended.empty()) {
    std::fprintf(stderr, "presync: after the recording: %s\n",
                 std::string(stopped.message()).c_str());
  }
  return Report(options, *totals, *interval);
}

RunCommand AddRecord(CLI::App* app, CommandContext* context) {
  auto o = std::make_shared<RecordOptions>();
  app->add_option("name", o->name, "A guest that presyncd keeps in sync; with --qmp any name")
      ->required();
  app->add_option("--out", o->out, "The trace file; compressed if it ends in .zst")->required();
  app->add_option("--qmp", o->qmp,
                  "Open the guest behind this monitor without presyncd, which must not have it "
                  "(needs root)");
  app->add_option("--glue", o->glue, "With --qmp: the plug-in's socket, if it is not found");
  app->add_option("--seconds", o->seconds, "How long (default: until Ctrl-C)")
      ->check(CLI::Range(0.1, 1e6));
  app->add_option("--interval", o->interval, "Time between two scans, 10ms to 60s")
      ->capture_default_str();
  return [o, context] {
    static std::atomic<bool>* interrupted;
    interrupted = &context->interrupted;
    ::signal(SIGTERM, [](int) { *interrupted = true; });  // the file is to be whole then, too
    o->socket = context->socket;
    o->json = context->json;
    return RunRecord(*o, interrupted);
  };
}

}  // namespace presync
