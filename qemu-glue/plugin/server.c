#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "glue.h"

/* One a process: QEMU loads the library once, and its destructor and fork handler have no argument.
 */
static struct {
  struct presync_session session; /* control thread only */
  int listener;
  int client;
  bool running;
  struct sockaddr_un address;
  dev_t device; /* of the socket's file, to tell it from a successor's */
  ino_t inode;
} server = {.listener = -1, .client = -1};

static void pause_100ms(void) {
  const struct timespec pause = {0, 100 * 1000 * 1000};
  nanosleep(&pause, NULL);
}

static bool send_reply(int socket, const struct presync_glue_reply* reply, const int* fds) {
  struct iovec data = {(void*)reply, sizeof(*reply)};
  union {
    struct cmsghdr header; /* for its alignment */
    char bytes[CMSG_SPACE(2 * sizeof(int))];
  } control;
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
  if (reply->fds > 0) {
    memset(&control, 0, sizeof(control));
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    control.header.cmsg_len = CMSG_LEN(reply->fds * sizeof(int));
    memcpy(CMSG_DATA(&control.header), fds, reply->fds * sizeof(int));
    message.msg_control = &control;
    message.msg_controllen = CMSG_SPACE(reply->fds * sizeof(int));
  }
  return sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)sizeof(*reply);
}

static struct presync_glue_reply new_reply(uint16_t type) {
  const struct presync_glue_reply reply = {.magic = PRESYNC_GLUE_MAGIC,
                                           .version = PRESYNC_GLUE_VERSION,
                                           .type = type,
                                           .length = sizeof(reply)};
  return reply;
}

static void drop_client(void) {
  close(server.client);
  server.client = -1;
  presync_scratch_close(&server.session.scratch);
}

/* The socket is of mode 0600: whoever connects is root, has the right to pass by modes, or is of
 * this process's user. The last is another QEMU, where all of a host's QEMUs are one user's
 * (libvirt) and the folder is somebody else's (presync's): that one has no business with this
 * guest. */
static bool is_welcome(int client) {
  struct ucred peer;
  socklen_t size = sizeof(peer);
  if (getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return false;
  if (peer.uid == 0 || peer.uid != geteuid()) return true;
  char folder[sizeof(server.address.sun_path)];
  strcpy(folder, server.address.sun_path);
  char* const end = strrchr(folder, '/');
  if (end == NULL || end == folder) return true; /* relative, or in the root's folder */
  *end = '\0';
  struct stat there;
  return stat(folder, &there) == 0 && (there.st_uid == 0 || there.st_uid == peer.uid);
}

static void accept_client(void) {
  const int client = accept4(server.listener, NULL, NULL, SOCK_CLOEXEC);
  if (client < 0) {
    if (errno != EINTR && errno != ECONNABORTED) pause_100ms(); /* out of descriptors: don't spin */
    return;
  }
  if (!is_welcome(client)) {
    close(client);
    return;
  }
  struct presync_glue_reply hello = new_reply(PRESYNC_GLUE_HELLO);
  presync_session_describe(&server.session, &hello);
  if (server.client >= 0) {
    hello.error = EBUSY;
    hello.step = PRESYNC_GLUE_STEP_BUSY;
    send_reply(client, &hello, NULL);
    close(client);
    return;
  }
  server.client = client;
  if (!send_reply(client, &hello, NULL)) drop_client();
}

/* Takes the first descriptor out of a message and closes any other. */
static int take_descriptor(struct msghdr* message) {
  int taken = -1;
  for (struct cmsghdr* c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
      if (taken < 0) {
        taken = fd;
      } else {
        close(fd);
      }
    }
  }
  return taken;
}

static bool is_well_formed(const struct presync_glue_request* request, ssize_t bytes, int flags) {
  return bytes == (ssize_t)sizeof(*request) && (flags & (MSG_TRUNC | MSG_CTRUNC)) == 0 &&
         request->magic == PRESYNC_GLUE_MAGIC && request->version == PRESYNC_GLUE_VERSION &&
         request->length == sizeof(*request);
}

