// The network between the two hosts of the fault campaign: control connections whose frames can be
// seen and damaged, and page links that are the fake of transport/fake.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "tests/faults/side.h"
#include "transport/fake/fake_link.h"
#include "transport/mutex.h"
#include "transport/sync/dialer.h"
#include "transport/sync/source_connection.h"
#include "transport/sync/target_service.h"

namespace presync {

// What becomes of one frame.
enum class FrameFault { kNone, kTruncate, kDuplicate, kCorrupt, kDelay };

// Thread-safe. Both services and sessions that use it must have ended before it is destroyed.
class Network {
 public:
  // Called before and after a control frame passes, by the message's name in control.proto; what it
  // returns before it is done to the frame.
  using FrameHook = std::function<FrameFault(const std::string& message, bool before)>;

  Network(uint64_t seed, FrameHook hook);
  ~Network();

  // The target's life that answers now; null: connections are refused.
  void SetTarget(TargetService* service, Life* life) ABSL_LOCKS_EXCLUDED(mutex_);

  // For a presyncd at the source.
  std::unique_ptr<Dialer> MakeDialer(Life* life);
  MakeSourceLink SourceLinks(const GuestMemory* memory, Life* life);
  // For one at the target.
  MakeTargetLink TargetLinks(Life* life);

  // Every connection ends at once, as by RST.
  void Reset() ABSL_LOCKS_EXCLUDED(mutex_);
  // As Reset, and nothing connects while it is down.
  void SetDown(bool down);
  // Nothing passes, and nobody is told.
  void SetSilent(bool silent) { silent_ = silent; }
  // Of the page links that are made from now on.
  void SetLinkFaults(const FakeLinkFaults& faults) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  friend class NetworkDialer;
  struct Connection {
    UniqueFd source, target;  // our ends
    Life* source_life = nullptr;
    Life* target_life = nullptr;
    std::atomic<bool> done = false;
    std::thread thread;
  };
  struct Meeting {  // of the two ends of a page link
    const GuestMemory* target_memory = nullptr;
    std::unique_ptr<TargetLink> target_end;
    bool over = false;
  };
  class SourceEnd;
  class TargetEnd;

  absl::StatusOr<UniqueFd> Connect(Life* source_life, const Preamble& preamble)
      ABSL_LOCKS_EXCLUDED(mutex_);
  void Carry(Connection* connection);
  bool CarryOne(Connection* connection, bool from_source);
  absl::StatusOr<std::unique_ptr<SourceLink>> MeetAtSource(const SessionId& token,
                                                           const GuestMemory* memory, Life* life,
                                                           absl::Time deadline)
      ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<std::unique_ptr<TargetLink>> MeetAtTarget(const SessionId& token,
                                                           const GuestMemory* memory, Life* life,
                                                           absl::Time deadline)
      ABSL_LOCKS_EXCLUDED(mutex_);

  const FrameHook hook_;
  std::atomic<bool> down_ = false;
  std::atomic<bool> silent_ = false;
  std::atomic<uint64_t> epoch_ = 0;  // grows with every reset: older links are dead

  Mutex mutex_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mutex_);
  TargetService* service_ ABSL_GUARDED_BY(mutex_) = nullptr;
  Life* target_life_ ABSL_GUARDED_BY(mutex_) = nullptr;
  FakeLinkFaults link_faults_ ABSL_GUARDED_BY(mutex_);
  std::list<Connection> connections_ ABSL_GUARDED_BY(mutex_);
  std::map<SessionId, Meeting> meetings_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace presync
