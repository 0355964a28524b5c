#include "transport/sync/source_session.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transport/clock.h"
#include "transport/sync/conversation.h"
#include "transport/sync/link_messages.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

// While the link has work the session looks again this soon; a page waits no longer for its turn.
constexpr absl::Duration kBusyStep = absl::Milliseconds(1);
constexpr absl::Duration kPublishEvery = absl::Milliseconds(100);
constexpr absl::Duration kPingEvery = absl::Seconds(1);

}  // namespace

absl::string_view StateName(SessionState state) {
  switch (state) {
    case SessionState::kConnecting:
      return "connecting";
    case SessionState::kFirstPass:
      return "first-pass";
    case SessionState::kSyncing:
      return "syncing";
    case SessionState::kLaunching:
      return "launching";
    case SessionState::kMoved:
      return "moved";
    case SessionState::kStuck:
      return "stuck";
    case SessionState::kInDoubt:
      return "in-doubt";
    case SessionState::kFailed:
      return "failed";
    case SessionState::kStopped:
      return "stopped";
  }
  return "unknown";
}

bool IsOver(SessionState state) {
  return state == SessionState::kMoved || state == SessionState::kFailed ||
         state == SessionState::kStopped;
}

absl::StatusOr<std::unique_ptr<SourceSession>> SourceSession::Start(
    SourceSessionOptions options, std::unique_ptr<Dialer> dialer, GuestMemory memory,
    std::unique_ptr<DirtyLog> log, std::unique_ptr<SourceGuest> guest) {
  std::unique_ptr<SourceSession> session(new SourceSession(
      std::move(options), std::move(dialer), std::move(memory), std::move(log), std::move(guest)));
  absl::StatusOr<std::unique_ptr<SourceSync>> sync =
      SourceSync::Create(session->memory_.get(), session->log_.get(), session->options_.sync);
  if (!sync.ok()) return sync.status();
  session->sync_ = *std::move(sync);
  session->LookAtGuest(absl::Seconds(10));
  if (!session->options_.connect_later) {
    if (absl::Status s = session->Connect(); !s.ok()) return s;
    if (absl::Status s = session->CheckFit(); !s.ok()) {
      session->CloseSession();
      session->sync_->DetachLink();
      return s;
    }
  }
  session->Publish();
  session->thread_ = std::thread([raw = session.get()] { raw->Run(); });
  return session;
}

SourceSession::SourceSession(SourceSessionOptions options, std::unique_ptr<Dialer> dialer,
                             GuestMemory memory, std::unique_ptr<DirtyLog> log,
                             std::unique_ptr<SourceGuest> guest)
    : options_(std::move(options)),
      id_(RandomId()),
      started_(MonotonicNow()),
      dialer_(std::move(dialer)),
      pages_(memory.pages()),
      memory_(std::make_unique<const GuestMemory>(std::move(memory))),
      log_(std::make_unique<WriteRecorder>(std::move(log), memory_.get())),
      guest_(std::move(guest)),
      comparisons_({.audit_bytes_per_s = options_.audit_bytes_per_s,
                    .settle_few_every = options_.settle_few_every,
                    .log = options_.log,
                    .guest = options_.guest,
                    .peer = dialer_->peer(),
                    .publish = [this] { Publish(); }},
                   memory_.get()) {}

SourceSession::~SourceSession() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
  }
  Join();
}

void SourceSession::Join() {
  MutexLock lock(&join_mutex_);
  if (thread_.joinable()) thread_.join();
}

bool SourceSession::StopRequested() const {
  MutexLock lock(&mutex_);
  return stop_;
}

bool SourceSession::ForgetRequested() const {
  MutexLock lock(&mutex_);
  return forget_;
}

SessionStatus SourceSession::status() const {
  MutexLock lock(&mutex_);
  return published_;
}

bool SourceSession::AwaitConnected(absl::Duration longest) {
  MutexLock lock(&mutex_);
  const auto connected = [this] {
    mutex_.AssertHeld();
    return published_.state != SessionState::kConnecting;
  };
  return mutex_.AwaitWithTimeout(connected, longest);
}

