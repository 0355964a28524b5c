// agent - the daemon in the test guest that tells whether a migration kept every byte.
//
// It beats on a virtio-serial port (so that lost time shows), keeps pages of memory and a file whose
// contents can be verified (so that lost writes show), and answers questions.
//
// Parameters, from the kernel's command line
//   presync.beat_ms=N    time between two beats, 1..1000 (10)
//   presync.area_mb=N    memory that is kept rewritten, 1..4096 MiB (16; 64 for presync.workload=hammer)
//   presync.pages_s=N    pages rewritten per second; 0 = as fast as it goes (50; 0 for hammer).
//                        Nine in ten rewrites hit the hot 1/64 of the area, the rest any page.
//                        With 0 all rewrites are spread evenly.
//   presync.record_ms=N  time between two records of the file, 10..60000 (200)
//   presync.spin=1       run units of work (see "work") all the time, at idle priority
//   presync.workload=X   only to be named in H, and for the defaults above
//
// Line protocol on /dev/virtio-ports/org.presync.agent.  Lines end in \n; no line is longer than 1 KiB.
//   Guest to host
//     H {json}      once, before the first beat: what runs, with which parameters
//     B n ns        beat n (0, 1, 2 ... without gaps) and the guest's CLOCK_MONOTONIC when it fell due
//                   to be noted.  A beat that woke up late is sent late, never left out.
//     L n           n beats were thrown away in the guest, as nobody had read the port for long
//                   (more than kQueue beats); the next B shows the gap too
//     C {json}      answer to check        W {json}  answer to work        E text  what was wrong
//   Host to guest
//     check         verify all pages, their bookkeeping, the counter and the file (cached and from
//                   the disk).  "pages_bad", "file_bad", "counter_bad", "beats_dropped" must be 0.
//                   Takes a while, during which beats go on; a second check waits for the first.
//     work          the counter of units of work done so far, at once
//     work MS       run units flat out for MS milliseconds (normal priority) and then answer
//                   {"work":total,"units":done,"wall_ns":taken,"cpu_ns":used}: units per cpu_ns is
//                   the guest's speed.  A unit checksums and rewrites pages: it pays for write
//                   tracking as any program does.
//
// Threads: main (beats and the port, real-time priority, never blocks on the port), rewriter,
// recorder, checker, worker.  `area_lock` guards the pages and their bookkeeping, `file_lock` the file.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
  kPageSize = 4096,
  kWords = kPageSize / 8,
  kQueue = 65536,             // beats kept while nobody reads: 11 minutes at 10 ms
  kReplies = 8192,            // bytes of answers kept while nobody reads
  kScratchPages = 64,         // what units of work rewrite
  kMaxFileRecords = 1 << 17,  // then the file starts over: 7 MB of the 64 MB disk
};

#define PORT "/dev/virtio-ports/org.presync.agent"
#define RECORD_FILE "/data/agent.records"
#define PROGRESS_FILE "/run/presync/progress"

// A page of the area: every word depends on the index and the generation.
struct page {
  uint64_t index, generation, filling[kWords - 3], checksum;
};
_Static_assert(sizeof(struct page) == kPageSize, "a page is a page");

struct beat {
  uint64_t number, ns;
};

static struct {
  long beat_ms, area_mb, pages_s, record_ms, spin;
  char workload[32];
} config = {.beat_ms = 10, .area_mb = 16, .pages_s = 50, .record_ms = 200, .workload = "idle"};

static pthread_mutex_t area_lock = PTHREAD_MUTEX_INITIALIZER;
static struct page *area;
static uint64_t *generations;     // what each page's generation must be
static uint64_t rewrites;         // the counter: always the sum of `generations`
static size_t area_pages;
static atomic_bool check_wants_area;  // mutexes are not fair: a rewriter flat out would keep it for ever

static pthread_mutex_t file_lock = PTHREAD_MUTEX_INITIALIZER;
static int record_fd = -1;
static uint64_t first_record, records;  // the file holds [first_record, records)
static uint64_t record_errors;

