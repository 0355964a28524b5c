// typist - types into a program on a terminal of its own, as a person would: the text workload.
//
//   typist [-s SEED] [-k KEY_MS] PROGRESS_FILE vim DOCUMENT...
//
// Runs vim on a pseudo-terminal of 80x24, and for ever: types words (a key each 170 ms or KEY_MS on
// average, with pauses to think), moves about, searches, undoes, deletes lines so that the document
// keeps its size, and saves every 10 s.  What vim draws is read and forgotten, as a terminal would.
// PROGRESS_FILE holds the number of keys typed so far.  The random numbers are the same in each run
// with the same SEED.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
  kSaveMs = 10000,  // what the workload is asked for
  kGrowLines = 40,  // lines typed before as many are deleted
};

static int terminal, progress;
static unsigned long keys;
static unsigned seed = 20240607;
static unsigned key_ms = 170;  // a fair typist: 70 words a minute

static unsigned below(unsigned n) { return (unsigned)rand_r(&seed) % n; }

static long now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

// Lets `ms` go by; the screen is read meanwhile, or vim would block when it is full.
static void wait_ms(long ms) {
  static char screen[4096];
  for (long end = now_ms() + ms, left = ms; left > 0; left = end - now_ms()) {
    struct pollfd fd = {.fd = terminal, .events = POLLIN};
    if (poll(&fd, 1, (int)left) > 0 && read(terminal, screen, sizeof screen) <= 0) {
      fprintf(stderr, "typist: the program ended\n");
      exit(1);
    }
  }
}

static void type_key(char key) {
  if (write(terminal, &key, 1) != 1) {
    perror("typist: terminal");
    exit(1);
  }
  char text[32];
  int length = snprintf(text, sizeof text, "%lu\n", ++keys);
  if (pwrite(progress, text, (size_t)length, 0) < 0) perror("typist: progress");
  wait_ms(key_ms / 2 + below(key_ms));
}

static void type_keys(const char* text) {
  for (; *text != 0; text++) type_key(*text);
}

// Commands that a practised hand has in the fingers: faster, then a moment to look at the result.
static void type_command(const char* text) {
  type_keys(text);
  wait_ms(300 + below(900));
}

static const char* const kWords[] = {
    "memory", "the",  "guest",  "moves", "page",    "after", "it",    "was",   "written", "and",
    "target", "host", "before", "a",     "network", "to",    "while", "still", "running", "of",
    "copy",   "each", "stable", "often", "rarely",  "which", "then",  "stops", "little",  "later"};
enum { kWordCount = sizeof kWords / sizeof *kWords };

static const char* word(void) { return kWords[below(kWordCount)]; }

static void type_line(void) {
  for (unsigned n = 6 + below(8); n > 0; n--) {
    type_keys(word());
    type_key(n == 1 ? '.' : ' ');
    if (below(25) == 0) wait_ms(500 + below(1500));
  }
}

// Opens a line below the cursor and writes a few.
static int type_paragraph(void) {
  int lines = 1 + (int)below(3);
  type_key('o');
  for (int i = 0; i < lines; i++) {
    if (i > 0) type_key('\r');
    type_line();
  }
  type_command("\033");
  return lines;
}

static void move_about(void) {
  static const char* const moves[] = {"jjj", "kkkk", "wwww", "b", "\006", "\002", "G", "gg", "50%",
                                      "}",   "{",    "dw",   "~", "J",    "u",    "n", "zz", "0"};
  for (unsigned n = 2 + below(4); n > 0; n--) {
    type_command(moves[below(sizeof moves / sizeof *moves)]);
  }
  if (below(2) == 0) {
    type_key('/');
    type_keys(word());
    type_command("\r");
  }
}

static void run(void) {
  long saved = now_ms();
  int grown = 0;
  for (;;) {
    grown += type_paragraph();
    move_about();
    if (grown > kGrowLines) {
      type_command("40dd");
      grown = 0;
    }
    if (now_ms() - saved >= kSaveMs) {
      type_command(":w\r");
      saved = now_ms();
    }
  }
}

static void usage(void) {
  fprintf(stderr, "usage: typist [-s SEED] [-k KEY_MS] PROGRESS_FILE PROGRAM ARGS...\n");
  exit(2);
}

static char** parse(int argc, char** argv) {
  for (int option; (option = getopt(argc, argv, "+s:k:")) != -1;) {
    long value = option == '?' ? 0 : atol(optarg);
    if (value < 1 || value > 1000000) usage();
    if (option == 's') seed += (unsigned)value - 1;
    if (option == 'k') key_ms = (unsigned)value;
  }
  if (argc - optind < 2) usage();
  return argv + optind;
}

int main(int argc, char** argv) {
  argv = parse(argc, argv);
  progress = open(argv[0], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  struct winsize size = {.ws_row = 24, .ws_col = 80};
  pid_t child = forkpty(&terminal, NULL, NULL, &size);
  if (progress < 0 || child < 0) {
    fprintf(stderr, "typist: cannot open %s or a terminal: %s\n", argv[0], strerror(errno));
    return 1;
  }
  if (child == 0) {
    execvp(argv[1], argv + 1);
    perror(argv[1]);
    _exit(127);
  }
  wait_ms(3000);  // to start and draw; keys typed earlier are only read later
  run();
}
