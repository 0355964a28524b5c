#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "glue.h"
#include "kernel_abi.h"

/* Tries the ways to a userfaultfd, the mightiest first. -1 with the errno of the last one that says
 * something: ENOSYS if the kernel has none, else EPERM and the like. */
static int open_any(int device, bool user_mode_is_enough) {
  const int flags = O_CLOEXEC | O_NONBLOCK;
  if (device >= 0) {
    const int fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
    if (fd >= 0) return fd;
  }
  const int fd = (int)syscall(SYS_userfaultfd, flags);
  if (fd >= 0 || errno != EPERM || !user_mode_is_enough) return fd;
  return (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
}

static uint64_t features_of_mode(uint32_t mode) {
  if (mode == PRESYNC_GLUE_MODE_ASYNC) {
    return UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM |
           UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC;
  }
  return UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
}

int presync_uffd_open(uint32_t mode, int device, struct presync_result* result) {
  const int fd = open_any(device, mode == PRESYNC_GLUE_MODE_ASYNC);
  if (fd < 0) {
    *result = (struct presync_result){errno, PRESYNC_GLUE_STEP_OPEN};
    return -1;
  }
  struct uffdio_api api = {.api = UFFD_API, .features = features_of_mode(mode)};
  if (ioctl(fd, UFFDIO_API, &api) != 0) {
    *result = (struct presync_result){errno, PRESYNC_GLUE_STEP_API};
    close(fd);
    return -1;
  }
  return fd;
}

uint64_t presync_uffd_features(int* error) {
  *error = 0;
  const int fd = open_any(-1, true);
  if (fd < 0) {
    *error = errno;
    return 0;
  }
  struct uffdio_api api = {.api = UFFD_API};
  if (ioctl(fd, UFFDIO_API, &api) != 0) *error = errno;
  close(fd);
  return *error == 0 ? api.features : 0;
}
