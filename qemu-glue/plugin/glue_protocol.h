/* What presyncd and the library inside QEMU say to each other. For C and C++.
 *
 * A SOCK_SEQPACKET unix socket: one message is one packet. On connecting, presyncd is sent a HELLO
 * reply unasked; from then on it asks and the library answers, one after the other. Every field is
 * little-endian and the structs have no padding. A packet of another size, magic, version or type
 * ends the connection; what was registered stays.
 *
 * One client at a time. The HELLO of a second one says EBUSY (step BUSY) and ends with the
 * connection; once the first is gone, a new one takes over, and TRACK of a range that is tracked
 * already hands out the same descriptors.
 *
 * type           request holds         reply holds
 * HELLO          (none: unasked)       pid, ranges, features; error if userfaultfd can't be had at
 * all TRACK          start, bytes, mode;   error, step; descriptors: the userfaultfd and, in
 * handler mode, may carry an fd of    the dirty bitmap's memfd /dev/userfaultfd UNTRACK start,
 * bytes          error (ENOENT: not tracked) STATUS         -                     as HELLO SCRATCH
 * mode; fd as in TRACK  as TRACK, and start and bytes of memory made for a trial SCRATCH_WRITE
 * start: a page of it   error (ETIME: the write hung). A thread of QEMU wrote to the page at start,
 * and the kernel, on its behalf, to the next one SCRATCH_DROP   -                     error
 * (ENOENT: there is none). Also done when the client goes
 */
#ifndef PRESYNC_QEMU_GLUE_PLUGIN_GLUE_PROTOCOL_H_
#define PRESYNC_QEMU_GLUE_PLUGIN_GLUE_PROTOCOL_H_

#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the glue protocol is written as its structs lie in memory: little-endian machines only"
#endif

#define PRESYNC_GLUE_MAGIC UINT32_C(0x4c475350) /* "PSGL" */
#define PRESYNC_GLUE_VERSION 1
#define PRESYNC_GLUE_PAGE_BYTES 4096
#define PRESYNC_GLUE_MAX_RANGES                                     \
  32 /* QEMU has a handful of RAM blocks; 32 bounds threads and fds \
      */
#define PRESYNC_GLUE_SCRATCH_PAGES 8

enum presync_glue_type {
  PRESYNC_GLUE_HELLO = 1,
  PRESYNC_GLUE_TRACK = 2,
  PRESYNC_GLUE_UNTRACK = 3,
  PRESYNC_GLUE_STATUS = 4,
  PRESYNC_GLUE_SCRATCH = 5,
  PRESYNC_GLUE_SCRATCH_WRITE = 6,
  PRESYNC_GLUE_SCRATCH_DROP = 7,
};

enum presync_glue_mode {
  PRESYNC_GLUE_MODE_ASYNC = 1,   /* the kernel lifts the protection and remembers: Linux 6.7 */
  PRESYNC_GLUE_MODE_HANDLER = 2, /* a thread in QEMU does, and marks the bitmap: Linux 5.19 */
};

/* Where a request failed. */
enum presync_glue_step {
  PRESYNC_GLUE_STEP_NONE = 0,
  PRESYNC_GLUE_STEP_BUSY = 1,    /* another client is connected */
  PRESYNC_GLUE_STEP_REQUEST = 2, /* the request itself: alignment, mode, too many ranges, overlap */
  PRESYNC_GLUE_STEP_MAPS = 3,    /* the range is not all MAP_SHARED memory of the process */
  PRESYNC_GLUE_STEP_OPEN = 4,    /* getting a userfaultfd */
  PRESYNC_GLUE_STEP_API = 5,     /* UFFDIO_API: the kernel lacks the features */
  PRESYNC_GLUE_STEP_REGISTER = 6, /* UFFDIO_REGISTER */
  PRESYNC_GLUE_STEP_BITMAP = 7,   /* making the bitmap */
  PRESYNC_GLUE_STEP_THREAD = 8,   /* starting a thread */
  PRESYNC_GLUE_STEP_WRITE = 9,    /* the trial write */
};

struct presync_glue_request {
  uint32_t magic;
  uint16_t version;
  uint16_t type;   /* enum presync_glue_type */
  uint32_t length; /* sizeof(struct presync_glue_request) */
  uint32_t mode;   /* enum presync_glue_mode, else 0 */
  uint64_t start;  /* address in QEMU */
  uint64_t bytes;
};

struct presync_glue_reply {
  uint32_t magic;
  uint16_t version;
  uint16_t type;     /* of the request */
  uint32_t length;   /* sizeof(struct presync_glue_reply) */
  int32_t error;     /* errno, 0 = done */
  uint32_t step;     /* enum presync_glue_step */
  uint32_t pid;      /* in QEMU's own pid namespace */
  uint64_t features; /* of the kernel's userfaultfd (UFFD_FEATURE_*) */
  uint64_t start;
  uint64_t bytes;
  uint32_t ranges;
  uint32_t fds; /* how many descriptors this reply carries: 0, 1 or 2 */
};

/* The memfd of handler mode: this header, then at PRESYNC_GLUE_BITMAP_OFFSET one bit a page of the
 * range, in 64-bit words, bit 0 of word 0 being the first page. Sealed against resizing.
 *
 * The handler works in batches: batches becomes odd; it sets the bits; lifts the protection; sets
 * the bits once more; batches becomes even. A write that was let through is therefore visible in
 * the bitmap once `batches` has been even, or has changed, since. The second setting is what makes
 * arming safe: a protection that was put on in the middle of a batch may be lifted by it unseen,
 * and is then reported, too often instead of never. See docs/dirty-tracking.md, "A page is armed
 * while its fault is being handled". */
struct presync_glue_bitmap {
  uint64_t bytes;   /* of the range */
  uint32_t batches; /* odd while the handler is at work */
  uint32_t broken;  /* errno for which the handler gave up; the range is unprotected then */
  uint64_t events;  /* write faults handled so far */
};
#define PRESYNC_GLUE_BITMAP_OFFSET 4096

#ifdef __cplusplus
#define PRESYNC_GLUE_ASSERT static_assert
#else
#define PRESYNC_GLUE_ASSERT _Static_assert
#endif
PRESYNC_GLUE_ASSERT(sizeof(struct presync_glue_request) == 32, "no padding");
PRESYNC_GLUE_ASSERT(sizeof(struct presync_glue_reply) == 56, "no padding");
PRESYNC_GLUE_ASSERT(sizeof(struct presync_glue_bitmap) == 24, "no padding");

#endif /* PRESYNC_QEMU_GLUE_PLUGIN_GLUE_PROTOCOL_H_ */
