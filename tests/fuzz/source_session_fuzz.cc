// A source whose target says what it likes: connecting, a link, a whole handover, and the question
// what became of the guest. Required: the guest is held to be moved only on the target's word after
// it was given up; wherever the source says that the guest is here, it runs here; and the record on
// disk says the same.
//
// An input: flags (1: no honest Hello; 2: version 1; 4: pages go to an honest link; 8: compare all
// memory; 16: the link falls back to TCP before the handover; 32: only ask what became of it),
// then the script (control_peer.h).
#include <signal.h>

#include <fstream>
#include <iterator>
#include <mutex>
#include <thread>

#include "tests/fuzz/control_peer.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/transport/sync/model_guest.h"
#include "transport/clock.h"
#include "transport/sync/source_connection.h"
#include "transport/sync/source_handover.h"
#include "transport/tcp/tcp_target_link.h"
#include "transport/wire/version.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;

const std::vector<PageCount> kRegions = {40, 24};

struct Memories {
  ModelMemory source{kRegions};
  ModelMemory target{kRegions};
};
Memories& TheMemories() {
  static auto* const memories = [] {
    auto* made = new Memories();
    for (PageIndex page = 0; page < 64; page += 3) made->source.Write(page, page + 1);
    return made;
  }();
  return *memories;
}

// The target. Control connections after the first get the same script.
class FuzzTarget final : public Dialer {
 public:
  FuzzTarget(fuzz::ControlScript script, bool honest_link)
      : script_(std::move(script)), honest_link_(honest_link) {}
  ~FuzzTarget() override {
    Link();
    for (std::thread& peer : peers_) peer.join();
  }

  absl::StatusOr<Connection> Dial(const Preamble& preamble, absl::Time) override {
    fuzz::SocketPair pair = fuzz::MakeSocketPair();
    if (preamble.kind == Preamble::Kind::kControl) {
      peers_.emplace_back([this, peer = std::move(pair.peer)]() mutable {
        fuzz::PlayControl(std::move(peer), script_.steps,
                          [this](const Body& message) { ran_ = ran_ || message.has_run(); });
      });
      return Connection(std::move(pair.product));
    }
    if (!honest_link_) {
      if (used_ < script_.streams.size()) {
        fuzz::SendAtOnce(pair.peer.get(), script_.streams[used_++]);
      }
      // Nothing is read there: what does not fit waits.
    }
    sockets_.push_back(std::move(pair.peer));
    return Connection(std::move(pair.product));
  }
  const std::string& peer() const override { return name_; }

  // The pages' other end, once there are all connections of a link.
  void Link() {
    link_.reset();
    if (honest_link_ && !sockets_.empty()) {
      auto link = TcpTargetLink::Create(&TheMemories().target.memory(), std::move(sockets_), {});
      if (link.ok()) link_ = *std::move(link);
    }
    sockets_.clear();  // or hangs up
  }
  bool told_to_run() const { return ran_; }

 private:
  const std::string name_ = "the target";
  const fuzz::ControlScript script_;
  const bool honest_link_;
  size_t used_ = 0;
  std::atomic<bool> ran_ = false;
  std::vector<UniqueFd> sockets_;
  std::unique_ptr<TcpTargetLink> link_;
  std::vector<std::thread> peers_;
};

SessionRequest Request() {
  SessionRequest request;
  request.session = {1, 2, 3};
  request.guest = "g1";
  request.tcp_streams = 2;
  request.transport = Transport::kTcp;
  return request;
}

HandoverPhase PhaseOnDisk(const HandoverRecord& record) {
  std::ifstream in(record.path(), std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const absl::StatusOr<HandoverEntry> entry = HandoverRecord::Parse(bytes);
  FUZZ_REQUIRE(entry.ok());
  return entry->phase;
}

void HandOver(FuzzTarget* target, SourceConnection* connection, bool verify) {
  ModelMemory& memory = TheMemories().source;
  World world;
  ModelSourceGuest guest(&world, &memory, "", -1);
  const std::unique_ptr<DirtyLog> log = memory.MakeLog();
  auto sync = SourceSync::Create(&memory.memory(), log.get(), {}).value();
  sync->AttachLink(connection->link.get(), connection->content);
  HandoverEntry entry;
  entry.guest = "g1";
  entry.session = {1, 2, 3};
  HandoverRecord record = HandoverRecord::Open(fuzz::ScratchFolder(), entry).value();
  HandoverOptions options;
  options.verify = verify;
  options.rounds_timeout = absl::Milliseconds(500);
  options.switchover_timeout = absl::Milliseconds(200);
  const HandoverEnd end = RunSourceHandover(connection->channel.get(), sync.get(), &guest,
                                            memory.memory(), &record, options, MonotonicNow());
  const HandoverPhase phase = PhaseOnDisk(record);
  switch (end.result) {
    case HandoverResult::kMoved:
    case HandoverResult::kInDoubt:
      FUZZ_REQUIRE(!world.source_running() && phase == HandoverPhase::kGivenUp);
      FUZZ_REQUIRE(end.why.ok() == (end.result == HandoverResult::kMoved));
      break;
    case HandoverResult::kHere:
      FUZZ_REQUIRE(world.source_running() && !end.why.ok());
      FUZZ_REQUIRE(phase == HandoverPhase::kPreparing || phase == HandoverPhase::kTakenBack);
      FUZZ_REQUIRE(!target->told_to_run() || phase == HandoverPhase::kTakenBack);
      break;
    case HandoverResult::kStuck:
      FUZZ_REQUIRE(false);  // this guest can always be resumed
  }
  FUZZ_REQUIRE(end.report.pages_differing <= 64);
  sync->DetachLink();
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace presync;  // NOLINT
  ::signal(SIGPIPE, SIG_IGN);
  fuzz::FuzzInput input(data, size);
  const uint8_t flags = input.Byte();
  fuzz::ControlScript script = fuzz::TakeScript(&input);
  if ((flags & 1) == 0) {
    Body hello;
    hello.mutable_hello()->set_newest_version((flags & 2) != 0 ? 1 : kNewestProtocolVersion);
    hello.mutable_hello()->set_oldest_version(1);
    script.steps.insert(script.steps.begin(), {fuzz::FrameOf(hello.SerializeAsString()), false});
  }
  FuzzTarget target(std::move(script), (flags & 4) != 0);
  const SessionRequest request = Request();
  const GuestMemory* const memory = &TheMemories().source.memory();
  const absl::Time deadline = MonotonicNow() + absl::Milliseconds(500);
  if ((flags & 32) != 0) {
    AskOutcome(&target, request.session, request.guest, /*end_it=*/false, deadline).IgnoreError();
    return 0;
  }
  absl::StatusOr<SourceConnection> connection = ConnectSource(&target, memory, request, deadline);
  if (!connection.ok()) return 0;
  target.Link();
  std::unique_ptr<SourceLink> failed;
  if ((flags & 16) != 0) {
    if (!FallToTcp(&target, memory, request, &*connection, &failed, deadline).ok()) return 0;
    target.Link();
  }
  HandOver(&target, &*connection, (flags & 8) != 0);
  fuzz::EmptyScratchFolder();
  return 0;
}
