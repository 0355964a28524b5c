// reader MODE DEVICE - reads a disk of known content for ever and compares all that it got with
// what the disk must hold, at once and again later.
//
// MODE direct: past the page cache (O_DIRECT), into a pool of buffers. MODE cached: through the
// page cache, of which a quarter is dropped now and then.
//
// The disk is one of tools/lab/slow_fs.c: its i-th 64-bit word is DiskWord(i). What is wrong, and
// twice a second what was done so far, goes to the serial line, one JSON object a line.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "disk_pattern.h"

enum {
  kThreads = 8,
  kBuffers = 512,
  kChunkBytes = 16 << 10,
  kPageBytes = 4096,
  kThinkUs = 20000,  // between two reads of a thread, on average
};

struct Buffer {
  pthread_mutex_t lock;
  uint64_t offset;  // on the disk
  int filled;
  int told;  // it was said that this content is wrong
  char* bytes;
};

static int disk;
static uint64_t disk_bytes;
static int cached;
static struct Buffer buffers[kBuffers];
static atomic_ulong reads, wrong_at_once, wrong_later, errors;
static FILE* serial;

static void Tell(const char* format, ...) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  va_list arguments;
  va_start(arguments, format);
  pthread_mutex_lock(&lock);
  fputs("reader: ", serial);
  vfprintf(serial, format, arguments);
  fputc('\n', serial);
  fflush(serial);
  pthread_mutex_unlock(&lock);
  va_end(arguments);
}

// Pages of a chunk that are not what the disk holds at `offset`.
static int WrongPages(const char* bytes, uint64_t offset) {
  int wrong = 0;
  for (size_t page = 0; page < kChunkBytes; page += kPageBytes) {
    const uint64_t* words = (const uint64_t*)(bytes + page);
    size_t i = 0;
    // A disk writes whole sectors of 512 bytes: every eighth word is enough to see each of them.
    while (i < kPageBytes / 8 && words[i] == DiskWord((offset + page) / 8 + i)) i += 8;
    wrong += i < kPageBytes / 8;
  }
  return wrong;
}

static uint64_t Random(uint64_t* state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  return *state ^= *state << 17;
}

static void Pause(uint64_t* state) { usleep(kThinkUs / 2 + Random(state) % kThinkUs); }

static uint64_t RandomOffset(uint64_t* state) {
  return Random(state) % (disk_bytes / kChunkBytes) * kChunkBytes;
}

static void* ReadDirect(void* argument) {
  const long me = (long)argument;
  uint64_t state = 88172645463325252ull + (uint64_t)me * 7919;
  for (long i = me;; i = (i + kThreads) % kBuffers) {
    struct Buffer* buffer = &buffers[i];
    pthread_mutex_lock(&buffer->lock);
    buffer->offset = RandomOffset(&state);
    buffer->filled = pread(disk, buffer->bytes, kChunkBytes, (off_t)buffer->offset) == kChunkBytes;
    buffer->told = 0;
    atomic_fetch_add(buffer->filled ? &reads : &errors, 1);
    const int wrong = buffer->filled ? WrongPages(buffer->bytes, buffer->offset) : 0;
    if (wrong) {
      atomic_fetch_add(&wrong_at_once, wrong);
      buffer->told = 1;
    }
    pthread_mutex_unlock(&buffer->lock);
    Pause(&state);
  }
  return NULL;
}

static void* ReadCached(void* argument) {
  uint64_t state = 88172645463325252ull + (uint64_t)(long)argument * 7919;
  char* bytes = malloc(kChunkBytes);
  for (;;) {
    const uint64_t offset = RandomOffset(&state);
    const int whole = pread(disk, bytes, kChunkBytes, (off_t)offset) == kChunkBytes;
    atomic_fetch_add(whole ? &reads : &errors, 1);
    const int wrong = whole ? WrongPages(bytes, offset) : 0;
    if (wrong) {
      atomic_fetch_add(&wrong_at_once, wrong);
      posix_fadvise(disk, (off_t)offset, kChunkBytes, POSIX_FADV_DONTNEED);  // counted once
    }
    Pause(&state);
  }
  return NULL;
}

// What was right when it came may have become wrong since; returns how many buffers were looked at.
static int LookAgain(void) {
  int looked = 0;
  for (int i = 0; i < kBuffers; ++i) {
    struct Buffer* buffer = &buffers[i];
    if (pthread_mutex_trylock(&buffer->lock) != 0) continue;  // it is being read into
    const int wrong = buffer->filled ? WrongPages(buffer->bytes, buffer->offset) : 0;
    looked += buffer->filled;
    if (wrong && !buffer->told) {
      atomic_fetch_add(&wrong_later, wrong);
      buffer->told = 1;
    }
    pthread_mutex_unlock(&buffer->lock);
  }
  return looked;
}

static void MakeBuffers(void) {
  char* all = mmap(NULL, (size_t)kBuffers * kChunkBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(all, 0xee, (size_t)kBuffers * kChunkBytes);
  for (int i = 0; i < kBuffers; ++i) {
    pthread_mutex_init(&buffers[i].lock, NULL);
    buffers[i].bytes = all + (size_t)i * kChunkBytes;
  }
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  cached = strcmp(argv[1], "cached") == 0;
  serial = fopen("/dev/ttyS0", "w");
  for (int tries = 0; tries < 100 && access(argv[2], R_OK) != 0; ++tries) usleep(100000);
  disk = open(argv[2], O_RDONLY | (cached ? 0 : O_DIRECT));
  if (serial == NULL || disk < 0) return 1;
  disk_bytes = (uint64_t)lseek(disk, 0, SEEK_END);
  if (cached) posix_fadvise(disk, 0, 0, POSIX_FADV_RANDOM);
  MakeBuffers();
  for (long i = 0; i < kThreads; ++i) {
    pthread_t thread;
    pthread_create(&thread, NULL, cached ? ReadCached : ReadDirect, (void*)i);
  }
  FILE* progress = fopen("/run/presync/progress", "w");
  uint64_t state = 1;
  for (int round = 0;; ++round) {
    usleep(500000);
    const int looked = cached ? 0 : LookAgain();
    if (cached && round % 8 == 7) {
      const uint64_t part = disk_bytes / 4;
      posix_fadvise(disk, (off_t)(Random(&state) % 4 * part), (off_t)part, POSIX_FADV_DONTNEED);
    }
    if (progress != NULL) {
      rewind(progress);
      fprintf(progress, "%lu\n", atomic_load(&reads));
      fflush(progress);
    }
    Tell(
        "{\"round\": %d, \"reads\": %lu, \"wrong_at_once\": %lu, \"wrong_later\": %lu, "
        "\"looked_at\": %d, "
        "\"errors\": %lu}",
        round, atomic_load(&reads), atomic_load(&wrong_at_once), atomic_load(&wrong_later), looked,
        atomic_load(&errors));
  }
}
