// The thread that handles write faults inside QEMU, at the moments that a real fault passes too
// fast: a pipe stands in for the userfaultfd, and ioctl is ours.
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <functional>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "qemu-glue/plugin/kernel_abi.h"
#include "transport/unique_fd.h"

extern "C" {
#include "qemu-glue/plugin/glue.h"
}

namespace presync {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr uint64_t kStart = uint64_t{1} << 40;
constexpr uint64_t kPages = 128;

// What the code under test calls; one test at a time.
std::function<int(const uffdio_writeprotect&)> on_unprotect;  // 0 or an errno
std::vector<uint64_t> woken;
int unregistered = 0;

}  // namespace
}  // namespace presync

extern "C" int __wrap_ioctl(int, unsigned long request, void* argument) {
  if (request == UFFDIO_WRITEPROTECT) {
    const int error = presync::on_unprotect(*static_cast<uffdio_writeprotect*>(argument));
    if (error == 0) return 0;
    errno = error;
    return -1;
  }
  EXPECT_EQ(request, static_cast<unsigned long>(UFFDIO_WAKE));
  presync::woken.push_back(static_cast<uffdio_range*>(argument)->start);
  return 0;
}

extern "C" void presync_range_unregister(const struct presync_range*) { ++presync::unregistered; }

namespace presync {
namespace {

class HandlerTest : public ::testing::Test {
 protected:
  HandlerTest() {
    int ends[2];
    EXPECT_EQ(::pipe2(ends, O_NONBLOCK | O_CLOEXEC), 0);
    faults_out_.reset(ends[0]);
    faults_in_.reset(ends[1]);
    stop_.reset(::eventfd(1, EFD_CLOEXEC));  // the handler ends when it finds nothing more to do
    range_.start = kStart;
    range_.bytes = kPages * PRESYNC_GLUE_PAGE_BYTES;
    range_.mode = PRESYNC_GLUE_MODE_HANDLER;
    range_.uffd = faults_out_.get();
    range_.stop_fd = stop_.get();
    range_.bitmap = reinterpret_cast<presync_glue_bitmap*>(memory_.data());
    woken.clear();
    unregistered = 0;
  }

  void Fault(uint64_t address, uint8_t event = UFFD_EVENT_PAGEFAULT) {
    uffd_msg message = {};
    message.event = event;
    message.arg.pagefault.address = address;
    ASSERT_EQ(::write(faults_in_.get(), &message, sizeof(message)),
              static_cast<ssize_t>(sizeof(message)));
  }

  uint64_t& Word(size_t index) { return memory_[PRESYNC_GLUE_BITMAP_OFFSET / 8 + index]; }

  std::vector<uint64_t> memory_ = std::vector<uint64_t>(PRESYNC_GLUE_BITMAP_OFFSET / 8 + 2);
  UniqueFd faults_out_, faults_in_, stop_;
  presync_range range_ = {};
};

TEST_F(HandlerTest, MarksBeforeAndAfterLiftingTheProtection) {
  Fault(kStart + 3 * 4096);
  on_unprotect = [&](const uffdio_writeprotect& request) {
    EXPECT_EQ(request.range.start, kStart + 3 * 4096);
    EXPECT_EQ(request.range.len, 4096u);
    EXPECT_EQ(request.mode, 0u) << "lifted, and the writer woken";
    EXPECT_EQ(Word(0), 1u << 3) << "marked before the write goes through";
    EXPECT_EQ(range_.bitmap->batches, 1u) << "odd: a look at the bitmap has to wait";
    Word(0) = 0;  // presyncd arms the page just now
    return 0;
  };
  presync_handler_run(&range_);
  EXPECT_EQ(Word(0), 1u << 3) << "the protection that was just lifted may have been a new one";
  EXPECT_EQ(range_.bitmap->batches, 2u);
  EXPECT_EQ(range_.bitmap->events, 1u);
  EXPECT_EQ(range_.bitmap->broken, 0u);
}

TEST_F(HandlerTest, AddressesWithinAPageAndFarPages) {
  Fault(kStart + 64 * 4096 + 123);
  Fault(kStart + 127 * 4096 + 4095);
  std::vector<uint64_t> lifted;
  on_unprotect = [&](const uffdio_writeprotect& request) {
    lifted.push_back((request.range.start - kStart) / 4096);
    return 0;
  };
  presync_handler_run(&range_);
  EXPECT_THAT(lifted, ElementsAre(64u, 127u));
  EXPECT_EQ(Word(0), 0u);
  EXPECT_EQ(Word(1), uint64_t{1} << 63 | 1);
}

TEST_F(HandlerTest, IgnoresWhatIsNotAWriteFaultOfTheRange) {
  Fault(kStart - 1);
  Fault(kStart + kPages * 4096);
  Fault(kStart, UFFD_EVENT_REMAP);
  on_unprotect = [](const uffdio_writeprotect&) {
    ADD_FAILURE() << "nothing to lift";
    return 0;
  };
  presync_handler_run(&range_);
  EXPECT_EQ(Word(0) | Word(1), 0u);
  EXPECT_EQ(unregistered, 0);
}

TEST_F(HandlerTest, TriesAgainWhileTheAddressSpaceChanges) {
  Fault(kStart);
  int tries = 0;
  on_unprotect = [&](const uffdio_writeprotect&) { return ++tries < 3 ? EAGAIN : 0; };
  presync_handler_run(&range_);
  EXPECT_EQ(tries, 3);
  EXPECT_EQ(range_.bitmap->broken, 0u);
}

TEST_F(HandlerTest, GivesTheRangeUpRatherThanLeaveAWriterWaiting) {
  Fault(kStart + 4096);
  on_unprotect = [](const uffdio_writeprotect&) { return ENOENT; };
  presync_handler_run(&range_);
  EXPECT_THAT(woken, ElementsAre(kStart + 4096));
  EXPECT_EQ(range_.bitmap->broken, static_cast<uint32_t>(ENOENT));
  EXPECT_EQ(unregistered, 1);
  EXPECT_EQ(range_.bitmap->batches, 2u);
}

TEST_F(HandlerTest, GivesTheRangeUpWhenEventsCantBeRead) {
  range_.uffd = -1;
  presync_handler_run(&range_);
  EXPECT_EQ(range_.bitmap->broken, static_cast<uint32_t>(EBADF));
  EXPECT_EQ(unregistered, 1);
  EXPECT_THAT(woken, IsEmpty());
}

}  // namespace
}  // namespace presync