/* Serves one request. False: the connection is over. */
static bool serve_request(void) {
  struct presync_glue_request request = {0}; /* a packet may be short */
  struct iovec data = {&request, sizeof(request)};
  union {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int))];
  } control;
  struct msghdr message = {.msg_iov = &data,
                           .msg_iovlen = 1,
                           .msg_control = &control,
                           .msg_controllen = sizeof(control)};
  const ssize_t bytes = recvmsg(server.client, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (bytes < 0) return errno == EAGAIN || errno == EINTR;

  const int device = take_descriptor(&message);
  struct presync_glue_reply reply = new_reply(request.type);
  int fds[2];
  const bool ok = is_well_formed(&request, bytes, message.msg_flags) &&
                  presync_session_handle(&server.session, &request, device, &reply, fds) &&
                  send_reply(server.client, &reply, fds);
  if (device >= 0) close(device);
  return ok;
}

static void* run(void* unused) {
  (void)unused;
  for (;;) {
    /* poll looks at them in this order: where it sees a new client it also sees the end of the old
     * one, if that came before. */
    struct pollfd fds[2] = {{.fd = server.listener, .events = POLLIN},
                            {.fd = server.client, .events = POLLIN}};
    if (poll(fds, 2, -1) < 0) {
      pause_100ms();
      continue;
    }
    /* The old client's end before the new one's beginning. */
    if (fds[1].revents != 0 && !serve_request()) drop_client();
    if (fds[0].revents != 0) accept_client();
  }
  return NULL;
}

/* Makes way for our socket: removes one that nobody listens on any more. */
static int clear_path(const struct sockaddr_un* address, bool replace_live) {
  struct stat there;
  if (lstat(address->sun_path, &there) != 0) return errno == ENOENT ? 0 : errno;
  if (!S_ISSOCK(there.st_mode)) return EEXIST;
  if (!replace_live) {
    const int probe = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (probe < 0) return errno;
    const int error =
        connect(probe, (const struct sockaddr*)address, sizeof(*address)) == 0 ? 0 : errno;
    close(probe);
    if (error != ECONNREFUSED && error != ENOENT) return EADDRINUSE;
  }
  return unlink(address->sun_path) == 0 || errno == ENOENT ? 0 : errno;
}

static int listen_at(bool replace_live) {
  int error = clear_path(&server.address, replace_live);
  if (error != 0) return error;
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return errno;
  struct stat made;
  /* bind(2) gives the file the socket's own mode (less the umask), so it is never open to others.
   */
  if (fchmod(fd, 0600) != 0 ||
      bind(fd, (const struct sockaddr*)&server.address, sizeof(server.address)) != 0 ||
      listen(fd, 4) != 0 || lstat(server.address.sun_path, &made) != 0) {
    error = errno;
    close(fd);
    return error;
  }
  server.device = made.st_dev;
  server.inode = made.st_ino;
  server.listener = fd;
  return 0;
}

int presync_server_start(const char* path, bool replace_live) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(path) >= sizeof(address.sun_path)) return ENAMETOOLONG;
  strcpy(address.sun_path, path);
  server.address = address;

  int error = listen_at(replace_live);
  if (error != 0) return error;
  pthread_t thread;
  server.running = true;
  error = presync_thread_start(&thread, run, NULL);
  if (error != 0) {
    presync_server_unlink();
    close(server.listener);
    server.listener = -1;
    server.running = false;
    return error;
  }
  pthread_detach(thread);
  return 0;
}

bool presync_server_is_at(const char* path) {
  return server.running && strcmp(server.address.sun_path, path) == 0;
}

void presync_server_unlink(void) {
  struct stat there;
  if (server.running && lstat(server.address.sun_path, &there) == 0 &&
      there.st_dev == server.device && there.st_ino == server.inode) {
    unlink(server.address.sun_path);
  }
}

unsigned presync_server_forget(void) {
  unsigned ranges = 0;
  for (size_t i = 0; i < PRESYNC_GLUE_MAX_RANGES; ++i) {
    if (server.session.ranges[i].bytes != 0) ++ranges;
  }
  if (server.listener >= 0) close(server.listener);
  if (server.client >= 0) close(server.client);
  memset(&server.session, 0, sizeof(server.session));
  server.listener = -1;
  server.client = -1;
  server.running = false;
  return ranges;
}
