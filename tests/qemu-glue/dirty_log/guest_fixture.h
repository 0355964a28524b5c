// A synthetic guest as a child process, with the real library preloaded.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "predictor/page.h"
#include "qemu-glue/dirty_log/guest_maps.h"
#include "qemu-glue/process_identity.h"
#include "tests/qemu-glue/dirty_log/synthetic_guest.h"
#include "transport/unique_fd.h"

namespace presync::testing {

// A folder under /tmp that is removed with what is in it.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

struct GuestRegionSpec {
  PageCount pages;
  bool split = false;  // mapped in two pieces
};

// Aborts the test program if the guest can't be started; the guest ends with it.
class SyntheticGuest {
 public:
  explicit SyntheticGuest(const std::vector<GuestRegionSpec>& specs);
  SyntheticGuest(const SyntheticGuest&) = delete;
  SyntheticGuest& operator=(const SyntheticGuest&) = delete;
  ~SyntheticGuest();

  // Sends a command and waits for its answer: 0 or an errno.
  int Do(guest_op op, uint32_t region = 0, uint32_t page = 0, uint32_t count = 1,
         uint64_t seed = 0);
  // The same in two steps, for commands that may have to wait for someone.
  void Send(guest_op op, uint32_t region, uint32_t page, uint32_t count);
  int Answer();

  void Kill();  // SIGKILL, and waits for its end

  pid_t pid() const { return pid_; }
  // Of the process as it lives now.
  ProcessIdentity process() const { return IdentifyProcess(pid_); }
  const std::string& socket() const { return socket_; }
  const std::vector<RegionFile>& regions() const { return regions_; }
  PageCount pages() const { return regions_.back().run.end(); }
  // The files behind its regions, in their order.
  const std::vector<UniqueFd>& files() const { return files_; }
  // A page's bytes, through a mapping of our own.
  std::byte* Page(PageIndex page) const;

 private:
  TempFolder folder_;
  std::string socket_;
  std::vector<UniqueFd> files_;
  std::vector<RegionFile> regions_;
  std::vector<std::byte*> memory_;
  pid_t pid_ = -1;
  UniqueFd to_guest_;
  UniqueFd from_guest_;
};

}  // namespace presync::testing
