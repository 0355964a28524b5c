// agent - the daemon in the test guest that tells whether a migration kept every byte.
//
// It beats on a virtio-serial port (so that lost time shows), keeps pages of memory and a file
// whose contents can be verified (so that lost writes show), and answers questions.
//
// Parameters, from the kernel's command line
//   presync.beat_ms=N    time between two beats, 1..1000 (10)
//   presync.area_mb=N    memory that is kept rewritten, 1..4096 MiB (16; 64 for
//   presync.workload=hammer) presync.pages_s=N    pages rewritten per second; 0 = as fast as it
//   goes (50; 0 for hammer).
//                        Nine in ten rewrites hit the hot 1/64 of the area, the rest any page.
//                        With 0 all rewrites are spread evenly.
//   presync.record_ms=N  time between two records of the file, 10..60000 (200)
//   presync.evidence=0   no rewritten memory and no file: the workload alone (for traces of it)
//   presync.spin=1       run units of work (see "work") all the time, at idle priority
//   presync.workload=X   only to be named in H, and for the defaults above
//
// Line protocol on /dev/virtio-ports/org.presync.agent.  Lines end in \n; no line is longer than 1
// KiB.
//   Guest to host
//     H {json}      once, before the first beat: what runs, with which parameters
//     B n ns        beat n (0, 1, 2 ... without gaps) and the guest's CLOCK_MONOTONIC when it fell
//     due
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
// Threads: main (beats and the port, real-time priority, never blocks on the port), job_runner
// (check and work), spinner if asked for, and those of evidence.c.
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
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "evidence.h"

enum {
  kQueue = 65536,      // beats kept while nobody reads: 11 minutes at 10 ms
  kReplies = 8192,     // bytes of answers kept while nobody reads
  kScratchPages = 64,  // what units of work rewrite
  kWords = 4096 / 8,
};

#define PORT "/dev/virtio-ports/org.presync.agent"
#define PROGRESS_FILE "/run/presync/progress"

struct beat {
  uint64_t number, ns;
};

static struct {
  long beat_ms, spin, keep_evidence;
  struct evidence_config evidence;
  char workload[32];
} config = {.workload = "idle"};

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

__attribute__((format(printf, 1, 2))) static void reply(const char* format, ...) {
  char line[1024];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (length < 0 || (size_t)length >= sizeof line) return;
  pthread_mutex_lock(&reply_lock);
  // With no room nobody has been reading, so nobody waits for it.
  if (reply_bytes + (size_t)length <= sizeof replies) {
    memcpy(replies + reply_bytes, line, (size_t)length);
    reply_bytes += (size_t)length;
  }
  pthread_mutex_unlock(&reply_lock);
  if (write(wake_pipe[1], "", 1) < 0 && errno != EAGAIN) perror("agent: wake");
}

// ---- check and work ----

// How far the workload has come by its own account: its scripts write a number into a file.
static uint64_t workload_steps(void) {
  uint64_t steps = 0;
  FILE* file = fopen(PROGRESS_FILE, "r");
  if (file == NULL) return 0;
  if (fscanf(file, "%" SCNu64, &steps) != 1) steps = 0;
  fclose(file);
  return steps;
}

static void check(void) {
  struct evidence e = evidence_check();
  reply("C {\"pages_bad\":%" PRIu64 ",\"pages\":%" PRIu64 ",\"counter\":%" PRIu64
        ",\"counter_bad\":%d,\"file_records\":%" PRIu64 ",\"file_bad\":%" PRIu64
        ",\"file_errors\":%" PRIu64 ",\"beats\":%lu,\"beats_dropped\":%lu,\"uptime_ns\":%" PRIu64
        ",\"work\":%lu,\"workload\":\"%s\",\"workload_steps\":%" PRIu64 "}\n",
        e.pages_bad, e.pages, e.counter, e.counter_bad, e.file_records, e.file_bad, e.file_errors,
        atomic_load(&beats_made), atomic_load(&beats_dropped), now_ns(CLOCK_MONOTONIC),
        atomic_load(&work_units), config.workload, workload_steps());
}

static uint64_t scratch[kScratchPages][kWords];

