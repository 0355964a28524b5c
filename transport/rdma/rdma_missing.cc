// In place of the RDMA link in a build without rdma-core.
#include "transport/rdma/rdma_link.h"

namespace presync {
namespace {

absl::Status Missing() {
  return absl::UnimplementedError(
      "this presync was built without RDMA: it looked for libibverbs and librdmacm (Debian: "
      "libibverbs-dev, librdmacm-dev)");
}

}  // namespace

absl::Status CheckRdma(const std::vector<std::string>&) { return Missing(); }

absl::StatusOr<RdmaSource> ConnectRdma(const GuestMemory*, const RdmaOffer&,
                                       const RdmaSourceOptions&, absl::Time) {
  return Missing();
}

absl::StatusOr<std::unique_ptr<RdmaTarget>> ListenRdma(const GuestMemory*, const RdmaListen&) {
  return Missing();
}

}  // namespace presync
