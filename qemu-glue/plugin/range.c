#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "glue.h"
#include "kernel_abi.h"

static size_t bitmap_file_bytes(uint64_t range_bytes) {
  const uint64_t pages = range_bytes / PRESYNC_GLUE_PAGE_BYTES;
  const uint64_t bytes = PRESYNC_GLUE_BITMAP_OFFSET + (pages + 63) / 64 * sizeof(uint64_t);
  return (size_t)((bytes + PRESYNC_GLUE_PAGE_BYTES - 1) / PRESYNC_GLUE_PAGE_BYTES *
                  PRESYNC_GLUE_PAGE_BYTES);
}

/* The bitmap's memory is reserved now and sealed against resizing, so that the handler's writes to
 * it can't fail later, whatever the client does to its descriptor. */
static int open_bitmap(struct presync_range* range) {
  range->bitmap_bytes = bitmap_file_bytes(range->bytes);
  range->bitmap_fd = memfd_create("presync-dirty", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (range->bitmap_fd < 0) return errno;
  const off_t bytes = (off_t)range->bitmap_bytes;
  if (fallocate(range->bitmap_fd, 0, 0, bytes) != 0 ||
      fcntl(range->bitmap_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return errno;
  }
  void* memory =
      mmap(NULL, range->bitmap_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, range->bitmap_fd, 0);
  if (memory == MAP_FAILED) return errno;
  range->bitmap = memory;
  range->bitmap->bytes = range->bytes;
  range->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  return range->stop_fd < 0 ? errno : 0;
}

/* Frees all but the registration and the thread. */
static void free_fields(struct presync_range* range) {
  if (range->bitmap != NULL) munmap(range->bitmap, range->bitmap_bytes);
  if (range->bitmap_fd >= 0) close(range->bitmap_fd);
  if (range->stop_fd >= 0) close(range->stop_fd);
  if (range->uffd >= 0) close(range->uffd);
  memset(range, 0, sizeof(*range));
}

static struct presync_result open_fields(struct presync_range* range, int device) {
  struct presync_result result = {0, PRESYNC_GLUE_STEP_NONE};
  range->uffd = presync_uffd_open(range->mode, device, &result);
  if (range->uffd < 0) return result;
  if (range->mode == PRESYNC_GLUE_MODE_HANDLER) {
    result.error = open_bitmap(range);
    if (result.error != 0) result.step = PRESYNC_GLUE_STEP_BITMAP;
  }
  return result;
}

struct presync_result presync_range_open(struct presync_range* range, uint64_t start,
                                         uint64_t bytes, uint32_t mode, int device) {
  *range = (struct presync_range){
      .start = start, .bytes = bytes, .mode = mode, .uffd = -1, .bitmap_fd = -1, .stop_fd = -1};
  struct presync_result result = open_fields(range, device);
  if (result.error != 0) {
    free_fields(range);
    return result;
  }
  struct uffdio_register registration = {.range = {.start = start, .len = bytes},
                                         .mode = UFFDIO_REGISTER_MODE_WP};
  if (ioctl(range->uffd, UFFDIO_REGISTER, &registration) != 0) {
    result = (struct presync_result){errno, PRESYNC_GLUE_STEP_REGISTER};
    free_fields(range);
    return result;
  }
  if (mode == PRESYNC_GLUE_MODE_HANDLER) {
    result.error = presync_thread_start(&range->thread, presync_handler_run, range);
    if (result.error != 0) {
      result.step = PRESYNC_GLUE_STEP_THREAD;
      presync_range_unregister(range);
      free_fields(range);
    }
  }
  return result;
}

/* Unregistering wakes those that wait for a missing page, not those that wait for a protected one,
 * and the last descriptor may be elsewhere (the client has a copy): without the wake after it a
 * vCPU would wait for ever. Both calls fail only if the memory is unmapped: nobody waits then. */
void presync_range_unregister(const struct presync_range* range) {
  struct uffdio_range whole = {.start = range->start, .len = range->bytes};
  ioctl(range->uffd, UFFDIO_UNREGISTER, &whole);
  whole = (struct uffdio_range){.start = range->start, .len = range->bytes};
  ioctl(range->uffd, UFFDIO_WAKE, &whole);
}

void presync_range_close(struct presync_range* range) {
  if (range->bytes == 0) return;
  presync_range_unregister(range);
  if (range->mode == PRESYNC_GLUE_MODE_HANDLER) {
    const uint64_t one = 1;
    /* An eventfd at 0 always takes 1. */
    while (write(range->stop_fd, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
    pthread_join(range->thread, NULL);
  }
  free_fields(range);
}
