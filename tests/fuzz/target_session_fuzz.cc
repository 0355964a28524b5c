// A whole target, with its service, sessions, links and records, fed by a source that says what it
// likes; its guest may fail at any step. Required at the end of every conversation: the guest was
// run only after it was loaded; one that may run was kept, and is never reported as never having
// run; nothing is left of a session that was forgotten.
//
// An input: which calls of the guest fail (2 bytes, a bit each), flags (1: no honest beginning;
// 2: version 1; 4: the same once more), then the script (control_peer.h).
#include <fcntl.h>
#include <signal.h>

#include <atomic>
#include <thread>

#include "tests/fuzz/control_peer.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/transport/scratch_memory.h"
#include "transport/sync/handover_record.h"
#include "transport/sync/target_service.h"
#include "transport/sync/target_session.h"
#include "transport/tcp/socket.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

constexpr PageCount kFirstPages = 520;
constexpr PageCount kSecondPages = 24;

// What became of the guests of one input, and which of their calls fail.
struct Fate {
  uint16_t fails = 0;
  bool may_run = false;
  bool kept = false;
  bool Fails(int call) const { return (fails >> call & 1) != 0; }
};

class FuzzGuest final : public TargetGuest {
 public:
  explicit FuzzGuest(Fate* fate) : fate_(fate) {}

  absl::StatusOr<UniqueFd> BeginLoad(absl::Time) override {
    if (fate_->Fails(0)) return absl::UnavailableError("begin-load fails");
    return UniqueFd(::open("/dev/null", O_WRONLY | O_CLOEXEC));
  }
  absl::Status AwaitLoaded(absl::Time) override {
    loaded_ = !fate_->Fails(1);
    return loaded_ ? absl::OkStatus() : absl::DataLossError("await-loaded fails");
  }
  absl::Status Run(absl::Time) override {
    FUZZ_REQUIRE(loaded_ && !gone_);
    if (fate_->Fails(2)) return absl::FailedPreconditionError("run is refused");
    fate_->may_run = true;
    return fate_->Fails(3) ? absl::UnavailableError("run is not answered") : absl::OkStatus();
  }
  absl::Status Discard(absl::Time) override {
    if (fate_->Fails(4)) return absl::UnavailableError("discard fails");
    gone_ = true;
    return absl::OkStatus();
  }
  absl::StatusOr<RunState> State(absl::Time) override { return RunState::kPaused; }

 private:
  Fate* const fate_;
  bool loaded_ = false;
  bool gone_ = false;
};

class FuzzHost final : public TargetHost {
 public:
  absl::StatusOr<std::unique_ptr<TargetPlace>> MakePlace(
      const std::string& guest, const std::vector<RegionRequest>& regions) override {
    if (guest != "g1" || fate_->Fails(5) || fate_->may_run)
      return absl::NotFoundError("no such guest");
    FUZZ_REQUIRE(!regions.empty());
    for (const RegionRequest& region : regions) {
      FUZZ_REQUIRE(region.size_bytes > 0 && region.size_bytes % kPageBytes == 0);
      FUZZ_REQUIRE(region.name.find('/') == std::string::npos && !region.name.empty());
    }
    ++places_;
    return std::make_unique<Place>(this);
  }
  absl::Status EndOrphan(const HandoverEntry&) override {
    return fate_->Fails(8) ? absl::UnavailableError("not certain") : absl::OkStatus();
  }

  void Begin(Fate* fate) { fate_ = fate; }
  int places() const { return places_; }

 private:
  class Place final : public TargetPlace {
   public:
    explicit Place(FuzzHost* host) : host_(host), fate_(host->fate_) {}
    ~Place() override {
      FUZZ_REQUIRE(!fate_->may_run || fate_->kept);  // or a running guest was ended
      --host_->places_;
    }
    const GuestMemory& memory() const override { return host_->memory_->memory(); }
    bool memory_was_zero() const override { return !fate_->Fails(6); }
    absl::StatusOr<TargetGuest*> Waiting(absl::Time) override {
      if (fate_->Fails(7)) return absl::UnavailableError("it does not start");
      if (guest_ == nullptr) guest_ = std::make_unique<FuzzGuest>(fate_);
      return guest_.get();
    }
    absl::Status Check() override { return absl::OkStatus(); }
    absl::Status EndWaiting() override {
      FUZZ_REQUIRE(!fate_->may_run);
      if (fate_->Fails(9)) return absl::UnavailableError("it may live");
      guest_.reset();
      return absl::OkStatus();
    }
    void Keep() override { fate_->kept = true; }
    std::string address() const override { return "fuzz"; }
    std::string process() const override { return "fuzz"; }

   private:
    FuzzHost* const host_;
    Fate* const fate_;
    std::unique_ptr<FuzzGuest> guest_;
  };

  const std::unique_ptr<ScratchMemory> memory_ =
      ScratchMemory::Create({kFirstPages, kSecondPages}).value();
  Fate* fate_ = nullptr;
  std::atomic<int> places_ = 0;
};

