// sink - takes what a player decodes at the speed of the device it stands for: a sound card, a
// screen.
//
//   player | sink PROGRESS_FILE BYTES_PER_SECOND BUFFER_BYTES
//
// Reads into a ring of BUFFER_BYTES (what a driver would share with the device), one eighth at a
// time, and waits until that eighth has been "played".  Without it a player that writes to a pipe
// would decode as fast as it can.  PROGRESS_FILE holds the number of bytes taken so far.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void wait_until(uint64_t due_ns) {
  struct timespec t = {.tv_sec = (time_t)(due_ns / 1000000000u),
                       .tv_nsec = (long)(due_ns % 1000000000u)};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0) {
  }
}

// Returns 0 at the end of the input.
static int read_all(char* to, size_t bytes) {
  while (bytes > 0) {
    ssize_t got = read(STDIN_FILENO, to, bytes);
    if (got <= 0) return 0;
    to += got;
    bytes -= (size_t)got;
  }
  return 1;
}

int main(int argc, char** argv) {
  double rate = argc == 4 ? atof(argv[2]) : 0;
  size_t chunk = argc == 4 ? (size_t)atol(argv[3]) / 8 : 0;
  if (rate <= 0 || chunk == 0) {
    fprintf(stderr, "usage: sink PROGRESS_FILE BYTES_PER_SECOND BUFFER_BYTES\n");
    return 2;
  }
  int progress = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0644);
  char* ring = malloc(chunk * 8);
  if (progress < 0 || ring == NULL) {
    perror("sink");
    return 1;
  }
  uint64_t step = (uint64_t)((double)chunk / rate * 1e9), due = now_ns(), taken = 0;
  for (size_t slot = 0; read_all(ring + slot * chunk, chunk); slot = (slot + 1) % 8) {
    taken += chunk;
    due += step;
    uint64_t now = now_ns();
    if (now > due + 1000000000u) due = now;  // an underrun: play on from here, no catching up
    wait_until(due);
    char text[32];
    int length = snprintf(text, sizeof text, "%llu\n", (unsigned long long)taken);
    if (pwrite(progress, text, (size_t)length, 0) < 0) perror("sink: progress");
  }
  fprintf(stderr, "sink: the player ended\n");
  return 1;
}