absl::StatusOr<HandoverReport> SourceSession::Launch(const HandoverOptions& options,
                                                     absl::Duration wait_for_first_pass) {
  LaunchOrder order{.options = options};
  MutexLock lock(&mutex_);
  if (order_ != nullptr) return absl::FailedPreconditionError("a launch is already under way");
  const auto launchable_or_over = [this] {
    mutex_.AssertHeld();
    return published_.state != SessionState::kConnecting &&
           published_.state != SessionState::kFirstPass;
  };
  ++waiting_launches_;
  mutex_.AwaitWithTimeout(launchable_or_over, wait_for_first_pass);
  --waiting_launches_;
  if (order_ != nullptr || stop_) {
    return absl::FailedPreconditionError("another launch or a stop came first");
  }
  if (published_.state != SessionState::kSyncing) {
    const bool first_pass = published_.state == SessionState::kFirstPass;
    return absl::FailedPreconditionError(absl::StrCat(
        options_.guest, " can't be launched: it is ", StateName(published_.state),
        published_.problem.empty() ? "" : ": ", published_.problem,
        first_pass ? "; its memory was not copied once yet. Wait for it (launch --wait)" : ""));
  }
  order.ordered_at = MonotonicNow();
  order_ = &order;
  const auto done = [&order] { return order.done; };
  mutex_.Await(done);
  return order.result;
}

absl::Status SourceSession::Stop() {
  {
    MutexLock lock(&mutex_);
    if (order_ != nullptr || published_.state == SessionState::kLaunching) {
      return absl::FailedPreconditionError("a launch is under way; wait for its end");
    }
    if (published_.state == SessionState::kInDoubt || published_.state == SessionState::kStuck) {
      return absl::FailedPreconditionError(
          absl::StrCat(options_.guest, " is ", StateName(published_.state), ": ",
                       published_.problem, ". Stopping would forget that; see presync status"));
    }
    stop_ = forget_ = true;
  }
  Join();
  return absl::OkStatus();
}

absl::StatusOr<std::string> SourceSession::Decide(const Word& word) {
  MutexLock lock(&mutex_);
  if (published_.state != SessionState::kInDoubt) {
    return absl::FailedPreconditionError(
        absl::StrCat(options_.guest, " is not in doubt, but ", StateName(published_.state)));
  }
  word_ = word;
  word_answer_ = absl::OkStatus();
  const auto answered = [this] {
    mutex_.AssertHeld();
    return !word_ || published_.state != SessionState::kInDoubt;
  };
  // A question to the target that is under way comes first; then the guest is resumed or ended.
  mutex_.AwaitWithTimeout(answered, absl::Seconds(45));
  word_.reset();
  if (!word_answer_.ok()) return word_answer_;
  switch (published_.state) {
    case SessionState::kInDoubt:
    case SessionState::kStuck:
      return absl::FailedPreconditionError(published_.problem);
    case SessionState::kMoved:
      return absl::StrCat(options_.guest, " runs at ", dialer_->peer(),
                          ", or wherever it moved on to: its QEMU here was ended");
    default:
      return absl::StrCat(options_.guest, " goes on here");
  }
}

std::optional<Word> SourceSession::PendingWord() const {
  MutexLock lock(&mutex_);
  return word_;
}

void SourceSession::AnswerWord(absl::Status answer) {
  MutexLock lock(&mutex_);
  if (!word_) return;
  word_answer_ = std::move(answer);
  word_.reset();
}

// The session thread. -----------------------------------------------------------------------------

void SourceSession::Run() {
  while (!Ended()) {
    if (state_ == SessionState::kInDoubt) {
      ResolveDoubt();
    } else if (state_ == SessionState::kStuck) {
      ResumeHere(problem_);
    } else if (!connected_ && MonotonicNow() >= next_connect_) {
      next_connect_ = MonotonicNow() + options_.reconnect_every;
      if (absl::Status s = Connect(); !s.ok()) problem_ = std::string(s.message());
    }
    if (!Open()) {
      // A log that fails here fails in the sync's own look too.
      recording_.Step(log_.get(), MonotonicNow()).IgnoreError();
      if (absl::Status s = TickConnected(); !s.ok()) LoseLink(s);
    }
    LookAtRequests();
    WatchGuest();
    if (!connected_) comparisons_.Drop(NoComparison());
    if (MonotonicNow() >= next_publish_) Publish();

    const bool busy = connected_ && sync_->busy();
    LaunchOrder* order = WaitForOrder(busy ? absl::ZeroDuration() : IdleStep());
    if (guest_->managed() != nullptr) {
      ServeManaged(order);
    } else if (order != nullptr) {
      Serve(order);
    }
    if (StopRequested()) break;
  }
  if (LaunchOrder* late = WaitForOrder(absl::ZeroDuration()); late != nullptr) {
    Answer(late, absl::FailedPreconditionError(absl::StrCat(
                     options_.guest, " can't be launched: it is ", StateName(state_))));
  }
  if (!Open() && !Ended()) {
    if (connected_ && ForgetRequested()) CloseSession();
    state_ = SessionState::kStopped;
  }
  comparisons_.End(absl::FailedPreconditionError(
      absl::StrCat("the sync ended: ", options_.guest, " is ", StateName(state_))));
  recording_.End(absl::StrCat("the sync ended: ", options_.guest, " is ", StateName(state_)));
  if (record_ != nullptr && !record_->used()) RemoveRecord();
  sync_->DetachLink();
  EndReturn();
  connection_ = {};
  connected_ = false;
  if (retiring_.joinable()) retiring_.join();
  Publish();
  ReleaseMemory();
}

