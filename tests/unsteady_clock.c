// unsteady_clock - a library to preload: the host's clock, as this program sees it, is set again
// and again, minutes back or forward. CLOCK_MONOTONIC is left alone, as it is by whoever sets a
// clock. Whoever computes a deadline or an interval from the date waits for minutes, or not at all.
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec* t) {
  static const int kStepsS[] = {0, -600, 300, -300, 600};
  const long result = syscall(SYS_clock_gettime, id, t);
  struct timespec now;
  if (result == 0 && id == CLOCK_REALTIME &&
      syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now) == 0) {
    const long tenths = now.tv_sec * 10 + now.tv_nsec / 100000000;
    t->tv_sec += kStepsS[tenths % 5];
  }
  return (int)result;
}

int gettimeofday(struct timeval* restrict t, void* restrict zone) {
  (void)zone;
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now) != 0) return -1;
  t->tv_sec = now.tv_sec;
  t->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t* t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t != NULL) *t = now.tv_sec;
  return now.tv_sec;
}
