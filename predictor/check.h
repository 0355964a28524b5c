// CHECK for our own invariants only; never for what a peer, QEMU or a file says.
#pragma once

#include <cstdio>
#include <cstdlib>

// Ends the process with the place: an invariant that is broken may cost a guest, going on may cost two.
#define PRESYNC_CHECK(condition)                                                       \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      std::fprintf(stderr, "%s:%d: invariant broken: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                    \
    }                                                                                  \
  } while (0)
