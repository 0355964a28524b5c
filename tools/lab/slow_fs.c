// slow_fs MOUNT_POINT MIB DELAY_US - a file system with one file, "disk", of known content
// (tools/guest/disk_pattern.h), whose reads take their time.
//
// It speaks the kernel's FUSE protocol by itself (linux/fuse.h) and has its reads go past the page
// cache, so that the kernel pins the reader's pages, waits for us, and fills them by its own copy:
// just as it is with O_DIRECT on a block device, on NFS and on iSCSI, without any fault at that
// time.
//
// Each line on standard input is a new delay in microseconds, for reads that come from then on. Its
// end unmounts. A line with the first delay is printed when the file can be opened.
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "tools/guest/disk_pattern.h"

enum {
  kThreads = 64,  // reads that can be under way
  kMaxReadBytes = 1 << 20,
  kRequestBytes = kMaxReadBytes + 65536,
  kRoot = 1,  // inodes
  kDisk = 2,
};

static int device;
static uint64_t size_bytes;
static atomic_long delay_us;

static struct fuse_attr Attributes(uint64_t inode) {
  struct fuse_attr a = {.ino = inode, .nlink = 1, .blksize = 4096};
  a.mode = inode == kRoot ? S_IFDIR | 0755 : S_IFREG | 0444;
  if (inode == kDisk) {
    a.size = size_bytes;
    a.blocks = size_bytes / 512;
  }
  return a;
}

static void Reply(uint64_t request, int error, const void* data, size_t size) {
  char message[sizeof(struct fuse_out_header) + kMaxReadBytes];
  const struct fuse_out_header header = {
      .len = (uint32_t)(sizeof header + size), .error = -error, .unique = request};
  memcpy(message, &header, sizeof header);
  if (size > 0) memcpy(message + sizeof header, data, size);
  // ENOENT: whoever asked has been interrupted.
  if (write(device, message, sizeof header + size) < 0 && errno != ENOENT) perror("slow_fs: write");
}

static void Read(uint64_t request, const struct fuse_read_in* in) {
  uint64_t words[kMaxReadBytes / 8];
  uint64_t count = in->offset >= size_bytes ? 0 : size_bytes - in->offset;
  if (count > in->size) count = in->size;
  if (count > kMaxReadBytes) count = kMaxReadBytes;
  const long us = atomic_load(&delay_us);
  const struct timespec delay = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000};
  nanosleep(&delay, NULL);
  for (uint64_t i = 0; i < count / 8; ++i) words[i] = DiskWord(in->offset / 8 + i);
  Reply(request, 0, words, count);
}

static void Init(uint64_t request, const struct fuse_init_in* in) {
  const uint32_t wanted = FUSE_ASYNC_READ | FUSE_MAX_PAGES | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS;
  const struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION,
                                    .minor = FUSE_KERNEL_MINOR_VERSION,
                                    .max_readahead = kMaxReadBytes,
                                    .flags = in->flags & wanted,
                                    .max_background = 256,
                                    .congestion_threshold = 200,
                                    .max_write = kMaxReadBytes,
                                    .max_pages = kMaxReadBytes / 4096,
                                    .time_gran = 1};
  Reply(request, 0, &out, sizeof out);
}

static void Answer(const struct fuse_in_header* in, const void* argument) {
  switch (in->opcode) {
    case FUSE_INIT:
      Init(in->unique, argument);
      break;
    case FUSE_LOOKUP: {
      if (strcmp(argument, "disk") != 0) {
        Reply(in->unique, ENOENT, NULL, 0);
        break;
      }
      const struct fuse_entry_out out = {
          .nodeid = kDisk, .entry_valid = 1000, .attr_valid = 1000, .attr = Attributes(kDisk)};
      Reply(in->unique, 0, &out, sizeof out);
      break;
    }
    case FUSE_GETATTR:
    case FUSE_SETATTR: {
      const struct fuse_attr_out out = {.attr_valid = 1000, .attr = Attributes(in->nodeid)};
      Reply(in->unique, 0, &out, sizeof out);
      break;
    }
    case FUSE_OPEN:
    case FUSE_OPENDIR: {
      const struct fuse_open_out out = {.fh = 1, .open_flags = FOPEN_DIRECT_IO};
      Reply(in->unique, 0, &out, sizeof out);
      break;
    }
    case FUSE_READ:
      Read(in->unique, argument);
      break;
    case FUSE_STATFS: {
      const struct fuse_statfs_out out = {.st = {.bsize = 4096, .frsize = 4096, .namelen = 255}};
      Reply(in->unique, 0, &out, sizeof out);
      break;
    }
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
      break;  // these want no answer
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_FLUSH:
    case FUSE_FSYNC:
    case FUSE_ACCESS:
      Reply(in->unique, 0, NULL, 0);
      break;
    default:
      Reply(in->unique, ENOSYS, NULL, 0);
      break;
  }
}

static void* Serve(void* unused) {
  (void)unused;
  char* request = malloc(kRequestBytes);
  while (1) {
    const ssize_t n = read(device, request, kRequestBytes);
    if (n >= (ssize_t)sizeof(struct fuse_in_header)) {
      Answer((const struct fuse_in_header*)request, request + sizeof(struct fuse_in_header));
    } else if (n >= 0 || (errno != EINTR && errno != ENOENT && errno != EAGAIN)) {
      return NULL;  // unmounted
    }
  }
}

int main(int argc, char** argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: slow_fs MOUNT_POINT MIB DELAY_US\n");
    return 2;
  }
  size_bytes = strtoull(argv[2], NULL, 10) << 20;
  atomic_store(&delay_us, strtol(argv[3], NULL, 10));
  device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
  char options[128];
  snprintf(options, sizeof options,
           "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,max_read=%d", device,
           kMaxReadBytes);
  if (device < 0 || mount("slow_fs", argv[1], "fuse", MS_NOSUID | MS_NODEV, options) != 0) {
    fprintf(stderr, "slow_fs: mount %s: %s\n", argv[1], strerror(errno));
    return 1;
  }
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 4 * kMaxReadBytes);  // for the two buffers of a read
  for (int i = 0; i < kThreads; ++i) {
    pthread_t thread;
    pthread_create(&thread, &attributes, Serve, NULL);
  }
  printf("%ld\n", atomic_load(&delay_us));
  fflush(stdout);
  char line[64];
  while (fgets(line, sizeof line, stdin) != NULL) atomic_store(&delay_us, strtol(line, NULL, 10));
  umount2(argv[1], MNT_DETACH);
  return 0;
}
