#include <errno.h>
#include <unistd.h>

#include "glue.h"

static bool mode_is_known(uint32_t mode) {
  return mode == PRESYNC_GLUE_MODE_ASYNC || mode == PRESYNC_GLUE_MODE_HANDLER;
}

static bool is_page_range(uint64_t start, uint64_t bytes) {
  return bytes != 0 && start % PRESYNC_GLUE_PAGE_BYTES == 0 &&
         bytes % PRESYNC_GLUE_PAGE_BYTES == 0 && start + bytes > start;
}

static void describe_range(const struct presync_range* range, struct presync_glue_reply* reply,
                           int fds[2]) {
  reply->start = range->start;
  reply->bytes = range->bytes;
  fds[reply->fds++] = range->uffd;
  if (range->mode == PRESYNC_GLUE_MODE_HANDLER) fds[reply->fds++] = range->bitmap_fd;
}

static void set_result(struct presync_glue_reply* reply, int error, enum presync_glue_step step) {
  reply->error = error;
  reply->step = error == 0 ? PRESYNC_GLUE_STEP_NONE : step;
}

static void track(struct presync_session* session, const struct presync_glue_request* request,
                  int device, struct presync_glue_reply* reply, int fds[2]) {
  set_result(reply, EINVAL, PRESYNC_GLUE_STEP_REQUEST);
  if (!mode_is_known(request->mode) || !is_page_range(request->start, request->bytes)) return;

  struct presync_range* unused = NULL;
  for (size_t i = 0; i < PRESYNC_GLUE_MAX_RANGES; ++i) {
    struct presync_range* range = &session->ranges[i];
    if (range->bytes == 0) {
      unused = range;
      continue;
    }
    if (range->start == request->start && range->bytes == request->bytes &&
        range->mode == request->mode) {
      set_result(reply, 0, PRESYNC_GLUE_STEP_NONE); /* a client that resumes */
      describe_range(range, reply, fds);
      return;
    }
    if (request->start < range->start + range->bytes &&
        range->start < request->start + request->bytes) {
      set_result(reply, EEXIST, PRESYNC_GLUE_STEP_REQUEST);
      return;
    }
  }
  if (unused == NULL) {
    set_result(reply, ENOSPC, PRESYNC_GLUE_STEP_REQUEST);
    return;
  }
  const int unmapped = presync_maps_check_shared(request->start, request->bytes);
  if (unmapped != 0) {
    set_result(reply, unmapped, PRESYNC_GLUE_STEP_MAPS);
    return;
  }
  const struct presync_result result =
      presync_range_open(unused, request->start, request->bytes, request->mode, device);
  set_result(reply, result.error, result.step);
  if (result.error == 0) describe_range(unused, reply, fds);
}

static void untrack(struct presync_session* session, const struct presync_glue_request* request,
                    struct presync_glue_reply* reply) {
  set_result(reply, ENOENT, PRESYNC_GLUE_STEP_REQUEST);
  for (size_t i = 0; i < PRESYNC_GLUE_MAX_RANGES; ++i) {
    struct presync_range* range = &session->ranges[i];
    if (range->bytes != 0 && range->start == request->start && range->bytes == request->bytes) {
      presync_range_close(range);
      set_result(reply, 0, PRESYNC_GLUE_STEP_NONE);
      return;
    }
  }
}

static void make_scratch(struct presync_session* session,
                         const struct presync_glue_request* request, int device,
                         struct presync_glue_reply* reply, int fds[2]) {
  set_result(reply, EINVAL, PRESYNC_GLUE_STEP_REQUEST);
  if (!mode_is_known(request->mode)) return;
  const struct presync_result result =
      presync_scratch_open(&session->scratch, request->mode, device);
  set_result(reply, result.error, result.step);
  if (result.error == 0) describe_range(&session->scratch.range, reply, fds);
}

void presync_session_describe(const struct presync_session* session,
                              struct presync_glue_reply* reply) {
  int error;
  reply->features = presync_uffd_features(&error);
  set_result(reply, error, PRESYNC_GLUE_STEP_OPEN);
  reply->pid = (uint32_t)getpid();
  reply->ranges = 0;
  for (size_t i = 0; i < PRESYNC_GLUE_MAX_RANGES; ++i) {
    if (session->ranges[i].bytes != 0) ++reply->ranges;
  }
}

bool presync_session_handle(struct presync_session* session,
                            const struct presync_glue_request* request, int device,
                            struct presync_glue_reply* reply, int fds[2]) {
  switch (request->type) {
    case PRESYNC_GLUE_TRACK:
      track(session, request, device, reply, fds);
      return true;
    case PRESYNC_GLUE_UNTRACK:
      untrack(session, request, reply);
      return true;
    case PRESYNC_GLUE_STATUS:
      presync_session_describe(session, reply);
      return true;
    case PRESYNC_GLUE_SCRATCH:
      make_scratch(session, request, device, reply, fds);
      return true;
    case PRESYNC_GLUE_SCRATCH_WRITE: {
      const struct presync_result result = presync_scratch_write(&session->scratch, request->start);
      set_result(reply, result.error, result.step);
      return true;
    }
    case PRESYNC_GLUE_SCRATCH_DROP:
      set_result(reply, session->scratch.memory == NULL ? ENOENT : 0, PRESYNC_GLUE_STEP_REQUEST);
      presync_scratch_close(&session->scratch);
      return true;
    default:
      return false;
  }
}
