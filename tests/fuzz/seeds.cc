// Writes the seeds that are not text: `fuzz_seeds FOLDER` makes FOLDER/TARGET/NAME, for a format
// that has changed. An honest conversation is the best of beginnings.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

#include "predictor/trace.h"
#include "qemu-glue/plugin/glue_protocol.h"
#include "tests/fuzz/control_peer.h"
#include "tests/fuzz/fuzz_input.h"
#include "tools/common/trace_file.h"
#include "transport/rdma/message.h"
#include "transport/tcp/codec.h"
#include "transport/tcp/frame.h"
#include "transport/wire/preamble.h"

namespace presync {
namespace {

using Body = wire::ControlMessage;
using fuzz::FuzzOutput;
using fuzz::PutMessage;
using fuzz::PutStream;

std::string folder;

std::string PathOf(const std::string& target, const std::string& name) {
  std::filesystem::create_directories(folder + "/" + target);
  return folder + "/" + target + "/" + name;
}

void Write(const std::string& target, const std::string& name, const std::string& bytes) {
  std::ofstream(PathOf(target, name), std::ios::binary) << bytes;
}

template <typename T>
std::string_view BytesOf(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}
template <typename T, size_t n>
std::string_view BytesOf(const std::array<T, n>& value) {
  return {reinterpret_cast<const char*>(value.data()), value.size()};
}

std::string Header(FrameType type, PageRun run, uint32_t payload, uint64_t commit) {
  std::string header(kFrameHeaderBytes, '\0');
  EncodeFrame({.type = type, .run = run, .payload_bytes = payload, .commit = commit},
              reinterpret_cast<std::byte*>(header.data()));
  return header;
}

std::string CompressedFrame(FrameType type, PageRun run) {
  const std::vector<std::byte> page(PagesToBytes(run.count), std::byte{7});
  std::vector<std::byte> packed(page.size());
  Compressor compressor;
  const size_t size = compressor.Compress(type == FrameType::kLz4 ? Codec::kLz4 : Codec::kZstd,
                                          page, absl::MakeSpan(packed));
  return Header(type, run, static_cast<uint32_t>(size), 0) +
         std::string(reinterpret_cast<const char*>(packed.data()), size);
}

// Frames of each kind, as the only stream carries them.
std::string HonestStream() {
  return Header(FrameType::kBytes, {1, 1}, kPageBytes, 0) + std::string(kPageBytes, 'x') +
         Header(FrameType::kZero, {510, 2}, 0, 0) + CompressedFrame(FrameType::kLz4, {3, 2}) +
         CompressedFrame(FrameType::kZstd, {520, 3}) + Header(FrameType::kCommit, {}, 0, 1) +
         Header(FrameType::kCommit, {}, 0, 2);
}

void WireSeeds() {
  const auto put = [](uint8_t which, const char* name, std::string_view bytes) {
    Write("wire", name, FuzzOutput().Byte(which).Raw(bytes).text());
  };
  put(0, "preamble-control", BytesOf(EncodePreamble({})));
  put(0, "preamble-data", BytesOf(EncodePreamble({.kind = Preamble::Kind::kData, .stream = 3})));
  put(1, "frame-bytes", Header(FrameType::kBytes, {1, 1}, kPageBytes, 0));
  put(1, "frame-commit", Header(FrameType::kCommit, {}, 0, 9));
  RdmaMessage message = {.type = MessageType::kZero, .runs = 2, .number = 1};
  message.run[0] = {1, 2};
  message.run[1] = {9, 1};
  std::string bytes(kMaxMessageBytes, '\0');
  bytes.resize(EncodeMessage(message, reinterpret_cast<std::byte*>(bytes.data())));
  put(2, "rdma-zero", bytes);
  put(3, "rdma-connect", BytesOf(EncodeConnectData({.index = 1, .total = 4})));
  Body offer;
  offer.mutable_link_offer()->set_token(std::string(16, 't'));
  offer.mutable_link_offer()->set_queue_pairs(4);
  wire::RdmaEndpoint* endpoint = offer.mutable_link_offer()->add_endpoints();
  endpoint->set_address("10.0.0.1");
  endpoint->set_port(7350);
  endpoint->add_windows()->set_size_bytes(kPageBytes);
  put(4, "rdma-offer", offer.link_offer().SerializeAsString());
  Body refused;
  refused.mutable_refused()->set_code(9);
  refused.mutable_refused()->set_text("no\x1b[31m");
  put(5, "refused", refused.refused().SerializeAsString());
  put(6, "id", "000102030405060708090a0b0c0d0e0f");
}

void TcpSeeds() {
  Write("tcp_link", "target", FuzzOutput().Byte(0).Number(4000, 2).Raw(HonestStream()).text());
  Write("tcp_link", "target-bytewise",
        FuzzOutput().Byte(0).Number(0, 2).Raw(HonestStream()).text());
  FuzzOutput two;
  two.Byte(2).Number(100, 2);
  two.Chunk(Header(FrameType::kZero, {0, 512}, 0, 0) + Header(FrameType::kCommit, {}, 0, 1));
  two.Raw(Header(FrameType::kZero, {512, 8}, 0, 0) + Header(FrameType::kCommit, {}, 0, 1));
  Write("tcp_link", "target-two-streams", two.text());
  FuzzOutput source;
  source.Byte(1).Byte(4).Number(100, 2);
  for (uint64_t commit = 1; commit <= 4; ++commit) {
    source.Raw(Header(FrameType::kAck, {}, 0, commit));
  }
  Write("tcp_link", "source", source.text());
}

Body OpenSession() {
  Body open;
  open.mutable_open_session()->set_session_id("0123456789abcdef");
  open.mutable_open_session()->set_guest("g1");
  open.mutable_open_session()->set_page_bytes(kPageBytes);
  open.mutable_open_session()->set_tcp_streams(1);
  for (const auto& [name, pages] : {std::pair("ram0", 520), {"ram1", 24}}) {
    wire::RegionSpec* region = open.mutable_open_session()->add_regions();
    region->set_name(name);
    region->set_size_bytes(PagesToBytes(pages));
  }
  return open;
}

template <typename Set>
Body Message(Set set) {
  Body body;
  set(&body);
  return body;
}

Body OpenTcp() {
  return Message([](Body* b) {
    b->mutable_open_link()->set_link(1);
    b->mutable_open_link()->set_kind(wire::OpenLink::TCP);
    b->mutable_open_link()->set_tcp_streams(1);
  });
}

void PutHandover(bool verify, FuzzOutput* out) {
  PutMessage(Message([](Body* b) { b->mutable_begin_handover(); }), true, out);
  if (verify) {
    PutMessage(Message([](Body* b) {
                 b->mutable_hash_request()->set_pages(544);
                 b->mutable_hash_request()->set_pages_per_hash(64);
                 b->mutable_hash_request()->add_only(1);
                 b->mutable_hash_request()->add_only(8);
                 b->mutable_hash_request()->set_id(7);
               }),
               true, out);
  }
  PutMessage(Message([](Body* b) { b->mutable_state_chunk()->set_data("live state"); }), true, out);
  PutMessage(Message([](Body* b) {
               b->mutable_state_chunk()->set_data("staged");
               b->mutable_state_chunk()->set_staged(true);
             }),
             false, out);
  PutMessage(Message([](Body* b) { b->mutable_load()->set_state_bytes(16); }), false, out);
  PutMessage(Message([](Body* b) { b->mutable_run(); }), true, out);
}

void TargetSeeds() {
  const Body ping = Message([](Body* b) { b->mutable_ping()->set_sequence(1); });
  const Body close = Message([](Body* b) { b->mutable_close_session(); });
  const auto begin = [](uint16_t fails, uint8_t flags) {
    FuzzOutput out;
    out.Number(fails, 2).Byte(flags);
    return out;
  };
  FuzzOutput sync = begin(0, 4);
  PutStream(HonestStream(), &sync);
  PutMessage(OpenSession(), false, &sync);
  PutMessage(OpenTcp(), true, &sync);
  PutMessage(ping, true, &sync);
  PutMessage(Message([](Body* b) { b->mutable_close_link()->set_link(1); }), true, &sync);
  PutMessage(close, true, &sync);
  Write("target_session", "sync", sync.text());

  Body shaped = OpenSession();
  for (const auto& [key, value] : {std::pair("machine", "q35"), {"pci pcie.0/02.0", "VGA"}}) {
    wire::Trait* trait = shaped.mutable_open_session()->add_shape();
    trait->set_key(key);
    trait->set_value(value);
  }
  FuzzOutput shape = begin(0, 0);
  PutMessage(shaped, false, &shape);
  PutMessage(close, true, &shape);
  Write("target_session", "shape", shape.text());
  shaped.mutable_open_session()->mutable_shape(0)->set_key(std::string(300, 'k'));
  FuzzOutput long_trait = begin(0, 0);
  PutMessage(shaped, false, &long_trait);
  Write("target_session", "shape-too-long", long_trait.text());

  for (const uint16_t fails : {0x00, 0x02, 0x04, 0x08, 0x14}) {  // none, load, run in three ways
    FuzzOutput move = begin(fails, 0);
    PutMessage(OpenSession(), false, &move);
    PutMessage(OpenTcp(), true, &move);
    PutHandover(fails == 0, &move);
    Write("target_session", "move-fails-" + std::to_string(fails), move.text());
  }
  FuzzOutput hash = begin(0, 0);  // a range of 16 TiB
  PutMessage(OpenSession(), false, &hash);
  PutMessage(Message([](Body* b) {
               b->mutable_hash_request()->set_pages(544);
               b->mutable_hash_request()->set_pages_per_hash(UINT32_MAX);
             }),
             true, &hash);
  Write("target_session", "hash-range-beyond-memory", hash.text());

  FuzzOutput old = begin(0, 2);
  PutStream(HonestStream(), &old);
  PutMessage(OpenSession(), false, &old);
  PutMessage(ping, true, &old);
  PutMessage(Message([](Body* b) { b->mutable_begin_handover(); }), true, &old);
  PutMessage(Message([](Body* b) { b->mutable_abort_handover()->set_reason("no"); }), true, &old);
  Write("target_session", "version-1", old.text());

  FuzzOutput ask = begin(0, 0);
  PutMessage(Message([](Body* b) {
               b->mutable_query_outcome()->set_session_id("0123456789abcdef");
               b->mutable_query_outcome()->set_guest("g1");
             }),
             false, &ask);
  Write("target_session", "query", ask.text());
  Write("target_session", "raw", begin(0, 1).Byte(3).Chunk("\x02\x00\x00\x00\x0a\x00").text());
}

void SourceSeeds() {
  const Body opened = Message([](Body* b) {
    b->mutable_session_opened()->set_content(wire::SessionOpened::ZERO);
    b->mutable_session_opened()->set_token(std::string(16, 't'));
    b->mutable_session_opened()->set_tcp_streams(1);
  });
  const Body offer = Message([](Body* b) {
    b->mutable_link_offer()->set_link(1);
    b->mutable_link_offer()->set_token(std::string(16, 't'));
    b->mutable_link_offer()->set_tcp_streams(1);
  });
  const Body up = Message([](Body* b) { b->mutable_link_ready()->set_link(1); });
  const Body ready = Message([](Body* b) { b->mutable_handover_ready(); });
  const Body loaded = Message([](Body* b) { b->mutable_loaded(); });
  const Body running = Message([](Body* b) { b->mutable_running(); });
  const Body never = Message([](Body* b) {
    b->mutable_outcome()->set_value(wire::Outcome::NEVER_RAN);
    b->mutable_outcome()->set_text("it refused");
  });
  const auto put = [](const char* name, uint8_t flags, const std::vector<Body>& messages) {
    FuzzOutput out;
    out.Byte(flags);
    for (size_t i = 0; i < messages.size(); ++i) PutMessage(messages[i], true, &out);
    Write("source_session", name, out.text());
  };
  // Pages go to an honest link: flag 4. After `ready` comes what the source asks for in order:
  // device state in two parts, the order to load, the order to run.
  put("move", 4, {opened, offer, up, ready, up, up, loaded, running});
  put("never-ran", 4, {opened, offer, up, ready, up, up, loaded, never});
  put("silent-at-run", 4, {opened, offer, up, ready, up, up, loaded});
  put("running-too-early", 4, {opened, offer, up, ready, loaded, running});
  Body unlike = opened;
  unlike.mutable_session_opened()->add_differences("machine: another");
  unlike.mutable_session_opened()->add_warnings("disk: another");
  put("unlike", 4, {unlike, offer, up, ready});
  put("no-link", 0, {opened, offer, up, ready});
  put("ask", 32, {never});
  put("version-1", 2 | 4, {opened, Message([](Body* b) { b->mutable_link_ready(); }), ready});
  Body hashes = Message([](Body* b) { b->mutable_hash_reply()->set_hashes(std::string(16, 'h')); });
  put("verify", 4 | 8, {opened, offer, up, ready, hashes, up, loaded, hashes, hashes});
  const Body closed = Message([](Body* b) { b->mutable_link_closed()->set_link(1); });
  Body second = offer;
  second.mutable_link_offer()->set_link(2);
  const Body second_up = Message([](Body* b) { b->mutable_link_ready()->set_link(2); });
  put("fall", 4 | 16,
      {opened, offer, up, closed, second, second_up, ready, up, up, loaded, running});
}

void GlueSeeds() {
  presync_glue_request request = {};
  const auto ask = [&request](uint16_t type, uint32_t mode, uint64_t start, uint64_t bytes) {
    request.type = type;
    request.mode = mode;
    request.start = start;
    request.bytes = bytes;
    return FuzzOutput().Byte(0).Raw(BytesOf(request)).Byte(0).text();
  };
  for (const uint32_t mode : {PRESYNC_GLUE_MODE_ASYNC, PRESYNC_GLUE_MODE_HANDLER}) {
    std::string all = ask(PRESYNC_GLUE_STATUS, 0, 0, 0);
    all += ask(PRESYNC_GLUE_SCRATCH, mode, 0, 0) + ask(PRESYNC_GLUE_SCRATCH_WRITE, 0, 2, 0);
    all += ask(PRESYNC_GLUE_SCRATCH_DROP, 0, 0, 0);
    all += ask(PRESYNC_GLUE_TRACK, mode, 0, 8) + ask(PRESYNC_GLUE_TRACK, mode, 0, 8);
    all += ask(PRESYNC_GLUE_TRACK, mode, 4, 8) + ask(PRESYNC_GLUE_TRACK, mode, 16, 4);
    all += ask(PRESYNC_GLUE_UNTRACK, 0, 0, 8) + ask(PRESYNC_GLUE_TRACK, mode, 2, 60);
    Write("glue_server", mode == PRESYNC_GLUE_MODE_ASYNC ? "async" : "handler", all);
  }
  Write("glue_server", "short", FuzzOutput().Byte(2).Raw(BytesOf(request)).Byte(9).Byte(3).text());
  const auto answers = [](uint8_t which, std::vector<uint8_t> how) {
    FuzzOutput out;
    out.Byte(which);
    for (const uint8_t each : how) out.Byte(each).Byte(0);
    return out.text();
  };
  Write("glue_client", "async", answers(0x7e, {0, 2, 0, 2, 0, 0, 0}));
  Write("glue_client", "handler", answers(0x7f, {0, 4 | 8 | 16 | 32, 0, 4 | 8 | 16 | 32, 0, 0, 0}));
  Write("glue_client", "bitmap-that-shrinks", answers(0x0b, {0, 4 | 8 | 32, 4 | 8 | 32}));
  Write("glue_client", "too-many-descriptors", answers(0x0a, {0, 6, 6}));
}

void TraceSeeds() {
  Trace trace({.pages = 1000});
  trace.AddScan(std::vector<PageRun>{{0, 3}, {3, 1}, {900, 100}});
  trace.AddScan({});
  for (const char* name : {"plain", "compressed.zst"}) {
    TraceFileWriter writer = TraceFileWriter::Create(PathOf("trace", name), trace.header()).value();
    for (size_t i = 0; i < trace.scans(); ++i) writer.AddScan(trace.Scan(i)).IgnoreError();
    writer.Close().IgnoreError();
  }
}

void RecordSeeds() {
  const std::string entry =
      R"({"role":"target","phase":"told-to-run","guest":"g1","peer":"p","detail":"/q",)"
      R"("session":"000102030405060708090a0b0c0d0e0f"})";
  Write("state_files", "record", FuzzOutput().Byte(1).Chunk(entry).Chunk("{}").Chunk(entry).text());
  Write("state_files", "unused", FuzzOutput().Byte(0).Raw(std::string(8192, '\0')).text());
  for (const uint8_t prove : {0, 1}) {
    FuzzOutput steps;
    steps.Byte(2 | prove).Byte(19);
    for (int i = 0; i < 12; ++i) {
      steps.Byte(0).Byte(3).Byte(static_cast<uint8_t>(7 * i)).Byte(static_cast<uint8_t>(i));
      steps.Byte(1).Byte(4);
    }
    Write("live_comparison", prove != 0 ? "prove" : "verify", steps.text());
    steps.Byte(0).Byte(5).Chunk(std::string(32, 'h')).Byte(2).Chunk("\x12\x02hh");
    Write("live_comparison", prove != 0 ? "prove-lies" : "verify-lies", steps.text());
  }
  Write("state_files", "copy",
        FuzzOutput()
            .Byte(3)
            .Raw(R"({"guest": "g", "session": "00112233445566778899aabbccddeeff", "peer": "a:1",)"
                 R"( "peer_name": "", "holder_pid": 4, "holder_start_ticks": 9, "files":)"
                 R"( [{"region": "ram0", "size_bytes": 4096, "path": "/r", "device": 1,)"
                 R"( "inode": 2}]})")
            .text());
  Write(
      "state_files", "sync",
      FuzzOutput()
          .Byte(5)
          .Raw(R"({"version": 1, "guest": "g", "qemu_pid": 4, "qemu_start_ticks": 9, "boot": "b",)"
               R"( "order": {"name": "g", "qmp": "/q", "to": "a:1", "max_launch_time": "1s",)"
               R"( "rdma_queue_pairs": 2}})")
          .text());
  Write("state_files", "costs", FuzzOutput().Byte(2).Raw(R"({"peer": [41000, 52000, -1]})").text());
}

}  // namespace
}  // namespace presync

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: fuzz_seeds FOLDER\n");
    return 2;
  }
  presync::folder = argv[1];
  presync::WireSeeds();
  presync::TcpSeeds();
  presync::TargetSeeds();
  presync::SourceSeeds();
  presync::GlueSeeds();
  presync::TraceSeeds();
  presync::RecordSeeds();
  return 0;
}
