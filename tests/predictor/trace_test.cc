#include "predictor/trace.h"

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr TraceHeader kHeader = {.page_bytes = 4096, .scan_interval_us = 100'000, .pages = 1000};

absl::Span<const uint8_t> Bytes(const std::string& text) {
  return absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size());
}

std::string Encode(const TraceHeader& header, const std::vector<std::vector<PageRun>>& scans) {
  std::string bytes;
  AppendTraceHeader(header, &bytes);
  for (const auto& scan : scans) AppendTraceScan(scan, &bytes);
  return bytes;
}

// Four little-endian bytes at `offset` replaced.
std::string WithU32(std::string bytes, size_t offset, uint32_t value) {
  for (int i = 0; i < 4; ++i) bytes[offset + i] = static_cast<char>(value >> (8 * i));
  return bytes;
}

void ExpectRefused(const std::string& bytes, uint64_t offset, const std::string& why) {
  const auto trace = ParseTrace(Bytes(bytes));
  EXPECT_EQ(trace.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(
      std::string(trace.status().message()),
      ::testing::AllOf(HasSubstr("offset " + std::to_string(offset) + ":"), HasSubstr(why)));
}

// Written out by hand: what other tools have to write.
TEST(TraceTest, TheFormatByteForByte) {
  const std::string bytes(
      "PSTRACE1"
      "\x00\x10\x00\x00"
      "\xa0\x86\x01\x00"
      "\xe8\x03\x00\x00\x00\x00\x00\x00"
      "\x02\x00\x00\x00"
      "\x05\x00\x00\x00\x02\x00\x00\x00"
      "\x00\x03\x00\x00\x01\x00\x00\x00"
      "\x00\x00\x00\x00",
      8 + 4 + 4 + 8 + 4 + 16 + 4);
  EXPECT_EQ(Encode(kHeader, {{{5, 2}, {768, 1}}, {}}), bytes);
  const auto trace = ParseTrace(Bytes(bytes));
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->header(), kHeader);
  ASSERT_EQ(trace->scans(), 2u);
  EXPECT_THAT(trace->Scan(0), ElementsAre(PageRun{5, 2}, PageRun{768, 1}));
  EXPECT_THAT(trace->Scan(1), IsEmpty());
  EXPECT_EQ(trace->pages_written(), 3u);
}

TEST(TraceTest, NoScansAtAll) {
  const auto trace = ParseTrace(Bytes(Encode(kHeader, {})));
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->scans(), 0u);
}

TEST(TraceTest, RunsMayTouchAndReachTheEnd) {
  const auto trace = ParseTrace(Bytes(Encode(kHeader, {{{0, 5}, {5, 1}, {999, 1}}})));
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->pages_written(), 7u);
}

TEST(TraceTest, RandomTracesComeBackInPiecesOfAnySize) {
  constexpr uint32_t kSeed = 9;
  std::mt19937 random(kSeed);
  for (int round = 0; round < 50; ++round) {
    SCOPED_TRACE(testing::Message() << "seed " << kSeed << ", round " << round);
    Trace trace({4096, 1 + static_cast<uint32_t>(random() % 1000),
                 1 + static_cast<PageCount>(random() % 5000)});
    std::string bytes;
    AppendTraceHeader(trace.header(), &bytes);
    for (int scans = random() % 20; scans > 0; --scans) {
      std::vector<PageRun> written;
      PageIndex next = random() % 100;
      while (next < trace.header().pages) {
        const PageCount count = 1 + random() % (trace.header().pages - next);
        written.push_back({next, std::min<PageCount>(count, 7)});
        next = written.back().end() + random() % 600;
      }
      trace.AddScan(written);
      AppendTraceScan(written, &bytes);
    }
    TraceParser parser;
    for (absl::Span<const uint8_t> rest = Bytes(bytes); !rest.empty();) {
      const size_t piece = std::min<size_t>(rest.size(), random() % 40);
      ASSERT_TRUE(parser.Feed(rest.first(piece)).ok());
      rest.remove_prefix(piece);
    }
    const auto parsed = std::move(parser).Finish();
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    ASSERT_TRUE(*parsed == trace);
  }
}

