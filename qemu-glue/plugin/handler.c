#include <errno.h>
#include <poll.h>
#include <unistd.h>

#include "glue.h"
#include "kernel_abi.h"

/* A vCPU or a thread waits on one fault at a time, so a batch is as long as QEMU has busy threads.
 */
#define PRESYNC_BATCH 64

static void mark(const struct presync_range* range, const struct uffd_msg* messages, size_t count) {
  uint64_t* words = (uint64_t*)((char*)range->bitmap + PRESYNC_GLUE_BITMAP_OFFSET);
  for (size_t i = 0; i < count; ++i) {
    const uint64_t page =
        (messages[i].arg.pagefault.address - range->start) / PRESYNC_GLUE_PAGE_BYTES;
    __atomic_fetch_or(&words[page / 64], UINT64_C(1) << (page % 64), __ATOMIC_SEQ_CST);
  }
}

/* Lets the writers of one page go on. Always wakes them, whatever becomes of the protection. */
static int unprotect(const struct presync_range* range, uint64_t address) {
  struct uffdio_writeprotect page = {.range = {.start = address, .len = PRESYNC_GLUE_PAGE_BYTES}};
  int error;
  do {
    error = ioctl(range->uffd, UFFDIO_WRITEPROTECT, &page) == 0 ? 0 : errno;
  } while (error == EAGAIN || error == EINTR); /* the address space is changing just now */
  if (error != 0) {
    struct uffdio_range waiters = page.range;
    ioctl(range->uffd, UFFDIO_WAKE, &waiters);
  }
  return error;
}

/* Keeps the write faults within the range, aligned to pages; returns how many. */
static size_t keep_write_faults(const struct presync_range* range, struct uffd_msg* messages,
                                size_t count) {
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t address =
        messages[i].arg.pagefault.address & ~(uint64_t)(PRESYNC_GLUE_PAGE_BYTES - 1);
    if (messages[i].event != UFFD_EVENT_PAGEFAULT || address < range->start ||
        address - range->start >= range->bytes) {
      continue;
    }
    messages[kept] = messages[i];
    messages[kept++].arg.pagefault.address = address;
  }
  return kept;
}

/* See struct presync_glue_bitmap for why the bits are set twice. */
static int handle_batch(struct presync_range* range, struct uffd_msg* messages, size_t count) {
  struct presync_glue_bitmap* bitmap = range->bitmap;
  int error = 0;
  count = keep_write_faults(range, messages, count);
  __atomic_fetch_add(&bitmap->batches, 1, __ATOMIC_SEQ_CST);
  mark(range, messages, count);
  for (size_t i = 0; i < count; ++i) {
    const int failed = unprotect(range, messages[i].arg.pagefault.address);
    if (failed != 0) error = failed;
  }
  mark(range, messages, count);
  __atomic_fetch_add(&bitmap->events, count, __ATOMIC_RELAXED);
  __atomic_fetch_add(&bitmap->batches, 1, __ATOMIC_SEQ_CST);
  return error;
}

/* Sleeps until there is an event. False: the range is being closed. */
static bool wait_for_event(const struct presync_range* range) {
  struct pollfd fds[2] = {{.fd = range->uffd, .events = POLLIN},
                          {.fd = range->stop_fd, .events = POLLIN}};
  poll(fds, 2, -1);
  return fds[1].revents == 0;
}

void* presync_handler_run(void* argument) {
  struct presync_range* range = argument;
  struct uffd_msg messages[PRESYNC_BATCH];
  int error = 0;
  while (error == 0) {
    const ssize_t bytes = read(range->uffd, messages, sizeof(messages));
    if (bytes >= 0) {
      error = handle_batch(range, messages, (size_t)bytes / sizeof(messages[0]));
    } else if (errno == EAGAIN) {
      if (!wait_for_event(range)) return NULL;
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  /* The guest comes first: say that the log is broken, then let every page go. */
  __atomic_store_n(&range->bitmap->broken, (uint32_t)error, __ATOMIC_SEQ_CST);
  presync_range_unregister(range);
  return NULL;
}
