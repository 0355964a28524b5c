#include "transport/rdma/verbs.h"

#include <errno.h>

#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace presync {

int NoteDestroy(const char* what, int error) {
  if (error != 0) {
    std::fprintf(stderr, "rdma link: destroying a %s failed: %s\n", what, std::strerror(error));
  }
  return error;
}

int CmId::Destroy() {
  if (id_ == nullptr) return 0;
  int error = 0;
  if (id_->qp != nullptr) {
    rdma_disconnect(id_);  // it may never have been connected
    error = NoteDestroy("queue pair", ibv_destroy_qp(id_->qp));
    id_->qp = nullptr;
  }
  NoteDestroy("connection", rdma_destroy_id(id_) == 0 ? 0 : errno);
  id_ = nullptr;
  return error;
}

absl::Status VerbsError(absl::string_view operation, absl::string_view object, int error) {
  const std::string text =
      absl::StrCat("rdma link: ", operation, " ", object, ": ", std::strerror(error));
  switch (error) {
    case ENODEV:
    case ENOSYS:
    case EOPNOTSUPP:
    case EADDRNOTAVAIL:
      return absl::UnimplementedError(text);
    case ENOMEM:
      return absl::ResourceExhaustedError(text);
    default:
      return absl::UnavailableError(text);
  }
}

}  // namespace presync
