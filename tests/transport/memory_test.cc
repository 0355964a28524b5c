#include "transport/memory.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "tests/transport/scratch_memory.h"

namespace presync {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr uint64_t kSize = 64 * kPageBytes;

class RegionTest : public ::testing::Test {
 protected:
  ~RegionTest() override { std::filesystem::remove_all(path_); }
  bool exists() const { return std::filesystem::exists(path_); }
  const std::string path_ = ScratchPath();
};

// Whether /proc/self/smaps says of the mapping at `address` that core dumps leave it out ("dd").
bool IsLeftOutOfDumps(const std::byte* address) {
  std::ifstream smaps("/proc/self/smaps");
  const std::string begin = absl::StrFormat("%x-", reinterpret_cast<uintptr_t>(address));
  bool found = false;
  for (std::string line; std::getline(smaps, line);) {
    found = found || line.starts_with(begin);
    if (found && line.starts_with("VmFlags:")) return absl::StrContains(line + " ", " dd ");
  }
  return false;
}

TEST_F(RegionTest, NoCoreDumpHasItsMemory) {
  auto made = Region::Create("pc.ram", path_, kSize);
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_TRUE(IsLeftOutOfDumps(made->data()));
  auto opened = Region::Open("pc.ram", path_, kSize);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_TRUE(IsLeftOutOfDumps(opened->data()));
}

TEST_F(RegionTest, CreateReservesAllItsMemoryPrivatelyAndZeroed) {
  auto region = Region::Create("pc.ram", path_, kSize);
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(region->name(), "pc.ram");
  EXPECT_EQ(region->path(), path_);
  EXPECT_EQ(region->pages(), 64u);
  struct stat file;
  ASSERT_EQ(fstat(region->fd(), &file), 0);
  EXPECT_EQ(file.st_mode & 0777, 0600u);
  EXPECT_EQ(static_cast<uint64_t>(file.st_size), kSize);
  EXPECT_GE(static_cast<uint64_t>(file.st_blocks) * 512, kSize);
  EXPECT_TRUE(std::all_of(region->data(), region->data() + kSize,
                          [](std::byte b) { return b == std::byte{0}; }));
}

TEST_F(RegionTest, CreateLeavesAFileThatIsInTheWayAlone) {
  std::ofstream(path_) << "mine";
  EXPECT_EQ(Region::Create("r", path_, kSize).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(std::filesystem::file_size(path_), 4u);
}

TEST_F(RegionTest, CreateNeverFollowsASymbolicLink) {
  const std::string elsewhere = ScratchPath();
  std::filesystem::create_symlink(elsewhere, path_);
  EXPECT_EQ(Region::Create("r", path_, kSize).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_FALSE(std::filesystem::exists(elsewhere));
  std::filesystem::remove(path_);
  // Nor one that a folder in the path is.
  std::filesystem::create_directory(elsewhere);
  std::filesystem::create_directory_symlink(elsewhere, path_);
  EXPECT_EQ(Region::Create("r", path_ + "/ram", kSize).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(std::filesystem::is_empty(elsewhere));
  std::filesystem::remove(path_);
  std::filesystem::remove(elsewhere);
}

TEST_F(RegionTest, CreateSaysWhatIsMissingAndLeavesNothing) {
  // More than any host has, less than the 16 TiB that fit into a page index.
  const auto status = Region::Create("r", path_, uint64_t{15} << 40).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr(path_), HasSubstr("needs 15728640 MiB"), HasSubstr("free")));
  EXPECT_FALSE(exists());
}

TEST_F(RegionTest, CreateRefusesAFileSystemThatIsNotMemory) {
  char folder[] = "/var/tmp/presync-test-XXXXXX";
  ASSERT_NE(mkdtemp(folder), nullptr);
  absl::Cleanup remove = [&] { std::filesystem::remove_all(folder); };
  const std::string path = std::string(folder) + "/ram";
  const auto status = Region::Create("r", path, kSize).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("tmpfs"));
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST_F(RegionTest, RefusesSizesThatAreNoPages) {
  for (const uint64_t size : {uint64_t{0}, kPageBytes - 1, kPageBytes + 1, uint64_t{1} << 44}) {
    EXPECT_EQ(Region::Create("r", path_, size).status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(Region::Open("r", path_, size).status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_FALSE(exists());
  }
}

TEST_F(RegionTest, OpenSeesWhatAnotherMappingWrites) {
  auto owner = Region::Create("r", path_, kSize);
  ASSERT_TRUE(owner.ok()) << owner.status();
  auto opened = Region::Open("r", path_, kSize);
  ASSERT_TRUE(opened.ok()) << opened.status();
  memset(owner->data() + kPageBytes, 7, 10);
  EXPECT_EQ(opened->data()[kPageBytes + 9], std::byte{7});
}

TEST_F(RegionTest, OpenTellsWhatIsWrong) {
  EXPECT_EQ(Region::Open("r", path_, kSize).status().code(), absl::StatusCode::kNotFound);
  std::ofstream(path_) << "short";
  const auto status = Region::Open("r", path_, kSize).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("5 bytes"), HasSubstr("262144")));
}

TEST_F(RegionTest, OpenTakesOnlyRegularFiles) {
  const std::string file = ScratchPath();
  ASSERT_TRUE(Region::Create("r", file, kSize).ok());
  absl::Cleanup remove = [&] { std::filesystem::remove(file); };
  std::filesystem::create_symlink(file, path_);
  EXPECT_EQ(Region::Open("r", path_, kSize).status().code(), absl::StatusCode::kFailedPrecondition);
  std::filesystem::remove(path_);
  std::filesystem::create_directory(path_);
  EXPECT_EQ(Region::Open("r", path_, kSize).status().code(), absl::StatusCode::kFailedPrecondition);
  std::filesystem::remove(path_);
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  EXPECT_EQ(Region::Open("r", path_, kSize).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(RegionTest, HolesAreWhatWasNeverWrittenOrWasPunched) {
  auto region = Region::Create("r", path_, kSize);
  ASSERT_TRUE(region.ok()) << region.status();
  memset(region->data(), 1, 40 * kPageBytes);
  ASSERT_EQ(fallocate(region->fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 3 * kPageBytes,
                      5 * kPageBytes),
            0);
  EXPECT_THAT(*region->Holes({0, 64}), ElementsAre(PageRun{3, 5}, PageRun{40, 24}));
  EXPECT_THAT(*region->Holes({5, 10}), ElementsAre(PageRun{5, 3}));
  EXPECT_THAT(*region->Holes({8, 32}), IsEmpty());
  EXPECT_THAT(*region->Holes({50, 2}), ElementsAre(PageRun{50, 2}));
  EXPECT_THAT(*region->Holes({50, 0}), IsEmpty());
}

TEST_F(RegionTest, LookingForHolesFillsNone) {
  std::ofstream(path_).close();
  std::filesystem::resize_file(path_, kSize);
  auto region = Region::Open("r", path_, kSize);
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_THAT(*region->Holes({0, 64}), ElementsAre(PageRun{0, 64}));
  struct stat file;
  ASSERT_EQ(fstat(region->fd(), &file), 0);
  EXPECT_EQ(file.st_blocks, 0);
}

TEST_F(RegionTest, MovesKeepTheMapping) {
  auto region = Region::Create("r", path_, kSize);
  ASSERT_TRUE(region.ok()) << region.status();
  std::byte* const data = region->data();
  Region moved = *std::move(region);
  EXPECT_EQ(moved.data(), data);
  auto other = ScratchMemory::Create({1});
  ASSERT_TRUE(other.ok());
  const std::string second = ScratchPath();
  absl::Cleanup remove = [&] { std::filesystem::remove(second); };
  auto target = Region::Create("s", second, kPageBytes);
  ASSERT_TRUE(target.ok()) << target.status();
  *target = std::move(moved);
  EXPECT_EQ(target->data(), data);
  EXPECT_EQ(target->pages(), 64u);
  target->data()[kSize - 1] = std::byte{1};
}

// Without a guard the first read ends the process by SIGBUS.
TEST_F(RegionTest, AFileThatIsCutHarmsOnlyWhoeverReadsIt) {
  auto region = Region::Create("r", path_, kSize);
  ASSERT_TRUE(region.ok()) << region.status();
  auto other = Region::Open("r", path_, kSize);
  ASSERT_TRUE(other.ok()) << other.status();
  std::memset(region->data(), 7, kSize);
  EXPECT_TRUE(region->Check().ok());
  Region moved = *std::move(region);  // the guard goes along
  ASSERT_EQ(ftruncate(moved.fd(), kSize / 2), 0);
  EXPECT_EQ(moved.data()[kSize - 1], std::byte{0});
  moved.data()[kSize - 1] = std::byte{1};
  const absl::Status damaged = moved.Check();
  EXPECT_TRUE(absl::IsDataLoss(damaged)) << damaged;
  EXPECT_THAT(std::string(damaged.message()), AllOf(HasSubstr(path_), HasSubstr("was cut to")));
  EXPECT_TRUE(absl::IsDataLoss(other->Check())) << "nobody has read it yet";
  // It stays so when the file is long again, for what was read is lost.
  ASSERT_EQ(ftruncate(moved.fd(), kSize), 0);
  EXPECT_TRUE(absl::IsDataLoss(moved.Check()));
  EXPECT_TRUE(other->Check().ok());
}

// A page that the host's hardware gave up. tests/rdma/one_machine has a kernel that can pretend.
TEST_F(RegionTest, APoisonedPageHarmsOnlyWhoeverReadsIt) {
  auto region = Region::Create("r", path_, kSize);
  ASSERT_TRUE(region.ok()) << region.status();
  std::memset(region->data(), 7, kSize);
  void* other = mmap(nullptr, kSize, PROT_READ, MAP_SHARED, region->fd(), 0);
  ASSERT_NE(other, MAP_FAILED);
  ASSERT_EQ(*static_cast<volatile char*>(other), 7);
  const int poisoned = madvise(other, kPageBytes, MADV_HWPOISON);
  const int error = errno;
  munmap(other, kSize);
  if (poisoned != 0) GTEST_SKIP() << "the kernel can't poison a page: errno " << error;
  EXPECT_EQ(region->data()[0], std::byte{0});
  EXPECT_TRUE(absl::IsDataLoss(region->Check())) << region->Check();
}

TEST_F(RegionTest, WhatTheKernelCannotReadIsDamagedToo) {
  auto region = Region::Create("r", path_, kSize);
  ASSERT_TRUE(region.ok()) << region.status();
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(ftruncate(region->fd(), 0), 0);
  EXPECT_EQ(write(ends[1], region->data(), 100), -1);
  EXPECT_EQ(errno, EFAULT);
  ASSERT_EQ(ftruncate(region->fd(), kSize), 0);
  EXPECT_TRUE(region->Check().ok());
  NoteUnreadable(&ends);
  EXPECT_TRUE(region->Check().ok());
  NoteUnreadable(region->data() + 100);
  EXPECT_TRUE(absl::IsDataLoss(region->Check()));
  close(ends[0]);
  close(ends[1]);
}

TEST_F(RegionTest, AFaultElsewhereIsWhatItAlwaysWas) {
  auto region = Region::Create("r", path_, kSize);
  ASSERT_TRUE(region.ok()) << region.status();
  const auto fault = [&] {
    void* own = mmap(nullptr, kSize, PROT_READ, MAP_SHARED, region->fd(), 0);
    if (ftruncate(region->fd(), 0) != 0) abort();
    EXPECT_EQ(*static_cast<volatile char*>(own), 0);
  };
  EXPECT_DEATH(fault(), "");
}

TEST(GuestMemoryTest, RefusesNoRegion) {
  EXPECT_EQ(GuestMemory::Create({}).status().code(), absl::StatusCode::kInvalidArgument);
}

class GuestMemoryOf : public ::testing::Test {
 protected:
  void SetUp() override {
    auto scratch = ScratchMemory::Create({3, 1, 5});
    ASSERT_TRUE(scratch.ok()) << scratch.status();
    scratch_ = *std::move(scratch);
  }
  const GuestMemory& memory() const { return scratch_->memory(); }
  std::unique_ptr<ScratchMemory> scratch_;
};

TEST_F(GuestMemoryOf, FlattensItsRegions) {
  EXPECT_EQ(memory().pages(), 9u);
  std::vector<size_t> regions;
  for (PageIndex page = 0; page < 9; ++page) regions.push_back(memory().RegionOf(page));
  EXPECT_THAT(regions, ElementsAre(0, 0, 0, 1, 2, 2, 2, 2, 2));
  EXPECT_EQ(memory().FirstPage(1), 3u);
  EXPECT_EQ(memory().FirstPage(3), 9u);
  EXPECT_EQ(memory().Bytes({5, 2}).data(), memory().regions()[2].data() + kPageBytes);
  EXPECT_EQ(memory().Bytes({5, 2}).size(), 2 * kPageBytes);
}

TEST_F(GuestMemoryOf, TakesRunsWithinOneRegionOnly) {
  for (const PageRun run : {PageRun{0, 3}, PageRun{3, 1}, PageRun{4, 5}, PageRun{8, 1}}) {
    EXPECT_TRUE(memory().IsWithinOneRegion(run)) << run.first << "+" << run.count;
  }
  for (const PageRun run : {PageRun{0, 0}, PageRun{0, 4}, PageRun{2, 2}, PageRun{8, 2},
                            PageRun{9, 1}, PageRun{4, UINT32_MAX}, PageRun{UINT32_MAX, 2}}) {
    EXPECT_FALSE(memory().IsWithinOneRegion(run)) << run.first << "+" << run.count;
  }
}

TEST_F(GuestMemoryOf, SplitsRunsAtRegionBorders) {
  EXPECT_THAT(memory().SplitAtRegions({1, 7}),
              ElementsAre(PageRun{1, 2}, PageRun{3, 1}, PageRun{4, 4}));
  EXPECT_THAT(memory().SplitAtRegions({4, 5}), ElementsAre(PageRun{4, 5}));
  EXPECT_THAT(memory().SplitAtRegions({4, 0}), IsEmpty());
}

TEST_F(GuestMemoryOf, FindsHolesAsFlatRuns) {
  scratch_->FillPage(1, 1);
  scratch_->FillPage(4, 1);
  EXPECT_THAT(*memory().Holes({0, 9}),
              ElementsAre(PageRun{0, 1}, PageRun{2, 1}, PageRun{3, 1}, PageRun{5, 4}));
}

}  // namespace
}  // namespace presync