struct Target {
  FuzzHost host;
  std::unique_ptr<TargetService> service;

  Target() {
    ::signal(SIGPIPE, SIG_IGN);
    TargetServiceOptions options;
    options.record_folder = fuzz::ScratchFolder();
    options.rdma.enabled = false;
    // Inputs follow each other faster than what is over is swept.
    options.max_connections = options.newcomers.all = options.newcomers.a_place = 1 << 20;
    service = TargetService::Start(Listen("127.0.0.1", 0).value(), &host, options);
  }
};

// The source's honest words.
Body Hello(uint32_t newest) {
  Body hello;
  hello.mutable_hello()->set_newest_version(newest);
  hello.mutable_hello()->set_oldest_version(1);
  return hello;
}

// One conversation, in this thread. Opens the data connections that the target offers.
void Converse(Target* target, const fuzz::ControlScript& script) {
  fuzz::SocketPair pair = fuzz::MakeSocketPair();
  std::vector<UniqueFd> ends;
  size_t used = 0;
  const auto open_streams = [&](const std::string& token, uint32_t streams) {
    const absl::StatusOr<SessionId> id = IdFromBytes(token);
    for (uint32_t i = 0; id.ok() && i < streams; ++i) {
      fuzz::SocketPair data = fuzz::MakeSocketPair();
      const auto preamble =
          EncodePreamble({.kind = Preamble::Kind::kData, .stream = i, .token = *id});
      fuzz::SendAtOnce(data.peer.get(),
                       {reinterpret_cast<const char*>(preamble.data()), preamble.size()});
      if (used < script.streams.size()) {
        fuzz::SendAtOnce(data.peer.get(), script.streams[used++]);
      }
      target->service->Adopt(std::move(data.product), "fuzz data");
      ends.push_back(std::move(data.peer));
    }
  };
  std::thread peer([&] {
    fuzz::PlayControl(std::move(pair.peer), script.steps, [&](const Body& message) {
      if (message.has_link_offer()) {
        open_streams(message.link_offer().token(), message.link_offer().tcp_streams());
      } else if (message.has_session_opened()) {
        open_streams(message.session_opened().token(), message.session_opened().tcp_streams());
      }
    });
  });
  {
    ControlChannel channel(std::move(pair.product), "fuzz");
    RunTargetConversation(target->service.get(), &channel);
  }
  peer.join();
}

// A session that replaces whatever is left, and is forgotten.
void Forget(Target* target) {
  Body open;
  open.mutable_open_session()->set_session_id(std::string(16, '\xfe'));
  open.mutable_open_session()->set_guest("g1");
  open.mutable_open_session()->set_page_bytes(kPageBytes);
  for (const auto& [name, pages] : {std::pair("ram0", kFirstPages), {"ram1", kSecondPages}}) {
    wire::RegionSpec* region = open.mutable_open_session()->add_regions();
    region->set_name(name);
    region->set_size_bytes(PagesToBytes(pages));
  }
  Body close;
  close.mutable_close_session();
  fuzz::ControlScript script;
  for (const Body& message : {Hello(kNewestProtocolVersion), open, close}) {
    script.steps.push_back({fuzz::FrameOf(message.SerializeAsString()), false});
  }
  Converse(target, script);
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace presync;  // NOLINT
  static auto* const target = new Target();
  fuzz::FuzzInput input(data, size);
  Fate fate = {.fails = input.U16()};
  const uint8_t flags = input.Byte();
  fuzz::ControlScript script = fuzz::TakeScript(&input);
  if ((flags & 1) == 0) {
    const Body hello = Hello((flags & 2) != 0 ? 1 : kNewestProtocolVersion);
    script.steps.insert(script.steps.begin(), {fuzz::FrameOf(hello.SerializeAsString()), false});
  }
  target->host.Begin(&fate);
  Converse(target, script);
  if ((flags & 4) != 0) Converse(target, script);  // it comes back

  std::vector<std::string> unreadable;
  const auto records = HandoverRecord::ReadAll(fuzz::ScratchFolder(), &unreadable);
  FUZZ_REQUIRE(unreadable.empty());
  for (const HandoverEntry& record : records) {
    const wire::Outcome outcome =
        target->service->Outcome(record.session, record.guest, "", /*end_it=*/false);
    if (fate.may_run) FUZZ_REQUIRE(outcome.value() != wire::Outcome::NEVER_RAN);
  }
  FUZZ_REQUIRE(!fate.may_run || (fate.kept && !records.empty()));

  fate.fails = 0;  // a guest that could not be ended can be now
  Fate end;
  end.kept = fate.kept;
  target->host.Begin(&end);
  Forget(target);
  FUZZ_REQUIRE(target->service->status().empty() && target->host.places() == 0);
  fuzz::EmptyScratchFolder();
  return 0;
}
