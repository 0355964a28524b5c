/* What the tests and their synthetic guest say to each other. For C and C++. */
#ifndef PRESYNC_TESTS_QEMU_GLUE_DIRTY_LOG_SYNTHETIC_GUEST_H_
#define PRESYNC_TESTS_QEMU_GLUE_DIRTY_LOG_SYNTHETIC_GUEST_H_

#include <stdint.h>

enum guest_op {
  GUEST_STORE = 1,      /* change a byte of each page */
  GUEST_READ_INTO,      /* the same by read(2) */
  GUEST_VM_WRITE,       /* the same by process_vm_writev(2) */
  GUEST_START_WRITERS,  /* threads that write at random, from `seed` on; after each write they
                           rest `count` - 1 microseconds, a vCPU that has other things to do too */
  GUEST_STOP_WRITERS,   /* answered when they have ended */
  GUEST_REGISTER_OTHER, /* a userfaultfd of its own on the region */
  GUEST_MAP_AGAIN,      /* a second mapping of the region's file */
  GUEST_UNMAP,
};

struct guest_command {
  uint32_t op;
  uint32_t region;
  uint32_t page; /* within the region */
  uint32_t count;
  uint64_t seed;
};

#endif /* PRESYNC_TESTS_QEMU_GLUE_DIRTY_LOG_SYNTHETIC_GUEST_H_ */
