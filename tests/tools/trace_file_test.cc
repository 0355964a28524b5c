#include "tools/common/trace_file.h"

#include <zstd.h>

#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

class TraceFileTest : public ::testing::Test {
 protected:
  TraceFileTest() : folder_(::testing::TempDir() + "presync_trace_file_test") {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  ~TraceFileTest() override { std::filesystem::remove_all(folder_); }

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }

  std::string Stored(const std::string& name, const std::string& bytes) const {
    std::FILE* file = std::fopen(Path(name).c_str(), "wb");
    EXPECT_EQ(std::fwrite(bytes.data(), 1, bytes.size(), file), bytes.size());
    std::fclose(file);
    return Path(name);
  }

 private:
  std::string folder_;
};

Trace SomeTrace() {
  Trace trace({4096, 100'000, 100'000});
  for (PageIndex scan = 0; scan < 3000; ++scan) {
    std::vector<PageRun> written;
    for (PageIndex run = 0; run < scan % 40; ++run) written.push_back({run * 2000 + scan, 3});
    trace.AddScan(written);
  }
  return trace;
}

std::string Encode(const Trace& trace) {
  std::string bytes;
  AppendTraceHeader(trace.header(), &bytes);
  for (size_t i = 0; i < trace.scans(); ++i) AppendTraceScan(trace.Scan(i), &bytes);
  return bytes;
}

std::string Compress(const std::string& bytes) {
  std::string out(ZSTD_compressBound(bytes.size()), 0);
  out.resize(ZSTD_compress(out.data(), out.size(), bytes.data(), bytes.size(), 3));
  return out;
}

TEST_F(TraceFileTest, PlainAndCompressedComeBackTheSame) {
  const Trace trace = SomeTrace();
  for (const char* name : {"a.pstrace", "a.pstrace.zst"}) {
    auto writer = TraceFileWriter::Create(Path(name), trace.header());
    ASSERT_TRUE(writer.ok()) << writer.status();
    for (size_t i = 0; i < trace.scans(); ++i) ASSERT_TRUE(writer->AddScan(trace.Scan(i)).ok());
    ASSERT_TRUE(writer->Close().ok());
    const auto read = ReadTraceFile(Path(name));
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_TRUE(*read == trace) << name;
  }
  EXPECT_EQ(std::filesystem::file_size(Path("a.pstrace")), Encode(trace).size());
  EXPECT_LT(std::filesystem::file_size(Path("a.pstrace.zst")), Encode(trace).size() / 4);
}

TEST_F(TraceFileTest, CompressionIsToldByContentNotByName) {
  const Trace trace = SomeTrace();
  const std::string bytes = Encode(trace);
  const auto read = ReadTraceFile(Stored("named.pstrace", Compress(bytes)));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_TRUE(*read == trace);
  // Several frames one after another are one stream, as zstd's own tool has it.
  const auto two =
      ReadTraceFile(Stored("two", Compress(bytes.substr(0, 1000)) + Compress(bytes.substr(1000))));
  ASSERT_TRUE(two.ok()) << two.status();
  EXPECT_TRUE(*two == trace);
}

TEST_F(TraceFileTest, ErrorsNameFileAndOffset) {
  EXPECT_EQ(ReadTraceFile(Path("absent")).status().code(), absl::StatusCode::kNotFound);
  const std::string bytes = Encode(SomeTrace());
  const auto expect = [&](const std::string& path, const std::string& what) {
    const absl::Status status = ReadTraceFile(path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), ::testing::AllOf(HasSubstr(path), HasSubstr(what)));
  };
  const std::string cut = bytes.substr(0, bytes.size() - 1);
  const std::string where = "offset " + std::to_string(cut.size()) + ":";
  expect(Stored("cut", cut), where);
  expect(Stored("cut.zst", Compress(cut)), where);
  expect(Stored("empty", ""), "offset 0:");
  const std::string compressed = Compress(bytes);
  expect(Stored("short.zst", compressed.substr(0, compressed.size() / 2)),
         "ends before its stream");
  std::string damaged = compressed;
  damaged.replace(4, 8, 8, '\xff');
  expect(Stored("damaged.zst", damaged), "zstd says");
}

// 2 GiB of empty scans in some tens of KB.
TEST_F(TraceFileTest, RefusesABombWithoutHoldingIt) {
  std::string bytes;
  AppendTraceHeader({4096, 100'000, 1000}, &bytes);
  std::string bomb = Compress(bytes);
  const std::string empty_scans = Compress(std::string(64 << 20, 0));
  for (int i = 0; i < 32; ++i) bomb += empty_scans;
  ASSERT_LT(bomb.size(), 1u << 20);
  const absl::Status status = ReadTraceFile(Stored("bomb.zst", bomb)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("offset 16777240:"));
}

}  // namespace
}  // namespace presync
