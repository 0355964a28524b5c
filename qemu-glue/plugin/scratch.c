#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "glue.h"

#define PRESYNC_SCRATCH_BYTES (PRESYNC_GLUE_SCRATCH_PAGES * PRESYNC_GLUE_PAGE_BYTES)
#define PRESYNC_SCRATCH_PATIENCE_S                               \
  2 /* a fault takes microseconds; this is for a host that swaps \
     */

/* Memory of the kind that guest RAM is: shared, and of a file. */
static void* map_memory(void) {
  const int fd = memfd_create("presync-scratch", MFD_CLOEXEC);
  if (fd < 0) return NULL;
  void* memory = MAP_FAILED;
  if (ftruncate(fd, PRESYNC_SCRATCH_BYTES) == 0) {
    memory = mmap(NULL, PRESYNC_SCRATCH_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  close(fd);
  return memory == MAP_FAILED ? NULL : memory;
}

struct presync_result presync_scratch_open(struct presync_scratch* scratch, uint32_t mode,
                                           int device) {
  presync_scratch_close(scratch);
  scratch->memory = map_memory();
  if (scratch->memory == NULL) return (struct presync_result){ENOMEM, PRESYNC_GLUE_STEP_MAPS};
  const struct presync_result result = presync_range_open(
      &scratch->range, (uint64_t)(uintptr_t)scratch->memory, PRESYNC_SCRATCH_BYTES, mode, device);
  if (result.error != 0) presync_scratch_close(scratch);
  return result;
}

struct trial {
  volatile char* page;
  int error;
  int over; /* an end of a pipe, closed when both are written */
};

static void write_both_ways(struct trial* trial) {
  *trial->page = 1;
  int ends[2];
  if (pipe(ends) != 0) {
    trial->error = errno;
    return;
  }
  const char byte = 1;
  if (write(ends[1], &byte, 1) != 1 ||
      read(ends[0], (char*)trial->page + PRESYNC_GLUE_PAGE_BYTES, 1) != 1) {
    trial->error = errno;
  }
  close(ends[0]);
  close(ends[1]);
}

static void* run_trial(void* argument) {
  struct trial* trial = argument;
  write_both_ways(trial);
  close(trial->over);
  return NULL;
}

struct presync_result presync_scratch_write(struct presync_scratch* scratch,
                                            uint64_t page_address) {
  struct presync_result result = {EINVAL, PRESYNC_GLUE_STEP_REQUEST};
  const uint64_t offset = page_address - scratch->range.start;
  if (scratch->memory == NULL || offset % PRESYNC_GLUE_PAGE_BYTES != 0 ||
      offset > PRESYNC_SCRATCH_BYTES - 2 * PRESYNC_GLUE_PAGE_BYTES) {
    return result;
  }
  int over[2];
  result.step = PRESYNC_GLUE_STEP_THREAD;
  if (pipe2(over, O_CLOEXEC) != 0) {
    result.error = errno;
    return result;
  }
  struct trial trial = {(volatile char*)scratch->memory + offset, 0, over[1]};
  pthread_t writer;
  result.error = presync_thread_start(&writer, run_trial, &trial);
  if (result.error != 0) {
    close(over[0]);
    close(over[1]);
    return result;
  }

  struct pollfd until_over = {.fd = over[0], .events = POLLIN};
  result.step = PRESYNC_GLUE_STEP_WRITE;
  const bool in_time = poll(&until_over, 1, PRESYNC_SCRATCH_PATIENCE_S * 1000) > 0;
  if (!in_time) presync_range_close(&scratch->range); /* wakes the writer */
  pthread_join(writer, NULL);
  close(over[0]);
  result.error = in_time ? trial.error : ETIME;
  return result;
}

void presync_scratch_close(struct presync_scratch* scratch) {
  presync_range_close(&scratch->range);
  if (scratch->memory != NULL) munmap(scratch->memory, PRESYNC_SCRATCH_BYTES);
  memset(scratch, 0, sizeof(*scratch));
}
