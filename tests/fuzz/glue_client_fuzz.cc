// presyncd's end of the plug-in's socket, against a QEMU that answers what it likes. Required: no
// descriptor of what it sent stays open, and a dirty bitmap that could shrink under presyncd's feet
// is not mapped.
//
// An input: which calls are made (1 byte), then an answer each: how (1 byte, below), and its bytes.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "qemu-glue/dirty_log/glue_client.h"
#include "qemu-glue/dirty_log/uffd_handler_log.h"
#include "tests/fuzz/fuzz_input.h"
#include "transport/clock.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

constexpr uint64_t kStart = 0x7f0000000000;
constexpr PageCount kPages = PRESYNC_GLUE_SCRATCH_PAGES;

struct Answer {
  std::string bytes;
  uint8_t how;
};

// How: 1 the bytes as they are; else an honest answer to the request of its turn, into which they
// are laid at an offset that is their first byte. 2 and 4: so many descriptors. 8: those are
// bitmaps, 16: that are sealed, 32: with an honest header.
std::vector<Answer> TakeAnswers(fuzz::FuzzInput* input) {
  std::vector<Answer> answers;
  while (!input->empty() && answers.size() < 16) {
    const uint8_t how = input->Byte();
    answers.push_back({std::string(input->Take(input->Byte() % 80)), how});
  }
  return answers;
}

// Where there is none to be had, what is behind it is not reached.
UniqueFd MakeUserfaultfd() {
  constexpr int kUserModeOnly = 1;
  UniqueFd fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | kUserModeOnly)));
  return fd.valid() ? std::move(fd) : UniqueFd(::open("/dev/null", O_RDWR | O_CLOEXEC));
}

UniqueFd MakeBitmap(uint8_t how) {
  if ((how & 8) == 0) return UniqueFd(::open("/dev/null", O_RDWR | O_CLOEXEC));
  UniqueFd file(::memfd_create("presync-fuzz-bitmap", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  FUZZ_REQUIRE(::ftruncate(file.get(), 2 * PRESYNC_GLUE_BITMAP_OFFSET) == 0);
  presync_glue_bitmap header = {};
  if ((how & 32) != 0) header.bytes = PagesToBytes(kPages);
  FUZZ_REQUIRE(::pwrite(file.get(), &header, sizeof(header), 0) == sizeof(header));
  if ((how & 16) != 0) ::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
  return file;
}

std::string BytesOf(const Answer& answer, uint16_t type, uint32_t fds) {
  if ((answer.how & 1) != 0) return answer.bytes;
  presync_glue_reply reply = {};
  reply.magic = PRESYNC_GLUE_MAGIC;
  reply.version = PRESYNC_GLUE_VERSION;
  reply.type = type;
  reply.length = sizeof(reply);
  reply.start = kStart;
  reply.bytes = PagesToBytes(kPages);
  reply.fds = fds;
  std::string bytes(reinterpret_cast<const char*>(&reply), sizeof(reply));
  if (answer.bytes.size() > 1) {
    const size_t at = static_cast<uint8_t>(answer.bytes[0]) % bytes.size();
    const size_t count = std::min(answer.bytes.size() - 1, bytes.size() - at);
    bytes.replace(at, count, answer.bytes, 1, count);
  }
  return bytes;
}

void SendAnswer(int socket, const Answer& answer, uint16_t type) {
  const uint32_t count = (answer.how >> 1) % 4;
  const std::string bytes = BytesOf(answer, type, count);
  std::vector<UniqueFd> owned;
  int fds[3];
  for (uint32_t i = 0; i < count; ++i) {
    owned.push_back(i == 0 ? MakeUserfaultfd() : MakeBitmap(answer.how));
    fds[i] = owned.back().get();
  }
  iovec data = {const_cast<char*>(bytes.data()), bytes.size()};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(fds))] = {};
  if (count > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(count * sizeof(int));
    std::memcpy(CMSG_DATA(c), fds, count * sizeof(int));
  }
  (void)!::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

UniqueFd Listen(const std::string& path) {
  UniqueFd listener(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, path.size());
  FUZZ_REQUIRE(::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
  FUZZ_REQUIRE(::listen(listener.get(), 4) == 0);
  return listener;
}

// One connection: a HELLO, then an answer to each request, then it hangs up.
void ServeOne(int listener, const std::vector<Answer>& answers) {
  const UniqueFd socket(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  uint16_t type = PRESYNC_GLUE_HELLO;
  for (const Answer& answer : answers) {
    SendAnswer(socket.get(), answer, type);
    presync_glue_request request = {};
    if (::recv(socket.get(), &request, sizeof(request), 0) <= 0) return;
    type = request.type;
  }
}

void TryRange(const absl::StatusOr<GlueRange>& range, GlueMode mode) {
  if (!range.ok() || mode != GlueMode::kHandler) return;
  const absl::StatusOr<SharedBitmap> bitmap = SharedBitmap::Map(range->bitmap.get(), kPages);
  if (!bitmap.ok()) return;
  FUZZ_REQUIRE(::ftruncate(range->bitmap.get(), 0) != 0);
  FUZZ_REQUIRE(bitmap->words() == 1);
  (void)bitmap->health();
  (void)bitmap->AwaitBatch(MonotonicNow());
}

void Ask(const std::string& path, uint8_t which) {
  const absl::Time deadline = MonotonicNow() + absl::Seconds(2);
  absl::StatusOr<GlueClient> client =
      GlueClient::Connect(path, IdentifyProcess(::getpid()), deadline);
  if (!client.ok()) return;
  const GlueMode mode = which % 2 == 0 ? GlueMode::kAsync : GlueMode::kHandler;
  if ((which & 2) != 0) TryRange(client->MakeScratch(mode, deadline), mode);
  if ((which & 4) != 0) (void)client->WriteScratch(kStart, deadline);
  if ((which & 8) != 0) TryRange(client->Track(kStart, PagesToBytes(kPages), mode, deadline), mode);
  if ((which & 16) != 0) (void)client->Untrack(kStart, PagesToBytes(kPages), deadline);
  if ((which & 32) != 0) (void)client->DropScratch(deadline);
  if ((which & 64) != 0) (void)client->Ping(deadline);
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace presync;  // NOLINT
  static const std::string path = fuzz::ScratchFolder() + "/glue";
  static const auto* const listener = new UniqueFd(Listen(path));
  const size_t before = fuzz::OpenDescriptors();
  fuzz::FuzzInput input(data, size);
  const uint8_t which = input.Byte();
  const std::vector<Answer> answers = TakeAnswers(&input);
  std::thread qemu([&] { ServeOne(listener->get(), answers); });
  Ask(path, which);
  qemu.join();
  FUZZ_REQUIRE(fuzz::OpenDescriptors() == before);
  return 0;
}
