/* Inside the library that QEMU loads. It must never harm the guest: nothing here aborts, blocks one
 * of QEMU's own threads after start-up, touches guest RAM, or allocates in proportion to what a
 * client says.
 *
 * Threads: one control thread (server.c) owns everything; each range in handler mode has a thread
 * of its own (handler.c) that shares only its range's fields. All of them block every signal. */
#ifndef PRESYNC_QEMU_GLUE_PLUGIN_GLUE_H_
#define PRESYNC_QEMU_GLUE_PLUGIN_GLUE_H_

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "glue_protocol.h"

/* A failure as it goes back to the client. error is 0 or an errno. */
struct presync_result {
  int error;
  enum presync_glue_step step;
};

/* --- thread.c --- */

/* Starts a thread with a small stack and every signal blocked. 0 or an errno. */
int presync_thread_start(pthread_t* thread, void* (*body)(void*), void* argument);

/* --- maps.c --- */

/* 0 if [start, start + bytes) is all writable MAP_SHARED memory of this process; EFAULT: part of it
 * is not mapped; EACCES: part of it is private or read-only; else why /proc/self/maps can't be
 * read. */
int presync_maps_check_shared(uint64_t start, uint64_t bytes);

/* --- uffd.c --- */

/* A userfaultfd fit for `mode`, close-on-exec and non-blocking, its API agreed on; -1 and *result.
 * `device` is an fd of /dev/userfaultfd or -1; the kernel's own calls are tried after it. In async
 * mode one that tracks faults of user mode only is enough, because there nobody waits for an event;
 * in handler mode it is refused: a write by the kernel (KVM, read(2)) would fail instead of
 * waiting. */
int presync_uffd_open(uint32_t mode, int device, struct presync_result* result);

/* The features of the kernel's userfaultfd, or 0 and *error. */
uint64_t presync_uffd_features(int* error);

/* --- range.c --- */

/* A tracked range of this process. Zeroed is unused. */
struct presync_range {
  uint64_t start;
  uint64_t bytes; /* 0 = unused */
  uint32_t mode;
  int uffd;
  /* Handler mode only. */
  int bitmap_fd;
  int stop_fd; /* eventfd: ends the thread */
  struct presync_glue_bitmap* bitmap;
  size_t bitmap_bytes; /* of the mapping */
  pthread_t thread;
};

/* Registers the range; on success every field of *range is set. Precondition: page aligned, checked
 * against the maps. */
struct presync_result presync_range_open(struct presync_range* range, uint64_t start,
                                         uint64_t bytes, uint32_t mode, int device);

/* Lifts all protection, wakes whoever waits, frees everything. */
void presync_range_close(struct presync_range* range);

/* Lifts all protection and wakes whoever waits; the descriptors stay. */
void presync_range_unregister(const struct presync_range* range);

/* --- handler.c --- */

/* Body of the thread of a range in handler mode; argument: its struct presync_range. */
void* presync_handler_run(void* argument);

/* --- scratch.c --- */

/* Memory made for a trial of a mode, and its range. Zeroed is none. */
struct presync_scratch {
  void* memory;
  struct presync_range range;
};

struct presync_result presync_scratch_open(struct presync_scratch* scratch, uint32_t mode,
                                           int device);

/* See SCRATCH_WRITE. A write that hangs for 2 s is freed by giving the range up. */
struct presync_result presync_scratch_write(struct presync_scratch* scratch, uint64_t page_address);

void presync_scratch_close(struct presync_scratch* scratch);

/* --- session.c --- */

/* All that is tracked, for all clients. */
struct presync_session {
  struct presync_range ranges[PRESYNC_GLUE_MAX_RANGES];
  struct presync_scratch scratch;
};

/* Fills a HELLO or STATUS reply. */
void presync_session_describe(const struct presync_session* session,
                              struct presync_glue_reply* reply);

/* Carries out a request whose size, magic and version were checked. `device` is an fd that came
 * with it, or -1; it stays the caller's. Puts up to two descriptors into fds, which stay the
 * session's, and their number into reply->fds. False: the type is unknown. */
bool presync_session_handle(struct presync_session* session,
                            const struct presync_glue_request* request, int device,
                            struct presync_glue_reply* reply, int fds[2]);

/* --- server.c --- */

/* Listens at `path` and starts the control thread. One server a process. 0; EADDRINUSE: another
 * process listens there; EEXIST: what is there is no socket; ENAMETOOLONG; or whatever bind(2)
 * said. `replace_live`: take the path over even from a process that listens. */
int presync_server_start(const char* path, bool replace_live);

/* Whether the server runs, and at this path. */
bool presync_server_is_at(const char* path);

/* Removes the socket's file if it is still ours. */
void presync_server_unlink(void);

/* In a forked child: forgets the parent's server, closing the child's copies of its sockets.
 * Returns how many ranges the parent tracked when it forked. */
unsigned presync_server_forget(void);

#endif /* PRESYNC_QEMU_GLUE_PLUGIN_GLUE_H_ */
