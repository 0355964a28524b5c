// What libvirt and its QEMUs say: a domain's XML, qemu.conf, and where a saved device state ends.
// The first byte says which.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>

#include "qemu-glue/libvirt/domain_xml.h"
#include "qemu-glue/libvirt/libvirt_target_host.h"
#include "qemu-glue/libvirt/saved_stream.h"
#include "tests/fuzz/fuzz_input.h"

namespace presync {
namespace {

constexpr char kPlugin[] = "/usr/lib/qemu/presync_glue.so";

// What is added is all that was missing, and is not added twice.
void TryXml(const std::string& xml) {
  const DomainSockets sockets = SocketsOf("/run/presync/libvirt", "a");
  const absl::StatusOr<DomainNames> names = NamesIn(xml);
  if (names.ok()) {
    FUZZ_REQUIRE(!names->name.empty() && !names->uuid.empty());
    FUZZ_REQUIRE(CheckDomain(xml, sockets).ok());
  }
  const absl::StatusOr<std::string> added = AddPresync(xml, sockets, kPlugin);
  if (!added.ok()) return;
  const absl::StatusOr<std::vector<Problem>> left = CheckDomain(*added, sockets);
  if (!left.ok()) return;  // pugixml reads more than XML, and may write what it does not read
  FUZZ_REQUIRE(left->empty());
  const absl::StatusOr<std::string> twice = AddPresync(*added, sockets, kPlugin);
  FUZZ_REQUIRE(twice.ok() && CheckDomain(*twice, sockets).ok());
}

// However a stream is cut, it is as whole at its end.
void TryStream(fuzz::FuzzInput* input) {
  const size_t piece = 1 + input->Byte();
  const std::string_view stream = input->rest();
  StreamEnd whole, pieces;
  bool over = pieces.Take("");
  for (size_t at = 0; at < stream.size(); at += piece) over = pieces.Take(stream.substr(at, piece));
  FUZZ_REQUIRE(whole.Take(stream) == over);
}

void TryConf(std::string_view text) {
  const std::string path = fuzz::ScratchFolder() + "/qemu.conf";
  std::ofstream(path, std::ios::binary) << text;
  const std::string folder = ReadMemoryBackingDir(path);
  FUZZ_REQUIRE(folder.find('\n') == std::string::npos);
  ::remove(path.c_str());
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  presync::fuzz::FuzzInput input(data, size);
  switch (input.Byte() % 3) {
    case 0:
      presync::TryXml(std::string(input.rest()));
      break;
    case 1:
      presync::TryStream(&input);
      break;
    default:
      presync::TryConf(input.rest());
  }
  return 0;
}