// A guest that has left, or ended, gives its memory back to the host when nobody maps its file any
// more; a session that is over may be looked at for days.
void SourceSession::ReleaseMemory() {
  sync_.reset();
  log_.reset();
  memory_.reset();
}

// The target forgets the guest.
void SourceSession::CloseSession() {
  Body close;
  close.mutable_close_session();
  connection_.channel->Send(close, MonotonicNow() + absl::Seconds(1)).IgnoreError();
}

absl::Status SourceSession::TickConnected() {
  const bool coming = guest_->managed() != nullptr && guest_->managed()->expected();
  sync_->set_urgent(waiting_launches_ > 0 || coming);
  // Without a link the guest is watched all the same: what was synced stays known.
  if (absl::Status s = sync_->Tick(); !s.ok()) return s;
  if (!connected_) return absl::OkStatus();
  if (sync_->busy()) {
    if (absl::Status s = connection_.link->Wait(MonotonicNow() + kBusyStep); !s.ok()) return s;
  }
  if (state_ == SessionState::kFirstPass && sync_->progress().first_pass_done) {
    state_ = SessionState::kSyncing;
    ReserveRecord().IgnoreError();  // a launch tries again, and says so
    Publish();
  }
  if (absl::Status s = PollControl(); !s.ok()) return s;
  if (absl::Status s = Compare(); !s.ok()) return s;
  if (coming) {
    if (absl::Status s = TickManaged(); !s.ok()) return s;
  }
  TryRdmaAgain();
  return absl::OkStatus();
}

absl::Status SourceSession::PollControl() {
  const absl::Time now = MonotonicNow();
  // What a manager is about to do can't wait for the next ping.
  const bool in_haste = comparisons_.awaits_reply() || guest_->managed() != nullptr;
  if (now < next_ping_) return in_haste ? TakeMessages() : absl::OkStatus();
  next_ping_ = now + kPingEvery;
  Body ping;
  ping.mutable_ping()->set_sequence(static_cast<uint64_t>(absl::ToUnixMicros(now)));
  if (absl::Status s = connection_.channel->Send(ping, now + absl::Seconds(5)); !s.ok()) return s;
  return TakeMessages();
}

// What has come, without waiting.
absl::Status SourceSession::TakeMessages() {
  while (true) {
    absl::StatusOr<Body> message = connection_.channel->Receive(MonotonicNow());
    if (absl::IsDeadlineExceeded(message.status())) return absl::OkStatus();
    if (!message.ok()) return message.status();
    if (message->body_case() == Body::kRefused) {
      return RefusedStatus(message->refused(), dialer_->peer());
    }
    if (message->body_case() == Body::kLaunchComing) {
      if (absl::Status s = OnLaunchComing(); !s.ok()) return s;
    }
    if (message->body_case() == Body::kLaunchOff) OnLaunchOff(message->launch_off().reason());
    if (return_ != nullptr && LinkOf(*message) == return_->number()) return_->OnMessage(*message);
    if (message->body_case() == Body::kHashReply) {
      if (absl::Status s = comparisons_.OnReply(message->hash_reply()); !s.ok()) return s;
    }
    if (!IsAside(*message)) {
      return absl::InvalidArgumentError(
          absl::StrCat(dialer_->peer(), " sent message ", message->body_case(), " unasked"));
    }
  }
}

SessionRequest SourceSession::Request() const {
  return {.session = id_,
          .guest = options_.guest,
          .domain = options_.domain,
          .tcp_streams = options_.tcp_streams,
          .tcp = options_.tcp,
          .socket = options_.socket,
          .transport = options_.transport,
          .tcp_reason = options_.tcp_reason,
          .rdma = options_.rdma,
          .make_link = options_.make_link};
}