static atomic_ulong work_units;
static atomic_ulong beats_made, beats_dropped;

// Answers of other threads, which main sends between two beats.
static pthread_mutex_t reply_lock = PTHREAD_MUTEX_INITIALIZER;
static char replies[kReplies];
static size_t reply_bytes;
static int wake_pipe[2];

static uint64_t now_ns(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
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

static uint64_t checksum(const uint64_t *words, size_t count) {
  uint64_t sum = 0x1234567;
  for (size_t i = 0; i < count; i++) sum = (sum ^ words[i]) * 0x100000001b3u + (sum >> 29);
  return sum;
}

__attribute__((format(printf, 1, 2))) static void reply(const char *format, ...) {
  char line[1024];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (length < 0 || (size_t)length >= sizeof line) return;
  pthread_mutex_lock(&reply_lock);
  if (reply_bytes + (size_t)length <= sizeof replies) {  // else nobody reads, so nobody waits for it
    memcpy(replies + reply_bytes, line, (size_t)length);
    reply_bytes += (size_t)length;
  }
  pthread_mutex_unlock(&reply_lock);
  if (write(wake_pipe[1], "", 1) < 0 && errno != EAGAIN) perror("agent: wake");
}

// ---- the memory area -----------------------------------------------------------------------------

// `area_lock` held.
static void rewrite_page(size_t index) {
  struct page *page = &area[index];
  page->index = index;
  page->generation = ++generations[index];
  uint64_t word = mix(index << 32 ^ page->generation);
  for (size_t i = 0; i < kWords - 3; i++) page->filling[i] = word += 0x9e3779b97f4a7c15u;
  page->checksum = checksum(&page->index, kWords - 1);
  rewrites++;
}

static bool page_good(size_t index) {
  const struct page *page = &area[index];
  return page->index == index && page->generation == generations[index] &&
         page->checksum == checksum(&page->index, kWords - 1);
}

static size_t choose_page(uint64_t *random) {
  *random = mix(*random);
  size_t hot_pages = area_pages / 64;
  bool hot = config.pages_s != 0 && hot_pages != 0 && *random % 10 != 0;
  return (*random >> 8) % (hot ? hot_pages : area_pages);
}

static void *rewriter(void *unused) {
  (void)unused;
  uint64_t random = 1;
  uint64_t due = now_ns(CLOCK_MONOTONIC);
  for (;;) {
    pthread_mutex_lock(&area_lock);
    for (int i = config.pages_s ? 1 : 32; i > 0; i--) rewrite_page(choose_page(&random));
    pthread_mutex_unlock(&area_lock);
    while (atomic_load(&check_wants_area)) sleep_ns(1000000);
    if (config.pages_s == 0) continue;
    uint64_t now = now_ns(CLOCK_MONOTONIC), step = 1000000000u / (uint64_t)config.pages_s;
    due += step;
    if (due > now) {
      sleep_ns(due - now);
    } else if (now - due > 1000000000u) {
      due = now;  // it was held up for long: no burst to catch up
    }
  }
  return NULL;
}

// ---- the file ------------------------------------------------------------------------------------

// "number time checksum\n" in hexadecimal.
enum { kRecordSize = 3 * 17 };

static uint64_t record_sum(uint64_t number, uint64_t ns) { return mix(number ^ mix(ns)); }

static void append_record(void) {
  if (records - first_record >= kMaxFileRecords) {
    if (ftruncate(record_fd, 0) != 0) record_errors++;
    first_record = records;
  }
  char text[kRecordSize + 1];
  uint64_t ns = now_ns(CLOCK_MONOTONIC);
  snprintf(text, sizeof text, "%016" PRIx64 " %016" PRIx64 " %016" PRIx64 "\n", records, ns,
           record_sum(records, ns));
  off_t where = (off_t)((records - first_record) * kRecordSize);
  if (pwrite(record_fd, text, kRecordSize, where) != kRecordSize || fsync(record_fd) != 0) {
    record_errors++;
    return;  // the same number again next time
  }
  records++;
}

static void *recorder(void *unused) {
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
  FILE *file = fopen(RECORD_FILE, "r");
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

// ---- check and work ------------------------------------------------------------------------------

// How far the workload has come by its own account: its scripts write a number into a file.
static uint64_t workload_steps(void) {
  uint64_t steps = 0;
  FILE *file = fopen(PROGRESS_FILE, "r");
  if (file == NULL) return 0;
  if (fscanf(file, "%" SCNu64, &steps) != 1) steps = 0;
  fclose(file);
  return steps;
}

static void check(void) {
  uint64_t pages_bad = 0, sum = 0, counted;
  atomic_store(&check_wants_area, true);
  pthread_mutex_lock(&area_lock);
  for (size_t i = 0; i < area_pages; i++) {
    pages_bad += !page_good(i);
    sum += generations[i];
  }
  counted = rewrites;
  pthread_mutex_unlock(&area_lock);
  atomic_store(&check_wants_area, false);

  pthread_mutex_lock(&file_lock);
  uint64_t file_records = records - first_record, errors = record_errors;
  uint64_t file_bad = bad_records();
  posix_fadvise(record_fd, 0, 0, POSIX_FADV_DONTNEED);  // now from the disk
  file_bad += bad_records();
  pthread_mutex_unlock(&file_lock);

  reply("C {\"pages_bad\":%" PRIu64 ",\"pages\":%zu,\"counter\":%" PRIu64
        ",\"counter_bad\":%d,\"file_records\":%" PRIu64 ",\"file_bad\":%" PRIu64
        ",\"file_errors\":%" PRIu64
        ",\"beats\":%lu,\"beats_dropped\":%lu,\"uptime_ns\":%" PRIu64
        ",\"work\":%lu,\"workload\":\"%s\",\"workload_steps\":%" PRIu64 "}\n",
        pages_bad, area_pages, counted, counted != sum, file_records, file_bad, errors,
        atomic_load(&beats_made), atomic_load(&beats_dropped), now_ns(CLOCK_MONOTONIC),
        atomic_load(&work_units), config.workload, workload_steps());
}

static uint64_t scratch[kScratchPages][kWords];

// About 50 us of a 3 GHz core, 20 times that under emulation.
static void unit_of_work(void) {
  for (size_t i = 0; i < kScratchPages; i++) {
    scratch[i][0] += checksum(scratch[i], kWords) | 1;
  }
  atomic_fetch_add(&work_units, 1);
}

static void work_for(uint64_t ms) {
  uint64_t start = now_ns(CLOCK_MONOTONIC), cpu = now_ns(CLOCK_THREAD_CPUTIME_ID), units = 0;
  while (now_ns(CLOCK_MONOTONIC) - start < ms * 1000000u) {
    unit_of_work();
    units++;
  }
  reply("W {\"work\":%lu,\"units\":%" PRIu64 ",\"wall_ns\":%" PRIu64 ",\"cpu_ns\":%" PRIu64 "}\n",
        atomic_load(&work_units), units, now_ns(CLOCK_MONOTONIC) - start,
        now_ns(CLOCK_THREAD_CPUTIME_ID) - cpu);
}

static void *spinner(void *unused) {
  (void)unused;
  struct sched_param none = {0};
  pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);
  for (;;) unit_of_work();
  return NULL;
}

// Commands that take time run one after another in a thread of their own, fed through a pipe.
enum { kCheck = -1 };
static int job_pipe[2];

static void *job_runner(void *unused) {
  (void)unused;
  long job;
  while (read(job_pipe[0], &job, sizeof job) == sizeof job) {
    if (job == kCheck) {
      check();
    } else {
      work_for((uint64_t)job);
    }
  }
  return NULL;
}

static void command(const char *line) {
  long job = kCheck;
  char rest;
  if (strcmp(line, "work") == 0) {
    reply("W {\"work\":%lu,\"uptime_ns\":%" PRIu64 "}\n", atomic_load(&work_units),
          now_ns(CLOCK_MONOTONIC));
    return;
  }
  if (strcmp(line, "check") != 0 &&
      (sscanf(line, "work %ld%c", &job, &rest) != 1 || job < 1 || job > 600000)) {
    reply("E unknown command '%.100s': check, work, work MS (1..600000)\n", line);
    return;
  }
  if (write(job_pipe[1], &job, sizeof job) != sizeof job) {
    reply("E too many commands at once\n");
  }
}

// ---- main: beats and the port --------------------------------------------------------------------

static struct beat queue[kQueue];
static uint64_t queue_head, queue_tail;  // [head, tail) wait; indices modulo kQueue
static uint64_t unreported_drops;

static void queue_beat(void) {
  if (queue_tail - queue_head == kQueue) {
    queue_head++;
    unreported_drops++;
    atomic_fetch_add(&beats_dropped, 1);
  }
  queue[queue_tail++ % kQueue] =
      (struct beat){atomic_fetch_add(&beats_made, 1), now_ns(CLOCK_MONOTONIC)};
}

static char out[4096];  // whole lines that were taken off the queues
static size_t out_bytes, out_sent;

static void fill_out(void) {
  out_bytes = out_sent = 0;
  pthread_mutex_lock(&reply_lock);
  if (reply_bytes != 0) {
    // Only whole lines: a line is shorter than `out`, so there is always one that fits.
    size_t take = reply_bytes < sizeof out ? reply_bytes : sizeof out;
    while (take > 0 && replies[take - 1] != '\n') take--;
    memcpy(out, replies, take);
    memmove(replies, replies + take, reply_bytes - take);
    reply_bytes -= take;
    out_bytes = take;
  }
  pthread_mutex_unlock(&reply_lock);
  if (unreported_drops != 0 && out_bytes + 64 < sizeof out) {
    out_bytes += (size_t)sprintf(out + out_bytes, "L %" PRIu64 "\n", unreported_drops);
    unreported_drops = 0;
  }
  while (queue_head != queue_tail && out_bytes + 64 < sizeof out) {
    const struct beat *beat = &queue[queue_head++ % kQueue];
    out_bytes += (size_t)sprintf(out + out_bytes, "B %" PRIu64 " %" PRIu64 "\n", beat->number, beat->ns);
  }
}

static bool anything_to_send(void) {
  pthread_mutex_lock(&reply_lock);
  bool any = reply_bytes != 0;
  pthread_mutex_unlock(&reply_lock);
  return any || out_sent < out_bytes || queue_head != queue_tail || unreported_drops != 0;
}

static void send_some(int port) {
  while (anything_to_send()) {
    if (out_sent == out_bytes) fill_out();
    ssize_t sent = write(port, out + out_sent, out_bytes - out_sent);
    if (sent <= 0) return;  // full, or nobody there: poll() tells when to go on
    out_sent += (size_t)sent;
  }
}

// Returns false when nobody holds the host's end.
static bool receive_some(int port) {
  static char line[1024];
  static size_t length;
  char bytes[256];
  ssize_t got = read(port, bytes, sizeof bytes);
  for (ssize_t i = 0; i < got; i++) {
    if (bytes[i] != '\n') {
      if (length < sizeof line - 1) line[length++] = bytes[i];
      continue;
    }
    line[length] = 0;
    length = 0;
    if (line[0] != 0) command(line);
  }
  return got != 0;
}

static void run(int port, int timer) {
  bool connected = true;
  for (;;) {
    struct pollfd fds[3] = {{.fd = timer, .events = POLLIN},
                            {.fd = wake_pipe[0], .events = POLLIN},
                            {.fd = port, .events = POLLIN | (anything_to_send() ? POLLOUT : 0)}};
    // Without a host the port is always ready with POLLHUP: look again at the next beat only.
    if (poll(fds, connected ? 3 : 2, -1) < 0 && errno != EINTR) exit(1);
    char drain[64];
    uint64_t expired = 0;
    if (fds[1].revents & POLLIN && read(wake_pipe[0], drain, sizeof drain) < 0) continue;
    if (fds[0].revents & POLLIN && read(timer, &expired, sizeof expired) == sizeof expired) {
      for (; expired > 0; expired--) queue_beat();  // it was held up: late beats are made up for
      connected = true;
    }
    if (connected && fds[2].revents & (POLLIN | POLLHUP)) {
      connected = receive_some(port) && !(fds[2].revents & POLLHUP);
    }
    if (connected) send_some(port);
  }
}

// ---- start ---------------------------------------------------------------------------------------

static long parameter(const char *cmdline, const char *name, long otherwise, long least, long most) {
  const char *found = strstr(cmdline, name);
  if (found == NULL) return otherwise;
  long value = strtol(found + strlen(name), NULL, 10);
  return value < least ? least : value > most ? most : value;
}

static void read_config(void) {
  char cmdline[4096] = {0};
  int fd = open("/proc/cmdline", O_RDONLY);
  if (fd < 0 || read(fd, cmdline, sizeof cmdline - 1) < 0) perror("agent: /proc/cmdline");
  if (fd >= 0) close(fd);
  const char *workload = strstr(cmdline, "presync.workload=");
  if (workload != NULL) sscanf(workload, "presync.workload=%31[a-z]", config.workload);
  bool hammer = strcmp(config.workload, "hammer") == 0;
  config.beat_ms = parameter(cmdline, "presync.beat_ms=", 10, 1, 1000);
  config.area_mb = parameter(cmdline, "presync.area_mb=", hammer ? 64 : 16, 1, 4096);
  config.pages_s = parameter(cmdline, "presync.pages_s=", hammer ? 0 : 50, 0, 1000000);
  config.record_ms = parameter(cmdline, "presync.record_ms=", 200, 10, 60000);
  config.spin = parameter(cmdline, "presync.spin=", 0, 0, 1);
}

static void start_thread(void *(*body)(void *)) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, body, NULL) != 0) {
    perror("agent: cannot start a thread");
    exit(1);
  }
}

