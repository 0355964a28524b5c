#include "qemu-glue/dirty_log/tracked_space.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <thread>

#include "qemu-glue/plugin/kernel_abi.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

constexpr size_t kBytes = 8 * kPageBytes;

// A QEMU that asked for events and reads none: a discard of it waits for its event to be read, and
// meanwhile the kernel says "again" to whoever would protect a page.
TEST(ProtectMemoryTest, AnEventThatNobodyReadsIsNotWaitedForWithoutEnd) {
  UniqueFd uffd(
      static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY)));
  if (!uffd.valid()) GTEST_SKIP() << "no userfaultfd here";
  uffdio_api api = {};
  api.api = UFFD_API;
  api.features =
      UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_EVENT_REMOVE;
  if (::ioctl(uffd.get(), UFFDIO_API, &api) != 0) GTEST_SKIP() << "the kernel lacks these features";
  void* const memory =
      ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  const auto address = reinterpret_cast<uint64_t>(memory);
  uffdio_register range = {};
  range.range = {address, kBytes};
  range.mode = UFFDIO_REGISTER_MODE_WP;
  ASSERT_EQ(::ioctl(uffd.get(), UFFDIO_REGISTER, &range), 0);
  EXPECT_TRUE(ProtectMemory(uffd.get(), address, kBytes, true).ok());

  std::thread discard([memory] { ::madvise(memory, kPageBytes, MADV_REMOVE); });
  const absl::Time begun = MonotonicNow();
  absl::Status status;
  while (status.ok() && MonotonicNow() < begun + absl::Seconds(60)) {  // until the discard is there
    status = ProtectMemory(uffd.get(), address, kBytes, true);
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(status.message(), HasSubstr("does not come to rest"));
  uffd.reset();  // lets the discard go on
  discard.join();
  ::munmap(memory, kBytes);
}

}  // namespace
}  // namespace presync
