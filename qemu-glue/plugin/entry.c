/* How the library gets into QEMU: as a plug-in, or preloaded. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "glue.h"

#define PRESYNC_EXPORT __attribute__((visibility("default")))

/* QEMU's loader reads it after dlopen: up to QEMU 8.2 it must be at most 1, from 9.0 on at least 2.
 * The plug-in uses nothing of the interface behind that number, so it fits both (set in the
 * constructor). */
PRESYNC_EXPORT int qemu_plugin_version = 1;

/* What the process was told by environment; and a pipe whose write end only this process holds, so
 * that a forked child sees when it is gone. */
static struct {
  char* path;
  int lifeline[2];
} preload = {NULL, {-1, -1}};

static void report(const char* path, int error) {
  fprintf(stderr, "presync_glue: listening at %s failed: %s%s\n", path, strerror(error),
          error == EADDRINUSE ? " by another process: give each QEMU a socket of its own" : "");
}

/* The two declarations stand in for qemu-plugin.h, of which nothing else is needed. */
PRESYNC_EXPORT int qemu_plugin_install(uint64_t id, const void* info, int argc, char** argv);

int qemu_plugin_install(uint64_t id, const void* info, int argc, char** argv) {
  (void)id;
  (void)info;
  static const char kSocket[] = "socket=";
  if (argc != 1 || strncmp(argv[0], kSocket, strlen(kSocket)) != 0) {
    fprintf(stderr, "presync_glue: usage: -plugin presync_glue.so,socket=PATH\n");
    return -1;
  }
  const char* path = argv[0] + strlen(kSocket);
  if (presync_server_is_at(path)) return 0; /* preloaded as well */
  const int error = presync_server_start(path, false);
  if (error != 0) report(path, error);
  return error == 0 ? 0 : -1; /* QEMU then refuses to start, with the text above */
}

/* Waits until the process that forked us is gone, then serves in its place. */
static void* succeed_parent(void* argument) {
  const int parent = (int)(intptr_t)argument;
  struct pollfd end = {.fd = parent};
  while (poll(&end, 1, -1) < 0 && errno == EINTR) {
  }
  close(parent);
  presync_server_start(preload.path, true);
  return NULL;
}

/* A preloaded QEMU with -daemonize forks twice, and the parents exit: the heir takes the socket
 * over. A child that QEMU forks later (to run a script) must not; by then guest RAM may be tracked,
 * and exec ends the waiting thread before anything happened. */
static void after_fork_in_child(void) {
  const int parent = preload.lifeline[0];
  const unsigned ranges = presync_server_forget();
  close(preload.lifeline[1]);
  if (ranges != 0 || pipe2(preload.lifeline, O_CLOEXEC) != 0) {
    close(parent);
    preload.lifeline[0] = preload.lifeline[1] = -1;
    return;
  }
  pthread_t thread;
  if (presync_thread_start(&thread, succeed_parent, (void*)(intptr_t)parent) == 0) {
    pthread_detach(thread);
  } else {
    close(parent);
  }
}

__attribute__((constructor)) static void on_load(void) {
  /* A name that came with version 2 (QEMU 9.0). */
  qemu_plugin_version = dlsym(RTLD_DEFAULT, "qemu_plugin_num_vcpus") != NULL ? 2 : 1;

  const char* path = getenv("PRESYNC_GLUE_SOCKET");
  if (path == NULL || path[0] == '\0') return;
  preload.path = strdup(path);
  if (preload.path == NULL || pipe2(preload.lifeline, O_CLOEXEC) != 0) return;
  const int error = presync_server_start(preload.path, false);
  if (error == 0) {
    pthread_atfork(NULL, NULL, after_fork_in_child);
  } else if (error != EADDRINUSE) {
    report(path,
           error); /* in use: a program that a preloaded QEMU started inherits its environment */
  }
}

__attribute__((destructor)) static void on_exit_of_process(void) { presync_server_unlink(); }
