// The source's session: keeps one guest in sync with one target over links that come and go, and
// hands it over when told to.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/dirty_log.h"
#include "transport/guest.h"
#include "transport/memory.h"
#include "transport/mutex.h"
#include "transport/sync/dialer.h"
#include "transport/sync/link_return.h"
#include "transport/sync/resumption.h"
#include "transport/sync/session_comparisons.h"
#include "transport/sync/session_recording.h"
#include "transport/sync/settlement.h"
#include "transport/sync/source_connection.h"
#include "transport/sync/source_handover.h"
#include "transport/sync/source_sync.h"
#include "transport/sync/write_recorder.h"

namespace presync {

struct SourceSessionOptions {
  std::string guest;
  std::string guest_address;  // how this host reaches the guest's QEMU: for the handover record
  std::string guest_process;  // HandoverEntry::process
  std::string domain;         // libvirt's UUID of a guest with a manager; else empty
  std::string record_folder;
  SourceSyncOptions sync;
  uint32_t tcp_streams = 4;
  TcpSourceOptions tcp;
  SocketOptions socket;
  Transport transport = Transport::kAuto;
  std::string tcp_reason = SessionRequest().tcp_reason;
  RdmaSourceOptions rdma;
  MakeSourceLink make_link = nullptr;  // see SessionRequest
  absl::Duration connect_timeout = absl::Seconds(20);
  absl::Duration reconnect_every = absl::Seconds(1);
  // Start() does not wait for the target: it is tried until it is there, as one that was lost.
  bool connect_later = false;
  // How soon RDMA is tried again while TCP carries the sync; doubles with each failure.
  absl::Duration rdma_retry = absl::Seconds(30);
  absl::Duration rdma_retry_longest = absl::Minutes(8);
  // How often the requests of the guest's devices are looked at, and pages that are ripe compared.
  // Each look takes QEMU's main loop some 0.1 ms, and is waited for: 1 to 5 ms under TCG
  // (2026-11-30). More of them would settle pages sooner, and cost more than the sync itself.
  absl::Duration look_every = absl::Seconds(2);
  // How often pages that are ripe are compared although they are few: those of SessionComparisons.
  absl::Duration settle_few_every = SessionComparisons::Options().settle_few_every;
  // How often the guest is looked at: its state, and whether devices came or went.
  absl::Duration watch_every = absl::Seconds(5);
  // Memory that the background audit compares a second; 0: no audit.
  uint64_t audit_bytes_per_s = 0;
  // Called when a launch has ended that the guest's manager began by itself. The session's thread.
  std::function<void(absl::Time ordered_at, const absl::StatusOr<HandoverReport>& report)>
      on_managed_launch = [](absl::Time, const absl::StatusOr<HandoverReport>&) {};
  // Called with one line whenever an operator would want to know. The session's thread.
  std::function<void(bool problem, const std::string& line)> log = [](bool, const std::string&) {};
};

enum class SessionState {
  kConnecting,  // the link broke, or was never there; the guest runs here
  kFirstPass,   // the first copy of all memory is under way
  kSyncing,     // everything was copied once; the residual is held at the set-point
  kLaunching,
  kMoved,    // the guest runs on the target
  kStuck,    // called off, and the guest could not be resumed yet: it stands still, here
  kInDoubt,  // given up, and the target can't be asked
  kFailed,   // ended by an error, which says what is known of the guest
  kStopped,  // ended by the operator; the guest runs here
};

absl::string_view StateName(SessionState state);

// Whether a session in this state is over, and makes room for another one.
bool IsOver(SessionState state);

struct SessionStatus {
  SessionState state = SessionState::kConnecting;
  std::string guest;
  std::string guest_address;  // as in the options
  std::string session;        // the id, in hex
  std::string peer;
  std::string link;                       // "rdma", "tcp" or empty
  std::vector<std::string> link_devices;  // of an RDMA link, by name
  std::string link_reason;                // why it is this kind of link
  std::string dirty_log;
  // Why it is connecting, failed or in doubt, or why the guest can't be launched as it is; empty if
  // all is well.
  std::string problem;
  bool launchable = false;            // what is known stands in no launch's way
  std::vector<std::string> warnings;  // what the guest's operator has to know
  absl::Duration uptime = absl::ZeroDuration();
  absl::Duration promise = absl::ZeroDuration();
  absl::Duration fixed_cost = absl::ZeroDuration();
  uint32_t reconnects = 0;
  SyncProgress progress;
  ComparisonStatus comparisons;
  ResumptionStatus resumption;
};

// Everything public may be called from any thread. The session owns a thread of its own, which
// alone touches guest, log and link.
class SourceSession {
 public:
  // Connects once (but with `connect_later`), so that what is wrong is said at once, then goes on
  // in its own thread. Takes all of its parts; the guest is not touched before a launch. Errors as
  // ConnectSource and SourceSync.
  static absl::StatusOr<std::unique_ptr<SourceSession>> Start(SourceSessionOptions options,
                                                              std::unique_ptr<Dialer> dialer,
                                                              GuestMemory memory,
                                                              std::unique_ptr<DirtyLog> log,
                                                              std::unique_ptr<SourceGuest> guest);
  // Ends the sync, but for the target, which keeps its copy for a session that goes on with it.
  // The guest goes on here. Never interrupts a handover.
  ~SourceSession();

