// The target's end of the RDMA link: devices write guest RAM by themselves; this receives the
// messages beside that, makes pages zero and answers. Nothing that the peer says is trusted: a
// message that is malformed or out of turn ends the link.
//
// Remote rights cover exactly the guest RAM of this link's memory, under keys of a protection
// domain that only this link's queue pairs belong to, and end with Close.
//
// Set-up is in rdma_target_setup.cc. Threads: one.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "transport/mutex.h"
#include "transport/rdma/adapter.h"
#include "transport/rdma/connection_manager.h"
#include "transport/rdma/rdma_link.h"
#include "transport/unique_fd.h"

namespace presync {

class RdmaTargetLink final : public RdmaTarget {
 public:
  // See ListenRdma.
  static absl::StatusOr<std::unique_ptr<RdmaTargetLink>> Listen(const GuestMemory* memory,
                                                                const RdmaListen& listen);
  ~RdmaTargetLink() override;

  std::string_view name() const override { return "rdma"; }
  // Besides the contract: INTERNAL after Close when a device did not let go of the memory.
  absl::Status health() const override;
  void Close() override;
  const RdmaOffer& offer() const override { return offer_; }
  absl::Status AwaitSource(absl::Time deadline) override;

 private:
  struct Device {
    RdmaAdapter adapter;
    CmId listener;
    uint32_t queues = 0;  // connected or connecting, here
  };
  struct Queue {
    uint32_t index = 0;  // in queues_
    uint32_t peer_index = 0;
    size_t device = 0;
    CmId id;
    uint32_t inline_bytes = 0;
    size_t first_buffer = 0;  // kMessageWindow for receiving, then kAnswerBuffers for answers
    bool established = false;
    uint64_t handled = 0;  // the source's newest message that was handled
    uint64_t answered = 0;
    uint64_t answers = 0;
    CommitId commit = 0;
  };
  // Answers go one by one to a window of messages; twice that, as their completions come late.
  static constexpr uint32_t kAnswerBuffers = 2 * kMessageWindow;

  RdmaTargetLink(const GuestMemory* memory, const RdmaListen& listen);
  absl::Status ListenOn(const std::string& address, const RdmaListen& listen);
  void DescribeWindows(const Device& device, RdmaEndpoint* endpoint) const;

  // The thread.
  void Run();
  void OnCmEvent(const CmEvent& event);
  absl::Status TakeConnection(const CmEvent& event, CmId id);
  void OnEstablished(rdma_cm_id* id);
  absl::Status Drain(Device* device);
  absl::Status OnCompletion(const ibv_wc& completion);
  absl::Status OnMessage(Queue* queue, const ibv_wc& completion);
  absl::Status Answer(Queue* queue);
  void Fail(const absl::Status& why);

  const GuestMemory* const memory_;
  RdmaOffer offer_;
  UniqueFd stop_;  // an eventfd: the thread shall end
  std::atomic<bool> over_ = false;

  // The thread's own, until it was joined.
  std::unique_ptr<CmChannel> channel_;
  std::vector<Device> devices_;
  std::vector<std::unique_ptr<Queue>> queues_;
  uint32_t expected_queues_ = 0;  // as the source said with the first one; 0: none yet

  mutable Mutex mu_;
  CondVar connected_cv_;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  bool connected_ ABSL_GUARDED_BY(mu_) = false;
  Mutex close_mu_;  // held while closing, so that a second Close returns no earlier
  std::thread thread_ ABSL_GUARDED_BY(close_mu_);
};

}  // namespace presync
