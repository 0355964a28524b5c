#define _GNU_SOURCE
#include "evidence.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define RECORD_FILE "/data/agent.records"

enum {
  kPageSize = 4096,
  kWords = kPageSize / 8,
  kMaxFileRecords = 1 << 17,  // then the file starts over: 7 MB of the 64 MB disk
};

// A page of the area: every word depends on the index and the generation.
struct page {
  uint64_t index, generation, filling[kWords - 3], checksum;
};
_Static_assert(sizeof(struct page) == kPageSize, "a page is a page");

static struct evidence_config config;

static pthread_mutex_t area_lock = PTHREAD_MUTEX_INITIALIZER;  // for all of these
static struct page* area;
static uint64_t* generations;  // what each page's generation must be
static uint64_t rewrites;      // always the sum of `generations`
static size_t area_pages;
static atomic_bool check_wants_area;  // mutexes are not fair: a rewriter flat out would keep it

static pthread_mutex_t file_lock = PTHREAD_MUTEX_INITIALIZER;  // for all of these
static int record_fd = -1;
static uint64_t first_record, records;  // the file holds [first_record, records)
static uint64_t record_errors;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sleep_ns(uint64_t ns) {
  struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
  while (nanosleep(&t, &t) != 0 && errno == EINTR) {
  }
}

// The finaliser of splitmix64 (Steele, Lea, Flood 2014): scatters, and is cheap.
static uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t evidence_checksum(const uint64_t* words, size_t count) {
  uint64_t sum = 0x1234567;  // any start and an odd factor (FNV's) will do: no enemy writes here
  for (size_t i = 0; i < count; i++) sum = (sum ^ words[i]) * 0x100000001b3u + (sum >> 29);
  return sum;
}

// ---- the memory area ----

// `area_lock` held.
static void rewrite_page(size_t index) {
  struct page* page = &area[index];
  page->index = index;
  page->generation = ++generations[index];
  uint64_t word = mix(index << 32 ^ page->generation);
  for (size_t i = 0; i < kWords - 3; i++) page->filling[i] = word += 0x9e3779b97f4a7c15u;
  page->checksum = evidence_checksum(&page->index, kWords - 1);
  rewrites++;
}

static bool page_good(size_t index) {
  const struct page* page = &area[index];
  return page->index == index && page->generation == generations[index] &&
         page->checksum == evidence_checksum(&page->index, kWords - 1);
}

static size_t choose_page(uint64_t* random) {
  *random = mix(*random);
  size_t hot_pages = area_pages / 64;
  bool hot = config.pages_s != 0 && hot_pages != 0 && *random % 10 != 0;
  return (*random >> 8) % (hot ? hot_pages : area_pages);
}

static void* rewriter(void* unused) {
  (void)unused;
  uint64_t random = 1;
  uint64_t due = now_ns();
  for (;;) {
    pthread_mutex_lock(&area_lock);
    for (int i = config.pages_s ? 1 : 32; i > 0; i--) rewrite_page(choose_page(&random));
    pthread_mutex_unlock(&area_lock);
    while (atomic_load(&check_wants_area)) sleep_ns(1000000);
    if (config.pages_s == 0) continue;
    uint64_t now = now_ns(), step = 1000000000u / (uint64_t)config.pages_s;
    due += step;
    if (due > now) {
      sleep_ns(due - now);
    } else if (now - due > 1000000000u) {
      due = now;  // it was held up for long: no burst to catch up
    }
  }
  return NULL;
}

// ---- the file ----

// "number time checksum\n" in hexadecimal.
enum { kRecordSize = 3 * 17 };

static uint64_t record_sum(uint64_t number, uint64_t ns) { return mix(number ^ mix(ns)); }

static void append_record(void) {
  if (records - first_record >= kMaxFileRecords) {
    if (ftruncate(record_fd, 0) != 0) record_errors++;
    first_record = records;
  }
  char text[kRecordSize + 1];
  uint64_t ns = now_ns();
  snprintf(text, sizeof text, "%016" PRIx64 " %016" PRIx64 " %016" PRIx64 "\n", records, ns,
           record_sum(records, ns));
  off_t where = (off_t)((records - first_record) * kRecordSize);
  if (pwrite(record_fd, text, kRecordSize, where) != kRecordSize || fsync(record_fd) != 0) {
    record_errors++;
    return;  // the same number again next time
  }
  records++;
}

static void* recorder(void* unused) {
  (void)unused;
  for (;;) {
    pthread_mutex_lock(&file_lock);
    append_record();
    pthread_mutex_unlock(&file_lock);
    sleep_ns((uint64_t)config.record_ms * 1000000u);
  }
  return NULL;
}

// `file_lock` held.  Returns how many records are wrong or missing.
static uint64_t bad_records(void) {
  char text[kRecordSize + 1] = {0};
  uint64_t bad = 0;
  FILE* file = fopen(RECORD_FILE, "r");
  if (file == NULL) return records - first_record;
  for (uint64_t i = first_record; i < records; i++) {
    uint64_t number = 0, ns = 0, sum = 0;
    if (fread(text, kRecordSize, 1, file) != 1 ||
        sscanf(text, "%" SCNx64 " %" SCNx64 " %" SCNx64, &number, &ns, &sum) != 3 || number != i ||
        sum != record_sum(number, ns)) {
      bad++;
    }
  }
  if (fgetc(file) != EOF) bad++;  // more than was written
  fclose(file);
  return bad;
}

// ---- both ----

struct evidence evidence_check(void) {
  struct evidence found = {.pages = area_pages};
  uint64_t sum = 0;
  if (area == NULL) return found;
  atomic_store(&check_wants_area, true);
  pthread_mutex_lock(&area_lock);
  for (size_t i = 0; i < area_pages; i++) {
    found.pages_bad += !page_good(i);
    sum += generations[i];
  }
  found.counter = rewrites;
  found.counter_bad = rewrites != sum;
  pthread_mutex_unlock(&area_lock);
  atomic_store(&check_wants_area, false);

  pthread_mutex_lock(&file_lock);
  found.file_records = records - first_record;
  found.file_errors = record_errors;
  found.file_bad = bad_records();
  posix_fadvise(record_fd, 0, 0, POSIX_FADV_DONTNEED);  // now from the disk
  found.file_bad += bad_records();
  pthread_mutex_unlock(&file_lock);
  return found;
}

bool evidence_start(const struct evidence_config* wanted) {
  config = *wanted;
  area_pages = (size_t)config.area_mb * 256;
  area = mmap(NULL, area_pages * kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
              0);
  generations = calloc(area_pages, sizeof *generations);
  if (area == MAP_FAILED || generations == NULL) {
    fprintf(stderr, "agent: no memory for an area of %ld MiB\n", config.area_mb);
    return false;
  }
  for (size_t i = 0; i < area_pages; i++) rewrite_page(i);
  record_fd = open(RECORD_FILE, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (record_fd < 0) {
    fprintf(stderr, "agent: cannot open %s: %s\n", RECORD_FILE, strerror(errno));
    return false;
  }
  pthread_t thread;
  if (pthread_create(&thread, NULL, rewriter, NULL) != 0 ||
      pthread_create(&thread, NULL, recorder, NULL) != 0) {
    fprintf(stderr, "agent: cannot start a thread\n");
    return false;
  }
  return true;
}
