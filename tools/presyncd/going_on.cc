#include "tools/presyncd/going_on.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tools/common/local_api.h"

namespace presync {

void GoingOn::End() {
  {
    MutexLock lock(&mutex_);
    ending_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void GoingOn::Begin(std::vector<SyncNote> notes) {
  {
    MutexLock lock(&mutex_);
    for (const SyncNote& note : notes) {
      waiting_[note.guest] = {.note = note, .problem = "being started again after a restart"};
    }
  }
  for (SyncNote& note : notes) {
    threads_.emplace_back([this, note = std::move(note)] { Run(note); });
  }
}

void GoingOn::Run(const SyncNote& note) {
  absl::Duration wait = options_.first_wait;
  while (Wants(note.guest)) {
    if (Take(note.guest, options_.start(note))) return;
    MutexLock lock(&mutex_);
    const auto told = [&] {
      mutex_.AssertHeld();
      return !WantsLocked(note.guest);
    };
    if (mutex_.AwaitWithTimeout(told, wait)) return;
    wait = std::min(2 * wait, options_.longest_wait);
  }
}

bool GoingOn::Take(const std::string& guest, const Try& tried) {
  bool news = false;
  {
    MutexLock lock(&mutex_);
    const auto it = waiting_.find(guest);
    if (it == waiting_.end()) return true;
    if (tried.status.ok()) {
      waiting_.erase(it);
      return true;
    }
    const std::string problem(tried.status.message());
    news = tried.for_good || problem != it->second.problem;
    it->second.problem = problem;
    it->second.over = tried.for_good;
  }
  if (news) {
    options_.log(true, absl::StrCat(guest, ": its sync ", tried.for_good ? "ended: " : "waits: ",
                                    tried.status.message()));
  }
  return tried.for_good;
}

bool GoingOn::WantsLocked(const std::string& guest) const {
  const auto it = waiting_.find(guest);
  return !ending_ && it != waiting_.end() && !it->second.over;
}

bool GoingOn::Wants(const std::string& guest) const {
  MutexLock lock(&mutex_);
  return WantsLocked(guest);
}

bool GoingOn::Forget(const std::string& guest) {
  MutexLock lock(&mutex_);
  return waiting_.erase(guest) > 0;
}

std::vector<SessionStatus> GoingOn::status() const {
  std::vector<SessionStatus> all;
  MutexLock lock(&mutex_);
  for (const auto& [guest, waiting] : waiting_) {
    SessionStatus status;
    status.state = waiting.over ? SessionState::kFailed : SessionState::kConnecting;
    status.guest = guest;
    status.guest_address = TextOr(waiting.note.order, "qmp", "");
    status.peer = TextOr(waiting.note.order, "to", "");
    status.problem = waiting.problem;
    all.push_back(std::move(status));
  }
  return all;
}

}  // namespace presync