  SessionStatus status() const ABSL_LOCKS_EXCLUDED(mutex_);

  // Waits until it is not connecting any more: false if that has not come to be.
  bool AwaitConnected(absl::Duration longest) ABSL_LOCKS_EXCLUDED(mutex_);

  // Hands the guest over. Blocks until it runs on the target or the launch has failed. With
  // `wait_for_first_pass` it waits for the first full sync. FAILED_PRECONDITION: the first pass is
  // not done, or the session is in a state that can't launch, with what to do.
  absl::StatusOr<HandoverReport> Launch(const HandoverOptions& options,
                                        absl::Duration wait_for_first_pass)
      ABSL_LOCKS_EXCLUDED(mutex_);

  // Ends the sync and tells the target to forget the memory. The guest goes on here.
  // FAILED_PRECONDITION: a launch is under way, or the guest's fate is in doubt.
  absl::Status Stop() ABSL_LOCKS_EXCLUDED(mutex_);

  // What a person found out about a guest in doubt: that it certainly does not run on the target
  // and never will, so that it goes on here; or that it does. The target is asked first. Waits
  // until that is done; the sentence that says what was. FAILED_PRECONDITION: the session is not in
  // doubt, the target knows better, or the guest could not be resumed yet.
  absl::StatusOr<std::string> Decide(const Word& word) ABSL_LOCKS_EXCLUDED(mutex_);

  // Compares all memory by hash while the guest runs; pages that differ are sent again. Blocks
  // until it is done, which a launch, a stop or a lost link ends: FAILED_PRECONDITION, ABORTED or
  // the link's error. UNIMPLEMENTED: the target's presync is too old.
  absl::StatusOr<ComparisonReport> Verify() ABSL_LOCKS_EXCLUDED(mutex_);

  // Records what the guest writes, beside the sync, while the session lasts. A launch ends it.
  SessionRecording* recording() { return &recording_; }
  PageCount pages() const { return pages_; }

 private:
  struct LaunchOrder {
    HandoverOptions options;
    absl::Time ordered_at;
    bool done = false;
    absl::StatusOr<HandoverReport> result = absl::UnknownError("not launched");
  };

  SourceSession(SourceSessionOptions options, std::unique_ptr<Dialer> dialer, GuestMemory memory,
                std::unique_ptr<DirtyLog> log, std::unique_ptr<SourceGuest> guest);

