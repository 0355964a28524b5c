// Owners of verbs objects: move-only, one owner each. Hold them in the order of their making: they
// must go in the opposite one. A destroy that fails is written to stderr and otherwise ignored:
// the guest is still running.
#pragma once

#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace presync {

// Writes one line to stderr if `error` (an errno) is not 0, and returns it.
int NoteDestroy(const char* what, int error);

template <typename T, int (*kDestroy)(T*)>
struct VerbsDeleter {
  const char* what = "object";
  void operator()(T* object) const { NoteDestroy(what, kDestroy(object)); }
};
template <typename T, int (*kDestroy)(T*)>
using OwnedVerbs = std::unique_ptr<T, VerbsDeleter<T, kDestroy>>;

using OwnedPd = OwnedVerbs<ibv_pd, ibv_dealloc_pd>;
using OwnedMr = OwnedVerbs<ibv_mr, ibv_dereg_mr>;
using OwnedCq = OwnedVerbs<ibv_cq, ibv_destroy_cq>;
using OwnedCompChannel = OwnedVerbs<ibv_comp_channel, ibv_destroy_comp_channel>;

// A connection of the RDMA connection manager and its queue pair, if one was made.
class CmId {
 public:
  CmId() = default;
  explicit CmId(rdma_cm_id* id) : id_(id) {}
  CmId(CmId&& other) noexcept : id_(std::exchange(other.id_, nullptr)) {}
  CmId& operator=(CmId&& other) noexcept {
    if (this != &other) {
      Destroy();
      id_ = std::exchange(other.id_, nullptr);
    }
    return *this;
  }
  ~CmId() { Destroy(); }

  rdma_cm_id* get() const { return id_; }
  rdma_cm_id* operator->() const { return id_; }

  // Ends the connection: the queue pair is gone when it returns, so nothing is received any more.
  // 0, or the errno with which the queue pair refused to go.
  int Destroy();

 private:
  rdma_cm_id* id_ = nullptr;
};

// "operation object: cause", with a code that fits the errno: UNIMPLEMENTED for a device that is
// not there or can't, RESOURCE_EXHAUSTED for ENOMEM, else UNAVAILABLE.
absl::Status VerbsError(absl::string_view operation, absl::string_view object, int error);

}  // namespace presync
