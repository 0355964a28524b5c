#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "glue.h"

int presync_maps_check_shared(uint64_t start, uint64_t bytes) {
  FILE* maps = fopen("/proc/self/maps", "re");
  if (maps == NULL) return errno;

  const uint64_t end = start + bytes;
  uint64_t reached = start; /* [start, reached) is shared memory */
  int error = EFAULT;
  bool at_line_start = true; /* a long path makes a line arrive in pieces */
  char line[512];
  while (reached < end && fgets(line, sizeof(line), maps) != NULL) {
    const bool first_piece = at_line_start;
    at_line_start = strchr(line, '\n') != NULL;
    uint64_t from, to;
    char permissions[5];
    if (!first_piece || sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &from, &to, permissions) != 3 ||
        to <= reached) {
      continue;
    }
    if (from > reached) break; /* the list ascends: nothing is mapped at `reached` */
    if (permissions[1] != 'w' || permissions[3] != 's') {
      error = EACCES;
      break;
    }
    reached = to;
  }
  fclose(maps);
  return reached >= end ? 0 : error;
}