  void Run();
  void Join() ABSL_LOCKS_EXCLUDED(join_mutex_);
  bool StopRequested() const ABSL_LOCKS_EXCLUDED(mutex_);
  bool ForgetRequested() const ABSL_LOCKS_EXCLUDED(mutex_);
  void ReleaseMemory();
  absl::Status ReserveRecord();
  void RemoveRecord();
  void Serve(LaunchOrder* order);
  absl::Status CheckLaunchable() const;
  absl::Status CheckGuest();
  void LookAtGuest(absl::Duration longest);
  void WatchGuest();
  void ProveAgain();
  void EndWithGuest();
  void EndWithMemory(const absl::Status& why);
  bool GuestIsGone();
  std::string Problem() const;
  std::vector<std::string> Warnings() const;
  absl::Status CheckFit() const;
  void NoteFit();
  void CloseSession();
  void HandOver(LaunchOrder* order);
  void ServeManaged(LaunchOrder* order);
  void BeginManaged(LaunchOrder* order);
  void TakeUpManaged(LaunchOrder* order);
  absl::Status TickManaged();
  absl::Duration IdleStep() const;
  void WaitABit();
  absl::Status OnLaunchComing();
  void OnLaunchOff(const std::string& reason);
  absl::Status TickConnected();
  absl::Status PollControl();
  absl::Status TakeMessages();
  void LookAtRequests();
  absl::Status Compare();
  absl::Status NoComparison() const;
  absl::Status Connect();
  SessionRequest Request() const;
  void LoseLink(const absl::Status& why);
  bool RdmaFailed() const;
  void NoteRdmaFailure(const absl::Status& why);
  bool FallBack(const absl::Status& why);
  void PostponeRdma();
  void TryRdmaAgain();
  void SwitchToRdma();
  void EndReturn();
  void Retire(std::unique_ptr<SourceLink> link);
  void ResolveDoubt();
  void HoldStill();
  absl::StatusOr<wire::Outcome> AskAndHoldStill(bool end_it);
  absl::Status TakeWord(const Word& word, const absl::StatusOr<wire::Outcome>& outcome);
  std::optional<Word> PendingWord() const ABSL_LOCKS_EXCLUDED(mutex_);
  void AnswerWord(absl::Status answer) ABSL_LOCKS_EXCLUDED(mutex_);
  bool MayRunHere();
  void ResumeHere(const std::string& why);
  void Settle(SessionState state, const absl::Status& why);
  void Publish() ABSL_LOCKS_EXCLUDED(mutex_);
  bool Ended() const { return IsOver(state_); }
  // The guest's fate is open: nothing else matters until it is settled.
  bool Open() const { return state_ == SessionState::kInDoubt || state_ == SessionState::kStuck; }
  LaunchOrder* WaitForOrder(absl::Duration longest) ABSL_LOCKS_EXCLUDED(mutex_);
  void Answer(LaunchOrder* order, absl::StatusOr<HandoverReport> result)
      ABSL_LOCKS_EXCLUDED(mutex_);

  const SourceSessionOptions options_;
  const SessionId id_;
  const absl::Time started_;
  const std::unique_ptr<Dialer> dialer_;
  const PageCount pages_;
  // Null, and `sync_` with them, once the session is over: they hold the guest's memory.
  std::unique_ptr<const GuestMemory> memory_;
  std::unique_ptr<WriteRecorder> log_;
  const std::unique_ptr<SourceGuest> guest_;
  SessionRecording recording_;
  SessionComparisons comparisons_;
  ResumptionMeter resumption_;

  // The session thread's own.
  std::unique_ptr<SourceSync> sync_;
  SourceConnection connection_;
  bool connected_ = false;
  bool attached_before_ = false;
  SessionState state_ = SessionState::kConnecting;
  std::string problem_;
  GuestOutlook outlook_;         // as it was at the last look
  bool resume_refused_ = false;  // its process was asked to run the guest again, and would not
  bool shape_told_ = false;      // the target has compared outlook_.shape
  std::vector<std::string> differences_, fit_warnings_;  // as the target last found them
  bool unproven_again_ = false;  // memory was written unseen, and the copy is not compared yet
  absl::Time next_watch_ = absl::InfinitePast();
  absl::Time next_memory_look_ = absl::InfinitePast();
  uint32_t reconnects_ = 0;
  absl::Time next_connect_ = absl::InfinitePast();
  absl::Time next_ping_ = absl::InfinitePast();
  absl::Time next_publish_ = absl::InfinitePast();
  absl::Time next_look_ = absl::InfinitePast();  // at the requests of the guest's devices
  std::unique_ptr<HandoverRecord> record_;       // from the end of the first pass on
  // With a guest that has a manager.
  bool manager_told_ = false;  // of the launch that is ordered
  absl::Time coming_since_ = absl::InfinitePast();
  absl::Time next_round_ = absl::InfinitePast();
  // The way back to RDMA, while TCP carries the sync.
  std::unique_ptr<LinkReturn> return_;
  absl::Time next_rdma_ = absl::InfinitePast();
  absl::Duration rdma_wait_ = absl::ZeroDuration();
  absl::Time rdma_since_ = absl::InfinitePast();
  std::string rdma_problem_;               // as it was last told
  std::vector<std::string> lost_devices_;  // of the RDMA link that failed last
  std::thread retiring_;                   // destroys a failed link, which may take its time

  std::atomic<int> waiting_launches_ = 0;  // for the first pass to end

  mutable Mutex mutex_;
  SessionStatus published_ ABSL_GUARDED_BY(mutex_);
  LaunchOrder* order_ ABSL_GUARDED_BY(mutex_) = nullptr;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  bool forget_ ABSL_GUARDED_BY(mutex_) = false;  // stopped by a person: nothing goes on
  // What a person said of a guest in doubt, until it was answered.
  std::optional<Word> word_ ABSL_GUARDED_BY(mutex_);
  absl::Status word_answer_ ABSL_GUARDED_BY(mutex_);

  Mutex join_mutex_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace presync