TEST(TraceTest, RefusesABadHeader) {
  const std::string good = Encode(kHeader, {{{5, 2}}});
  ExpectRefused("", 0, "ends inside the header");
  ExpectRefused("PSTRACE", 7, "ends inside the header");
  ExpectRefused("PSTRBCE", 0, "does not begin with PSTRACE1");
  ExpectRefused("PSTRACE2" + good.substr(8), 0, "does not begin with PSTRACE1");
  ExpectRefused(good.substr(0, 23), 23, "ends inside the header");
  ExpectRefused(WithU32(good, 8, 0), 8, "page size of 0");
  ExpectRefused(WithU32(good, 8, 4097), 8, "page size of 4097");
  ExpectRefused(WithU32(good, 8, 1u << 31), 8, "page size");
  ExpectRefused(WithU32(good, 12, 0), 12, "scan interval of 0");
  ExpectRefused(WithU32(good, 16, 0), 16, "region of 0 pages");
  ExpectRefused(WithU32(good, 16, kMaxTracePages + 1), 16, "region of 268435457 pages");
  ExpectRefused(WithU32(good, 20, 1), 16, "region of 4294968296 pages");
}

TEST(TraceTest, RefusesBadScans) {
  const std::string good = Encode(kHeader, {{{5, 2}, {10, 1}}, {{7, 3}}});
  const size_t first_scan = 24, second_scan = first_scan + 4 + 16;
  ExpectRefused(WithU32(good, first_scan, 1001), first_scan, "1001 runs in a scan of 1000 pages");
  ExpectRefused(WithU32(good, first_scan + 8, 0), first_scan + 8, "an empty run");
  ExpectRefused(WithU32(good, first_scan + 12, 6), first_scan + 12, "behind one that ends at");
  ExpectRefused(WithU32(good, first_scan + 12, 0), first_scan + 12, "behind one that ends at");
  ExpectRefused(WithU32(good, second_scan + 4, 998), second_scan + 4, "3 pages from page 998");
  ExpectRefused(WithU32(good, second_scan + 4, 4'000'000'000), second_scan + 4, "from page 4000");
  ExpectRefused(WithU32(good, second_scan + 8, UINT32_MAX), second_scan + 4, "4294967295 pages");
}

TEST(TraceTest, RefusesEveryTruncationInsideAScanAndNoneBetweenScans) {
  const std::string good = Encode(kHeader, {{{5, 2}, {10, 1}}, {}, {{7, 3}}});
  for (size_t bytes = 24; bytes < good.size(); ++bytes) {
    SCOPED_TRACE(bytes);
    const bool between_scans = bytes == 24 || bytes == 44 || bytes == 48;
    if (between_scans) {
      EXPECT_TRUE(ParseTrace(Bytes(good.substr(0, bytes))).ok());
    } else {
      ExpectRefused(good.substr(0, bytes), bytes, "it ends");
    }
  }
}

TEST(TraceTest, RefusesMoreThanItsLimit) {
  const std::string bytes = Encode(kHeader, {{}, {}, {}});
  TraceParser parser(24 + 8);
  const absl::Status status = parser.Feed(Bytes(bytes));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("offset 32:"));
}

// Garbage behind a good header must be refused or understood, never crash; run under ASan.
TEST(TraceTest, SurvivesRandomDamage) {
  constexpr uint32_t kSeed = 4;
  std::mt19937 random(kSeed);
  const std::string good = Encode(kHeader, {{{5, 2}, {10, 1}}, {}, {{7, 3}, {900, 100}}});
  int refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string bad = good.substr(0, random() % (good.size() + 1));
    for (int flips = random() % 4; flips >= 0 && !bad.empty(); --flips) {
      bad[random() % bad.size()] = static_cast<char>(random());
    }
    const auto trace = ParseTrace(Bytes(bad));
    if (!trace.ok()) ++refused;
  }
  EXPECT_GT(refused, 4000) << "seed " << kSeed;
}

}  // namespace
}  // namespace presync
