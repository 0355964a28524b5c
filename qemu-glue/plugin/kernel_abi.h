/* Kernel interfaces that Debian 12's headers (Linux 6.1) do not know yet. Numbers are the kernel's
 * ABI: include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h of Linux 6.7. For C and C++. */
#ifndef PRESYNC_QEMU_GLUE_PLUGIN_KERNEL_ABI_H_
#define PRESYNC_QEMU_GLUE_PLUGIN_KERNEL_ABI_H_

#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>

#ifndef UFFD_FEATURE_WP_UNPOPULATED /* Linux 6.4 */
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC /* Linux 6.7 */
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

#ifndef PAGEMAP_SCAN /* Linux 6.7; Documentation/admin-guide/mm/pagemap.rst */
#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN (1 << 1)
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)

struct page_region {
  uint64_t start;
  uint64_t end;
  uint64_t categories;
};

struct pm_scan_arg {
  uint64_t size;
  uint64_t flags;
  uint64_t start;
  uint64_t end;
  uint64_t walk_end;
  uint64_t vec;
  uint64_t vec_len;
  uint64_t max_pages;
  uint64_t category_inverted;
  uint64_t category_mask;
  uint64_t category_anyof_mask;
  uint64_t return_mask;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#endif

/* Bit of a /proc/PID/pagemap entry: the page is write-protected through userfaultfd. */
#define PRESYNC_PAGEMAP_UFFD_WP (UINT64_C(1) << 57)

#endif /* PRESYNC_QEMU_GLUE_PLUGIN_KERNEL_ABI_H_ */
