// The library inside QEMU, in this process, against a client that asks for what it likes. Required:
// every answer is whole; what nobody tracks any more is given back, to the last descriptor.
//
// An input: requests of 34 bytes: how (1 byte: 1 as it is, 2 cut short by the next byte, else the
// addresses made those of this process's shared memory), the request, and a byte of descriptors
// that go along.
#include <dirent.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "tests/fuzz/fuzz_input.h"
#include "transport/unique_fd.h"

extern "C" {
#include "qemu-glue/plugin/glue.h"
}

namespace presync {
namespace {

constexpr size_t kPages = 64;
constexpr size_t kBytes = kPages * PRESYNC_GLUE_PAGE_BYTES;

// "Guest RAM".
uint64_t Ram() {
  static void* const memory = [] {
    const UniqueFd file(::memfd_create("presync-fuzz-ram", MFD_CLOEXEC));
    FUZZ_REQUIRE(::ftruncate(file.get(), kBytes) == 0);
    void* made = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    FUZZ_REQUIRE(made != MAP_FAILED);
    return made;
  }();
  return reinterpret_cast<uint64_t>(memory);
}

UniqueFd Connect(const std::string& path) {
  UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, path.size());
  FUZZ_REQUIRE(::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) ==
               0);
  return socket;
}

// The next answer; its descriptors are closed. False: hung up.
bool TakeAnswer(int socket, presync_glue_reply* reply) {
  iovec data = {reply, sizeof(*reply)};
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))];
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t n;
  do {
    n = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  } while (n < 0 && errno == EINTR);  // libFuzzer's alarm
  if (n <= 0) return false;
  uint32_t fds = 0;
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
      ::close(fd);
      ++fds;
    }
  }
  FUZZ_REQUIRE(n == sizeof(*reply) && reply->magic == PRESYNC_GLUE_MAGIC);
  FUZZ_REQUIRE(reply->version == PRESYNC_GLUE_VERSION && reply->length == sizeof(*reply));
  FUZZ_REQUIRE(reply->fds == fds && (reply->error == 0) == (reply->step == 0));
  return true;
}

void Send(int socket, std::string_view bytes, uint32_t fds) {
  iovec data = {const_cast<char*>(bytes.data()), bytes.size()};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(3 * sizeof(int))] = {};
  if (fds > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds * sizeof(int));
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(fds * sizeof(int));
    const int any[3] = {0, 1, 2};
    std::memcpy(CMSG_DATA(c), any, fds * sizeof(int));
  }
  (void)!::sendmsg(socket, &message, MSG_NOSIGNAL);
}

presync_glue_request HonestRequest(uint16_t type, uint64_t start, uint64_t bytes) {
  presync_glue_request request = {};
  request.magic = PRESYNC_GLUE_MAGIC;
  request.version = PRESYNC_GLUE_VERSION;
  request.length = sizeof(request);
  request.type = type;
  request.start = start;
  request.bytes = bytes;
  return request;
}

std::string_view BytesOf(const presync_glue_request& request) {
  return {reinterpret_cast<const char*>(&request), sizeof(request)};
}

// What the input asks for next. Asks the trial memory's address where the input does.
std::string NextRequest(fuzz::FuzzInput* input, uint64_t scratch) {
  const uint8_t how = input->Byte();
  std::string bytes(input->Take(sizeof(presync_glue_request)));
  if (how == 1 || bytes.size() < sizeof(presync_glue_request)) return bytes;
  if (how == 2) return bytes.substr(0, input->Byte() % 40);
  presync_glue_request request;
  std::memcpy(&request, bytes.data(), sizeof(request));
  request = HonestRequest(request.type % 10, request.start, request.bytes);
  std::memcpy(&request.mode, bytes.data() + offsetof(presync_glue_request, mode), 1);
  request.mode %= 4;
  const bool trial = request.type == PRESYNC_GLUE_SCRATCH_WRITE;
  request.start = trial ? scratch + request.start % 12 * PRESYNC_GLUE_PAGE_BYTES
                        : Ram() + request.start % kPages * PRESYNC_GLUE_PAGE_BYTES;
  request.bytes = request.bytes % (kPages + 2) * PRESYNC_GLUE_PAGE_BYTES;
  return std::string(BytesOf(request));
}

void Converse(const std::string& path, fuzz::FuzzInput* input) {
  const UniqueFd socket = Connect(path);
  presync_glue_reply reply;
  FUZZ_REQUIRE(TakeAnswer(socket.get(), &reply) && reply.type == PRESYNC_GLUE_HELLO);
  uint64_t scratch = 0;
  for (int i = 0; i < 50 && !input->empty(); ++i) {
    const std::string request = NextRequest(input, scratch);
    Send(socket.get(), request, input->Byte() % 4);
    if (!TakeAnswer(socket.get(), &reply)) return;
    if (reply.type == PRESYNC_GLUE_SCRATCH && reply.error == 0) scratch = reply.start;
    // The guest goes on writing, whatever is tracked.
    std::memset(reinterpret_cast<void*>(Ram()), i, kBytes);
  }
}

// An honest client gives everything back: a range begins and ends at some page.
void UntrackAll(const std::string& path) {
  const UniqueFd socket = Connect(path);
  presync_glue_reply reply;
  FUZZ_REQUIRE(TakeAnswer(socket.get(), &reply));
  uint32_t left = reply.ranges;
  for (uint64_t first = 0; first < kPages && left > 0; ++first) {
    for (uint64_t pages = 1; pages <= kPages - first && left > 0; ++pages) {
      const auto request =
          HonestRequest(PRESYNC_GLUE_UNTRACK, Ram() + first * PRESYNC_GLUE_PAGE_BYTES,
                        pages * PRESYNC_GLUE_PAGE_BYTES);
      Send(socket.get(), BytesOf(request), 0);
      FUZZ_REQUIRE(TakeAnswer(socket.get(), &reply));
      if (reply.error == 0) --left;
    }
  }
  FUZZ_REQUIRE(left == 0);
}

// The server may be a moment behind a client that has gone.
bool DescriptorsAre(size_t count) {
  for (int i = 0; i < 2000; ++i) {
    if (fuzz::OpenDescriptors() == count) return true;
    ::usleep(1000);
  }
  return false;
}

}  // namespace
}  // namespace presync

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace presync;  // NOLINT
  static const std::string path = [] {
    const std::string made = fuzz::ScratchFolder() + "/glue";
    FUZZ_REQUIRE(presync_server_start(made.c_str(), false) == 0);
    Ram();
    return made;
  }();
  const size_t before = fuzz::OpenDescriptors();
  fuzz::FuzzInput input(data, size);
  Converse(path, &input);
  UntrackAll(path);
  FUZZ_REQUIRE(DescriptorsAre(before));
  return 0;
}
