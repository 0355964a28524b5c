// The data links of one conversation, at the target: from protocol version 2 on there may be
// several at a time, so that a new one is brought up while the old one works.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "transport/link.h"
#include "transport/memory.h"
#include "transport/mutex.h"
#include "transport/rdma/rdma_link.h"
#include "transport/sync/target_service.h"
#include "transport/wire/control_channel.h"

namespace presync {

// One thread at a time may use it; bringing links up goes on in threads of its own, which answer
// on the channel by themselves.
class TargetLinks {
 public:
  static constexpr size_t kMaxLinks = 4;  // of one conversation at a time

  // All must outlive it. `on_up` is called, from any thread, before a link is said to be ready.
  TargetLinks(TargetService* service, ControlChannel* channel, const GuestMemory* memory,
              std::string guest, std::function<void()> on_up);
  ~TargetLinks();

  // Takes a link that is up, of a conversation of version 1.
  void Adopt(std::unique_ptr<TargetLink> link);

  // Begins to bring a link up; LinkOffer, LinkReady or LinkRefused follow. Does not block.
  // INVALID_ARGUMENT: a number that is in use, or too many links.
  absl::Status Open(const wire::OpenLink& open);

  // Closes a link, up or not, and answers LinkClosed. Blocks until nothing writes through it.
  absl::Status Close(uint32_t number);

  // Closes all of them. INTERNAL: a device holds on to the memory: no guest may run on it.
  absl::Status CloseAll();

  // INVALID_ARGUMENT: a peer broke a link's protocol. A link that is only gone is its source's to
  // close; of version 1, whose one link is the conversation's life, it is an error too.
  absl::Status Check();

 private:
  struct Entry {
    uint32_t number = 0;
    SessionToken token = {};
    std::thread opener;
    std::atomic<bool> cancelled = false;
    bool told = false;  // that it is gone
    Mutex mutex;
    std::unique_ptr<TargetLink> link ABSL_GUARDED_BY(mutex);
  };

  void Bring(Entry* entry, const wire::OpenLink& open);
  absl::Status BringTcp(Entry* entry, uint32_t streams);
  absl::StatusOr<std::unique_ptr<TargetLink>> TakeTcp(const SessionToken& token,
                                                      absl::Time deadline, bool* encrypted);
  absl::Status BringRdma(Entry* entry, uint32_t queue_pairs);
  absl::Status Publish(Entry* entry, std::unique_ptr<TargetLink> link);
  absl::Status End(Entry* entry);
  absl::Status Send(const wire::ControlMessage& message);

  TargetService* const service_;
  ControlChannel* const channel_;
  const GuestMemory* const memory_;
  const std::string guest_;
  const std::function<void()> on_up_;
  std::list<Entry> entries_;
  std::list<Entry> closed_;  // by CloseAll: to free their buffers takes longer than to close them
};

}  // namespace presync
