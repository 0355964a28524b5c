/* Stands in for QEMU: maps files as guest RAM and does with them what it is told on stdin. Runs
 * with the library preloaded. Arguments: "fd:pages" or "fd:pages:split" (mapped in two pieces), one
 * a region. Each command is a struct guest_command, each answer an int32_t: 0 or an errno. */
#include "synthetic_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "qemu-glue/plugin/kernel_abi.h"

#define PAGE 4096
#define MAX_REGIONS 4
#define WRITERS 2

static struct {
  int fd;
  uint32_t pages;
  char* pieces[2]; /* of pages / 2 each if split, else the second is the middle of the first */
} regions[MAX_REGIONS];
static int region_count;
static atomic_bool writers_stop;
static pthread_t writers[WRITERS];
static uint64_t seeds[WRITERS];
static useconds_t rest_us;
static int other_uffd = -1;

static volatile char* page_of(uint32_t region, uint32_t page) {
  const uint32_t half = regions[region].pages / 2;
  return page < half ? regions[region].pieces[0] + (size_t)page * PAGE
                     : regions[region].pieces[1] + (size_t)(page - half) * PAGE;
}

static uint64_t next_random(uint64_t* state) { /* xorshift64, Marsaglia 2003 */
  *state ^= *state << 13;
  *state ^= *state >> 7;
  *state ^= *state << 17;
  return *state;
}

static void* write_at_random(void* seed) {
  uint64_t state = *(uint64_t*)seed;
  while (!atomic_load(&writers_stop)) {
    const uint64_t value = next_random(&state);
    const uint32_t region = (uint32_t)(value >> 40) % (uint32_t)region_count;
    const uint32_t page = (uint32_t)(value >> 8) % regions[region].pages;
    *(volatile uint64_t*)(page_of(region, page) + value % 500 * 8) = value;
    if (rest_us > 0) usleep(rest_us);
  }
  return NULL;
}

static int read_into(char* page) {
  int ends[2];
  if (pipe(ends) != 0) return errno;
  const char byte = (char)(*page + 1);
  const bool ok = write(ends[1], &byte, 1) == 1 && read(ends[0], page, 1) == 1;
  const int error = errno;
  close(ends[0]);
  close(ends[1]);
  return ok ? 0 : error;
}

static int vm_write(char* page) {
  char byte = (char)(*page + 1);
  struct iovec from = {&byte, 1}, to = {page, 1};
  return process_vm_writev(getpid(), &from, 1, &to, 1, 0) == 1 ? 0 : errno;
}

static int register_other(uint32_t region) {
  if (other_uffd >= 0) close(other_uffd);
  other_uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
  if (other_uffd < 0) return errno;
  struct uffdio_api api = {.api = UFFD_API};
  struct uffdio_register whole = {.range = {.start = (uint64_t)(uintptr_t)regions[region].pieces[0],
                                            .len = (uint64_t)regions[region].pages * PAGE},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
  if (ioctl(other_uffd, UFFDIO_API, &api) != 0) return errno;
  return ioctl(other_uffd, UFFDIO_REGISTER, &whole) == 0 ? 0 : errno;
}

static int for_each_page(const struct guest_command* c) {
  for (uint32_t page = c->page; page < c->page + c->count; ++page) {
    char* at = (char*)page_of(c->region, page);
    int error = 0;
    if (c->op == GUEST_STORE) ++*(volatile char*)at;
    if (c->op == GUEST_READ_INTO) error = read_into(at);
    if (c->op == GUEST_VM_WRITE) error = vm_write(at);
    if (error != 0) return error;
  }
  return 0;
}

static int carry_out(const struct guest_command* c) {
  switch (c->op) {
    case GUEST_STORE:
    case GUEST_READ_INTO:
    case GUEST_VM_WRITE:
      return for_each_page(c);
    case GUEST_START_WRITERS:
      atomic_store(&writers_stop, false);
      rest_us = c->count > 0 ? c->count - 1 : 0;
      for (int i = 0; i < WRITERS; ++i) {
        seeds[i] = c->seed + (uint64_t)i + 1;
        const int error = pthread_create(&writers[i], NULL, write_at_random, &seeds[i]);
        if (error != 0) return error;
      }
      return 0;
    case GUEST_STOP_WRITERS:
      atomic_store(&writers_stop, true);
      for (int i = 0; i < WRITERS; ++i) pthread_join(writers[i], NULL);
      return 0;
    case GUEST_REGISTER_OTHER:
      return register_other(c->region);
    case GUEST_MAP_AGAIN:
      return mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, regions[c->region].fd, 0) ==
                     MAP_FAILED
                 ? errno
                 : 0;
    case GUEST_UNMAP:
      return munmap(regions[c->region].pieces[0], (size_t)regions[c->region].pages * PAGE) == 0
                 ? 0
                 : errno;
    default:
      return EINVAL;
  }
}

static bool map_region(const char* argument) {
  char kind[8] = "";
  int fd;
  unsigned pages;
  if (sscanf(argument, "%d:%u:%7s", &fd, &pages, kind) < 2) return false;
  const size_t bytes = (size_t)pages * PAGE, half = (size_t)(pages / 2) * PAGE;
  const bool split = strcmp(kind, "split") == 0;
  char* first = mmap(NULL, split ? half : bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (first == MAP_FAILED) return false;
  char* second = first + half;
  if (split) {
    /* Something unrelated lies between the two pieces. */
    char* apart = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (apart == MAP_FAILED) return false;
    second =
        mmap(apart, bytes - half, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)half);
    if (second == MAP_FAILED) return false;
  }
  regions[region_count].fd = fd;
  regions[region_count].pages = pages;
  regions[region_count].pieces[0] = first;
  regions[region_count++].pieces[1] = second;
  return true;
}

int main(int argc, char** argv) {
  for (int i = 1; i < argc && i <= MAX_REGIONS; ++i) {
    if (!map_region(argv[i])) return 2;
  }
  struct guest_command command;
  int32_t answer = 0; /* the first one says: ready */
  do {
    if (write(STDOUT_FILENO, &answer, sizeof(answer)) != sizeof(answer)) return 0;
    if (read(STDIN_FILENO, &command, sizeof(command)) != sizeof(command)) return 0;
    answer = carry_out(&command);
  } while (true);
}