static void make_area(void) {
  area_pages = (size_t)config.area_mb * 256;
  area = mmap(NULL, area_pages * kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  generations = calloc(area_pages, sizeof *generations);
  if (area == MAP_FAILED || generations == NULL) {
    fprintf(stderr, "agent: no memory for an area of %ld MiB\n", config.area_mb);
    exit(1);
  }
  for (size_t i = 0; i < area_pages; i++) rewrite_page(i);
}

int main(void) {
  read_config();
  int port = open(PORT, O_RDWR | O_NONBLOCK | O_CLOEXEC);
  record_fd = open(RECORD_FILE, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  if (port < 0 || record_fd < 0 || timer < 0 || pipe2(wake_pipe, O_CLOEXEC | O_NONBLOCK) != 0 ||
      pipe2(job_pipe, O_CLOEXEC) != 0 || fcntl(job_pipe[1], F_SETFL, O_NONBLOCK) != 0) {
    fprintf(stderr, "agent: cannot open %s, %s or a pipe: %s\n", PORT, RECORD_FILE, strerror(errno));
    return 1;
  }
  make_area();
  start_thread(rewriter);
  start_thread(recorder);
  start_thread(job_runner);
  if (config.spin) start_thread(spinner);
  // After the threads were made: they must not inherit it.
  struct sched_param priority = {.sched_priority = 10};
  if (sched_setscheduler(0, SCHED_FIFO, &priority) != 0) perror("agent: SCHED_FIFO");
  reply("H {\"workload\":\"%s\",\"beat_ms\":%ld,\"area_mb\":%ld,\"pages_s\":%ld,\"record_ms\":%ld}\n",
        config.workload, config.beat_ms, config.area_mb, config.pages_s, config.record_ms);
  struct timespec step = {.tv_sec = config.beat_ms / 1000, .tv_nsec = config.beat_ms % 1000 * 1000000};
  struct itimerspec period = {.it_interval = step, .it_value = step};
  if (timerfd_settime(timer, 0, &period, NULL) != 0) return 1;
  run(port, timer);
}
