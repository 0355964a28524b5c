#include "transport/memory_faults.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>

#include "absl/status/status.h"

namespace presync {
namespace {

// Read by the signal's handler, which may take no lock. A slot's bounds are written before it is
// used and after nobody uses it any more.
struct Slot {
  std::atomic<bool> taken = false;
  std::atomic<uintptr_t> begin = 0;
  std::atomic<uintptr_t> end = 0;
  std::atomic<bool> damaged = false;
};

Slot slots[FaultGuard::kMostGuards];
std::atomic<int> slots_used = 0;  // no slot from here on was ever taken
struct sigaction previous;

Slot* SlotOf(uintptr_t address) {
  const int used = slots_used.load(std::memory_order_acquire);
  for (int i = 0; i < used; ++i) {
    if (address >= slots[i].begin && address < slots[i].end) return &slots[i];
  }
  return nullptr;
}

// Only async-signal-safe calls; mmap is a plain system call on Linux.
void OnBusError(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  // Sent by somebody (kill), it says nothing about memory.
  Slot* const slot =
      info->si_code > 0 ? SlotOf(reinterpret_cast<uintptr_t>(info->si_addr)) : nullptr;
  if (slot != nullptr) {
    slot->damaged = true;
    void* const zeros = ::mmap(reinterpret_cast<void*>(slot->begin.load()), slot->end - slot->begin,
                               PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    errno = saved_errno;
    if (zeros != MAP_FAILED) return;
  }
  if ((previous.sa_flags & SA_SIGINFO) != 0 && previous.sa_sigaction != nullptr) {
    previous.sa_sigaction(signal, info, context);
    return;
  }
  // The access is made again, and ends the process as it always did.
  ::sigaction(SIGBUS, &previous, nullptr);
  if (info->si_code <= 0) ::raise(SIGBUS);
}

void TakeSignal() {
  struct sigaction action = {};
  action.sa_sigaction = OnBusError;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(SIGBUS, &action, &previous);
}

}  // namespace

absl::StatusOr<FaultGuard> FaultGuard::Guard(std::byte* address, size_t bytes) {
  static std::once_flag once;
  std::call_once(once, TakeSignal);
  for (size_t i = 0; i < kMostGuards; ++i) {
    bool taken = false;
    if (!slots[i].taken.compare_exchange_strong(taken, true)) continue;
    slots[i].damaged = false;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    slots[i].end = begin + bytes;
    slots[i].begin = begin;
    int used = slots_used;
    const int needed = static_cast<int>(i) + 1;
    while (used < needed && !slots_used.compare_exchange_weak(used, needed)) {
    }
    return FaultGuard(static_cast<int>(i));
  }
  return absl::ResourceExhaustedError("guest memory: too many regions are mapped by this process");
}

FaultGuard::FaultGuard(FaultGuard&& other) noexcept : slot_(std::exchange(other.slot_, -1)) {}

FaultGuard& FaultGuard::operator=(FaultGuard&& other) noexcept {
  std::swap(slot_, other.slot_);
  return *this;
}

FaultGuard::~FaultGuard() {
  if (slot_ < 0) return;
  Slot& slot = slots[slot_];
  slot.begin = UINTPTR_MAX;  // holds no address, whatever the end still says
  slot.end = 0;
  slot.taken = false;
}

bool FaultGuard::damaged() const { return slot_ >= 0 && slots[slot_].damaged; }

void NoteUnreadable(const void* address) {
  Slot* const slot = SlotOf(reinterpret_cast<uintptr_t>(address));
  if (slot != nullptr) slot->damaged = true;
}

}  // namespace presync
