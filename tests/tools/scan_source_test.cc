// What `presync record` writes is what the guest wrote, whichever way it records.
#include "tools/presync/scan_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "tests/transport/sync/model_guest.h"
#include "tools/common/local_api.h"
#include "tools/common/trace_file.h"
#include "tools/presyncd/local_access.h"
#include "tools/presyncd/local_server.h"
#include "tools/presyncd/recording_api.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;
using Scans = std::vector<std::vector<PageRun>>;

constexpr absl::Duration kInterval = absl::Milliseconds(10);
const std::vector<PageCount> kRegions = {700, 324};
constexpr PageCount kPages = 1024;

class TempFolder {
 public:
  TempFolder() {
    char name[] = "/tmp/presync-record-test-XXXXXX";
    path_ = ::mkdtemp(name);
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  std::string operator/(const char* name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

std::set<PageIndex> Pages(absl::Span<const PageRun> runs) {
  std::set<PageIndex> pages;
  for (const PageRun& run : runs) {
    for (PageIndex page = run.first; page < run.end(); ++page) pages.insert(page);
  }
  return pages;
}

// What a test of the answers needs: presyncd's end, over a model guest.
class RecordedGuest {
 public:
  RecordedGuest()
      : memory_(kRegions), recorder_(memory_.MakeLog(), &memory_.memory()), thread_([this] {
          while (!ends_) {
            recording_.Step(&recorder_, MonotonicNow()).IgnoreError();
            absl::SleepFor(absl::Milliseconds(1));
          }
        }) {}
  ~RecordedGuest() {
    ends_ = true;
    thread_.join();
  }

  Json Handle(const Json& request) {
    absl::StatusOr<Json> answer = AnswerRecord(&recording_, kPages, request);
    if (!answer.ok()) return StatusToJson(answer.status());
    (*answer)["ok"] = true;
    return *std::move(answer);
  }
  ModelMemory& memory() { return memory_; }

 private:
  ModelMemory memory_;
  WriteRecorder recorder_;  // the thread's
  SessionRecording recording_;
  std::atomic<bool> ends_ = false;
  std::thread thread_;
};

TEST(RecordLogTest, AFileHoldsExactlyThePagesThatWereWrittenInEachScan) {
  const TempFolder folder;
  ModelMemory memory(kRegions);
  auto source = RecordLog(memory.MakeLog(), &memory.memory(), kInterval);
  ASSERT_TRUE(source.ok()) << source.status();
  auto file = TraceFileWriter::Create(folder / "t.pstrace.zst",
                                      {.scan_interval_us = 10'000, .pages = (*source)->pages()});
  ASSERT_TRUE(file.ok()) << file.status();

  std::mt19937 random(1);
  std::map<size_t, std::set<PageIndex>> expected;  // by scan
  size_t scans = 0;
  for (int round = 0; round < 30; ++round) {
    std::set<PageIndex> written;
    for (int i = static_cast<int>(random() % 40); i > 0; --i) {
      const auto page = static_cast<PageIndex>(random() % kPages);
      memory.Write(page, random());
      written.insert(page);
    }
    Scans come;
    while (come.empty()) ASSERT_TRUE((*source)->Next(absl::Seconds(1), &come).ok());
    for (const auto& scan : come) ASSERT_TRUE(file->AddScan(scan).ok());
    scans += come.size();  // those before the last are empty: a machine that was held up
    expected[scans - 1] = std::move(written);
  }
  ASSERT_TRUE(file->Close().ok());

  const absl::StatusOr<Trace> trace = ReadTraceFile(folder / "t.pstrace.zst");
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->header().pages, kPages);
  EXPECT_EQ(trace->header().scan_interval_us, 10'000u);
  ASSERT_EQ(trace->scans(), scans);
  EXPECT_EQ((*source)->missed(), scans - 30);
  for (size_t i = 0; i < scans; ++i) EXPECT_EQ(Pages(trace->Scan(i)), expected[i]) << i;
}

TEST(RecordLogTest, AGuestThatEndsIsSaid) {
  ModelMemory memory(kRegions);
  auto source = RecordLog(memory.MakeLog(), &memory.memory(), kInterval);
  ASSERT_TRUE(source.ok()) << source.status();
  memory.Die();
  Scans come;
  absl::Status status;
  for (int i = 0; i < 3 && status.ok(); ++i) status = (*source)->Next(absl::Seconds(1), &come);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
}

TEST(RecordBesideSyncTest, EachWriteIsInExactlyOneScan) {
  const TempFolder folder;
  RecordedGuest guest;
  auto server = LocalServer::Start(folder / "sock", LocalAccess(),
                                   [&](const Json& r) { return guest.Handle(r); });
  ASSERT_TRUE(server.ok()) << server.status();
  auto source = RecordBesideSync(folder / "sock", "g1", kInterval);
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ((*source)->pages(), kPages);
  Scans come;
  while (come.empty()) ASSERT_TRUE((*source)->Next(absl::Milliseconds(20), &come).ok());
  for (const auto& scan : come) EXPECT_THAT(scan, ::testing::IsEmpty());  // nothing is written yet
  come.clear();
  for (PageIndex page = 0; page < kPages; page += 3) {
    guest.memory().Write(page, page + 1);
    if (page % 60 == 0) absl::SleepFor(absl::Milliseconds(2));
  }
  const size_t want = kPages / 3 + 1;
  size_t seen = 0;
  std::map<PageIndex, int> times;
  for (int i = 0; i < 200 && seen < want; ++i) {
    Scans more;
    ASSERT_TRUE((*source)->Next(absl::Milliseconds(20), &more).ok());
    for (const auto& scan : more) {
      for (PageIndex page : Pages(scan)) ++times[page], ++seen;
    }
  }
  ASSERT_EQ(times.size(), want);
  for (const auto& [page, count] : times) EXPECT_TRUE(page % 3 == 0 && count == 1) << page;
  EXPECT_TRUE((*source)->Stop().ok());
  EXPECT_TRUE(absl::IsUnavailable((*source)->Next(absl::ZeroDuration(), &come)));
}

TEST(RecordBesideSyncTest, ASecondRecordingIsRefused) {
  const TempFolder folder;
  RecordedGuest guest;
  auto server = LocalServer::Start(folder / "sock", LocalAccess(),
                                   [&](const Json& r) { return guest.Handle(r); });
  ASSERT_TRUE(server.ok()) << server.status();
  auto first = RecordBesideSync(folder / "sock", "g1", kInterval);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_TRUE(absl::IsAlreadyExists(RecordBesideSync(folder / "sock", "g1", kInterval).status()));
}

TEST(RecordBesideSyncTest, AScanThatComesInPartsIsWhole) {
  const TempFolder folder;
  int takes = 0;
  auto server =
      LocalServer::Start(folder / "sock", LocalAccess(), [&](const Json& request) -> Json {
        if (request["action"] == "start") return {{"ok", true}, {"pages", 100}};
        if (++takes == 1) return {{"ok", true}, {"runs", {5, 1, 9, 2}}, {"ends", {1}}};
        return {{"ok", true}, {"runs", {20, 1, 3, 1}}, {"ends", {1, 2}}};
      });
  ASSERT_TRUE(server.ok()) << server.status();
  auto source = RecordBesideSync(folder / "sock", "g1", kInterval);
  ASSERT_TRUE(source.ok()) << source.status();
  Scans come;
  ASSERT_TRUE((*source)->Next(absl::ZeroDuration(), &come).ok());
  EXPECT_THAT(come,
              ::testing::ElementsAre(Scans::value_type{{5, 1}}, Scans::value_type{{9, 2}, {20, 1}},
                                     Scans::value_type{{3, 1}}));
}

TEST(RecordBesideSyncTest, PagesThatCannotBeAreRefused) {
  const std::vector<Json> broken = {
      {99, 2}, {5, 0}, {4294967295, 4294967295}, {8, 4, 9, 1}, {9, 1, 8, 1}, {-1, 1}, {"x", 1}};
  for (const Json& runs : broken) {
    const TempFolder folder;
    auto server =
        LocalServer::Start(folder / "sock", LocalAccess(), [&](const Json& request) -> Json {
          if (request["action"] == "start") return {{"ok", true}, {"pages", 100}};
          return {{"ok", true}, {"runs", runs}, {"ends", {runs.size() / 2}}};
        });
    ASSERT_TRUE(server.ok()) << server.status();
    auto source = RecordBesideSync(folder / "sock", "g1", kInterval);
    ASSERT_TRUE(source.ok()) << source.status();
    Scans come;
    const absl::Status status = (*source)->Next(absl::ZeroDuration(), &come);
    EXPECT_TRUE(absl::IsUnavailable(status)) << runs;
    EXPECT_THAT(std::string(status.message()), HasSubstr("does not have"));
  }
}

}  // namespace
}  // namespace presync