absl::Status SourceSession::Connect() {
  SessionRequest request = Request();
  request.on_content = [this](SourceSync::TargetContent content) { sync_->NoteContent(content); };
  request.shape = outlook_.shape;
  request.give_up = [this] { return StopRequested(); };
  // What failed a moment ago is not tried again with every reconnection.
  const bool spare = request.transport == Transport::kAuto && MonotonicNow() < next_rdma_;
  if (spare) request.transport = Transport::kTcp;
  absl::StatusOr<SourceConnection> connection = ConnectSource(
      dialer_.get(), memory_.get(), request, MonotonicNow() + options_.connect_timeout);
  if (!connection.ok()) return connection.status();
  connection_ = *std::move(connection);
  if (spare && !rdma_problem_.empty()) {
    connection_.why = absl::StrCat("TCP, for RDMA failed: ", rdma_problem_);
  }
  sync_->AttachLink(connection_.link.get(), connection_.content);
  resumption_.OnAttached(connection_.content, attached_before_, *sync_, 0, MonotonicNow());
  resumption_.Look(*sync_, 0);
  attached_before_ = true;
  connected_ = true;
  shape_told_ = true;
  NoteFit();
  problem_.clear();
  state_ = SessionState::kFirstPass;  // the next Tick says if that is already over
  if (connection_.link->name() == "rdma") {
    rdma_since_ = MonotonicNow();
  } else if (!spare) {
    rdma_problem_ = connection_.rdma_problem;
    PostponeRdma();
  }
  options_.log(false, absl::StrCat(options_.guest, ": ", std::string(connection_.link->name()),
                                   " link to ", dialer_->peer(), ": ", connection_.why));
  return absl::OkStatus();
}

void SourceSession::LoseLink(const absl::Status& why) {
  // It takes its memory along, and so the dirty log: what that says helps nobody.
  if (GuestIsGone()) return EndWithGuest();
  if (absl::Status s = memory_->Check(); !s.ok()) return EndWithMemory(s);
  problem_ = std::string(why.message());
  if (guest_->managed() != nullptr) guest_->managed()->Forget();
  if (!connected_) {  // then it was the dirty log, without which there is nothing to go on
    Settle(SessionState::kFailed, why);
    return;
  }
  const bool rdma_failed = RdmaFailed();
  if (rdma_failed) NoteRdmaFailure(why);
  // Before messages are waited for, which would pass its answer over.
  comparisons_.Drop(absl::AbortedError(absl::StrCat("the link was lost: ", why.message())));
  if (rdma_failed && FallBack(why)) return;
  sync_->DetachLink();
  EndReturn();
  Retire(std::move(connection_.link));
  connection_ = {};
  connected_ = false;
  ++reconnects_;
  state_ = SessionState::kConnecting;
  next_connect_ = MonotonicNow() + options_.reconnect_every;
  Publish();
}

void SourceSession::Publish() {
  const bool proven = resumption_.status().from == ResumedFrom::kCopy;  // or will be
  const uint64_t hash_bytes = proven ? comparisons_.status().proof.hash_bytes : 0;
  if (connected_) resumption_.Look(*sync_, hash_bytes);
  SessionStatus status = {.state = state_,
                          .guest = options_.guest,
                          .guest_address = options_.guest_address,
                          .session = IdToHex(id_),
                          .peer = dialer_->peer(),
                          .link = connected_ ? std::string(connection_.link->name()) : "",
                          .link_devices = connection_.devices,
                          .link_reason = connection_.why,
                          .dirty_log = std::string(log_->name()),
                          .problem = Problem(),
                          .launchable = outlook_.launchable.ok() && differences_.empty(),
                          .warnings = Warnings(),
                          .uptime = MonotonicNow() - started_,
                          .promise = sync_->options().max_launch_time,
                          .fixed_cost = sync_->options().fixed_cost,
                          .reconnects = reconnects_,
                          .progress = sync_->progress(),
                          .comparisons = comparisons_.status(),
                          .resumption = resumption_.status()};
  next_publish_ = MonotonicNow() + kPublishEvery;
  MutexLock lock(&mutex_);
  published_ = std::move(status);
}

SourceSession::LaunchOrder* SourceSession::WaitForOrder(absl::Duration longest) {
  MutexLock lock(&mutex_);
  const auto ordered = [this] {
    mutex_.AssertHeld();
    return (order_ != nullptr && !order_->done) || stop_;
  };
  mutex_.AwaitWithTimeout(ordered, longest);
  return order_;
}

void SourceSession::Answer(LaunchOrder* order, absl::StatusOr<HandoverReport> result) {
  Publish();
  MutexLock lock(&mutex_);
  order->result = std::move(result);
  order->done = true;
  if (order_ == order) order_ = nullptr;  // a manager's own launch is nobody's order
}

// How long an idle session sleeps: a manager stops its guest some milliseconds after it has begun.
absl::Duration SourceSession::IdleStep() const {
  ManagedLaunch* managed = guest_->managed();
  const bool coming = managed != nullptr && (managed->expected() || manager_told_);
  return coming || comparisons_.hurried() ? kBusyStep : absl::Milliseconds(5);
}

}  // namespace presync
