// What a migration must not lose, kept so that it can be verified: pages of memory that are
// rewritten all the time, and a file that grows on the data disk.  Threads of its own do both; see
// agent.c for what is reported.
#ifndef TOOLS_GUEST_EVIDENCE_H_
#define TOOLS_GUEST_EVIDENCE_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct evidence_config {
  long area_mb;    // size of the area, MiB
  long pages_s;    // pages rewritten per second; 0 = as fast as it goes
  long record_ms;  // time between two records of the file
};

struct evidence {
  uint64_t pages_bad;  // index, generation or checksum is not what it must be
  uint64_t pages;
  uint64_t counter;  // rewrites so far
  bool counter_bad;  // it is not the sum of the pages' generations
  uint64_t file_records;
  uint64_t file_bad;     // wrong or missing in the file, as cached and as on the disk
  uint64_t file_errors;  // writes that the kernel refused
};

// Makes the area and the file and starts the threads.  Once.  False, with the reason on stderr, if
// memory or the disk is missing.
bool evidence_start(const struct evidence_config* config);

// Verifies everything; rewriting stands still meanwhile.  All zeros if nothing was started.  Any
// thread, one at a time.
struct evidence evidence_check(void);

// A checksum of whole words; also used as a unit of work.
uint64_t evidence_checksum(const uint64_t* words, size_t count);

#endif  // TOOLS_GUEST_EVIDENCE_H_
