#include <signal.h>

#include "glue.h"

/* The deepest frame here is maps.c's line buffer; 128 KiB is ample, and cheap under mlockall. */
#define PRESYNC_STACK_BYTES (128 * 1024)

int presync_thread_start(pthread_t* thread, void* (*body)(void*), void* argument) {
  pthread_attr_t attributes;
  int error = pthread_attr_init(&attributes);
  if (error != 0) return error;
  pthread_attr_setstacksize(&attributes, PRESYNC_STACK_BYTES);

  /* A new thread inherits the mask: block first, so that QEMU's signals never arrive in it. */
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  error = pthread_create(thread, &attributes, body, argument);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  return error;
}