// About 50 us of a 3 GHz core, 20 times that under emulation.
static void unit_of_work(void) {
  for (size_t i = 0; i < kScratchPages; i++) {
    scratch[i][0] += evidence_checksum(scratch[i], kWords) | 1;
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

static void* spinner(void* unused) {
  (void)unused;
  struct sched_param none = {0};
  pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);
  for (;;) unit_of_work();
  return NULL;
}

// Commands that take time run one after another in a thread of their own, fed through a pipe.
enum { kCheck = -1 };
static int job_pipe[2];

static void* job_runner(void* unused) {
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

static void command(const char* line) {
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

// ---- main: beats and the port ----

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
    const struct beat* beat = &queue[queue_head++ % kQueue];
    out_bytes +=
        (size_t)sprintf(out + out_bytes, "B %" PRIu64 " %" PRIu64 "\n", beat->number, beat->ns);
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

// ---- start ----

static long parameter(const char* cmdline, const char* name, long otherwise, long least,
                      long most) {
  const char* found = strstr(cmdline, name);
  if (found == NULL) return otherwise;
  long value = strtol(found + strlen(name), NULL, 10);
  return value < least ? least : value > most ? most : value;
}

static void read_config(void) {
  char cmdline[4096] = {0};
  int fd = open("/proc/cmdline", O_RDONLY);
  if (fd < 0 || read(fd, cmdline, sizeof cmdline - 1) < 0) perror("agent: /proc/cmdline");
  if (fd >= 0) close(fd);
  const char* workload = strstr(cmdline, "presync.workload=");
  if (workload != NULL) sscanf(workload, "presync.workload=%31[a-z]", config.workload);
  bool hammer = strcmp(config.workload, "hammer") == 0;
  config.beat_ms = parameter(cmdline, "presync.beat_ms=", 10, 1, 1000);
  config.evidence.area_mb = parameter(cmdline, "presync.area_mb=", hammer ? 64 : 16, 1, 4096);
  config.evidence.pages_s = parameter(cmdline, "presync.pages_s=", hammer ? 0 : 50, 0, 1000000);
  config.evidence.record_ms = parameter(cmdline, "presync.record_ms=", 200, 10, 60000);
  config.keep_evidence = parameter(cmdline, "presync.evidence=", 1, 0, 1);
  config.spin = parameter(cmdline, "presync.spin=", 0, 0, 1);
}

static void start_thread(void* (*body)(void*)) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, body, NULL) != 0) {
    perror("agent: cannot start a thread");
    exit(1);
  }
}

int main(void) {
  read_config();
  int port = open(PORT, O_RDWR | O_NONBLOCK | O_CLOEXEC);
  int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  if (port < 0 || timer < 0 || pipe2(wake_pipe, O_CLOEXEC | O_NONBLOCK) != 0 ||
      pipe2(job_pipe, O_CLOEXEC) != 0 || fcntl(job_pipe[1], F_SETFL, O_NONBLOCK) != 0) {
    fprintf(stderr, "agent: cannot open %s or a pipe: %s\n", PORT, strerror(errno));
    return 1;
  }
  if (config.keep_evidence && !evidence_start(&config.evidence)) return 1;
  start_thread(job_runner);
  if (config.spin) start_thread(spinner);
  // After the threads were made: they must not inherit it.
  struct sched_param priority = {.sched_priority = 10};
  if (sched_setscheduler(0, SCHED_FIFO, &priority) != 0) perror("agent: SCHED_FIFO");
  reply(
      "H {\"workload\":\"%s\",\"beat_ms\":%ld,\"area_mb\":%ld,\"pages_s\":%ld,\"record_ms\":%ld}\n",
      config.workload, config.beat_ms, config.evidence.area_mb, config.evidence.pages_s,
      config.evidence.record_ms);
  struct timespec step = {.tv_sec = config.beat_ms / 1000,
                          .tv_nsec = config.beat_ms % 1000 * 1000000};
  struct itimerspec period = {.it_interval = step, .it_value = step};
  if (timerfd_settime(timer, 0, &period, NULL) != 0) return 1;
  run(port, timer);
}
