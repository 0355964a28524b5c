#include "transport/tcp/tcp_link.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <cstring>
namespace presync {
namespace {
struct Head { uint32_t type, first, pages, pad; uint64_t id; };
bool SendAll(int fd, const void* p, size_t n, int flags) {
  const char* c = static_cast<const char*>(p);
  while (n) { ssize_t r = ::send(fd, c, n, MSG_NOSIGNAL | flags); if (r < 0 && errno == EINTR) continue; if (r <= 0) return false; c += r; n -= r; }
  return true;
}
bool RecvAll(int fd, void* p, size_t n) {
  char* c = static_cast<char*>(p);
  while (n) { ssize_t r = ::recv(fd, c, n, MSG_WAITALL); if (r < 0 && errno == EINTR) continue; if (r <= 0) return false; c += r; n -= r; }
  return true;
}
void Blocking(int fd) { ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) & ~O_NONBLOCK); int b = 256 << 10; ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &b, sizeof(b)); }
constexpr uint64_t kMaxQueue = 1 << 20;
}  // namespace
absl::StatusOr<std::unique_ptr<TcpSourceLink>> TcpSourceLink::Create(const GuestMemory* m, std::vector<UniqueFd> s, const TcpLinkOptions&) {
  auto l = std::make_unique<TcpSourceLink>();
  l->mem_ = m;
  for (auto& fd : s) { Blocking(fd.get()); auto st = std::make_unique<Stream>(); st->fd = std::move(fd); l->streams_.push_back(std::move(st)); }
  for (auto& st : l->streams_) { st->tx = std::thread([p = l.get(), q = st.get()] { p->Tx(q); }); st->rx = std::thread([p = l.get(), q = st.get()] { p->Rx(q); }); }
  return l;
}
TcpSourceLink::~TcpSourceLink() {
  { absl::MutexLock k(&mu_); ending_ = true; }
  for (auto& s : streams_) ::shutdown(s->fd.get(), SHUT_RDWR);
  for (auto& s : streams_) { s->tx.join(); s->rx.join(); }
}
absl::StatusOr<size_t> TcpSourceLink::Post(absl::Span<const PageWrite> w) {
  absl::MutexLock k(&mu_);
  if (broken_) return absl::UnavailableError("tcp: the link is gone");
  size_t n = 0;
  for (; n < w.size(); ++n) {
    Stream& s = *streams_[(w[n].run.first / 512) % streams_.size()];
    if (s.bytes > kMaxQueue) break;
    s.bytes += w[n].zero ? 0 : PagesToBytes(w[n].run.count);
    s.q.push_back({w[n], 0});
  }
  return n;
}
absl::StatusOr<CommitId> TcpSourceLink::PostCommit() {
  absl::MutexLock k(&mu_);
  if (broken_) return absl::UnavailableError("tcp: the link is gone");
  ++next_;
  for (auto& s : streams_) s->q.push_back({{}, next_});
  return next_;
}
void TcpSourceLink::Tx(Stream* s) {
  for (;;) {
    Item it;
    {
      absl::MutexLock k(&mu_);
      auto c = [&] { return !s->q.empty() || ending_ || broken_; };
      mu_.Await(absl::Condition(&c));
      if (ending_ || broken_) return;
      it = s->q.front();
      s->q.pop_front();
    }
    Head h = {it.commit ? 3u : it.write.zero ? 2u : 1u, it.write.run.first, it.write.run.count, 0, it.commit};
    bool ok = SendAll(s->fd.get(), &h, sizeof(h), h.type == 1 ? MSG_MORE : 0);
    if (ok && h.type == 1) { auto b = mem_->Bytes(it.write.run); ok = SendAll(s->fd.get(), b.data(), b.size(), 0); }
    absl::MutexLock k(&mu_);
    if (!ok) { broken_ = news_ = true; return; }
    wire_ += sizeof(h);
    if (it.commit) continue;
    if (it.write.zero) zero_ += PagesToBytes(it.write.run.count);
    else { uint64_t b = PagesToBytes(it.write.run.count); wire_ += b; payload_ += b; s->bytes -= b; }
    done_.push_back(it.write);
    news_ = true;
  }
}
void TcpSourceLink::Rx(Stream* s) {
  uint64_t id;
  while (RecvAll(s->fd.get(), &id, sizeof(id))) { absl::MutexLock k(&mu_); s->acked = id; news_ = true; }
  absl::MutexLock k(&mu_);
  broken_ = news_ = true;
}
absl::Status TcpSourceLink::Poll(LinkEvents* e) {
  absl::MutexLock k(&mu_);
  if (broken_) return absl::UnavailableError("tcp: the link is gone");
  news_ = false;
  e->completed.insert(e->completed.end(), done_.begin(), done_.end());
  done_.clear();
  CommitId c = UINT64_MAX;
  for (auto& s : streams_) c = std::min(c, s->acked);
  e->committed = c;
  return absl::OkStatus();
}
absl::Status TcpSourceLink::Wait(absl::Time d) { absl::MutexLock k(&mu_); mu_.AwaitWithDeadline(absl::Condition(&news_), d); return absl::OkStatus(); }
LinkStats TcpSourceLink::stats() const {
  absl::MutexLock k(&mu_);
  LinkStats s{.wire_bytes = wire_, .payload_bytes = payload_, .zero_bytes = zero_};
  for (auto& st : streams_) s.queued_bytes += st->bytes;
  return s;
}
absl::StatusOr<std::unique_ptr<TcpTargetLink>> TcpTargetLink::Create(const GuestMemory* m, std::vector<UniqueFd> s, const TcpLinkOptions&) {
  auto l = std::make_unique<TcpTargetLink>();
  l->mem_ = m;
  l->fds_ = std::move(s);
  for (auto& fd : l->fds_) { Blocking(fd.get()); l->threads_.emplace_back([p = l.get(), f = fd.get()] { p->Rx(f); }); }
  return l;
}
void TcpTargetLink::Rx(int fd) {
  Head h;
  while (RecvAll(fd, &h, sizeof(h))) {
    if (h.type == 3) { if (!SendAll(fd, &h.id, 8, 0)) break; continue; }
    PageRun r = {h.first, h.pages};
    if (!mem_->IsWithinOneRegion(r)) break;
    auto b = mem_->Bytes(r);
    if (h.type == 2) std::memset(b.data(), 0, b.size());
    else if (!RecvAll(fd, b.data(), b.size())) break;
  }
  absl::MutexLock k(&mu_);
  health_ = absl::UnavailableError("tcp: the source's data connection ended");
}
absl::Status TcpTargetLink::health() const { absl::MutexLock k(&mu_); return health_; }
void TcpTargetLink::Close() {
  for (auto& f : fds_) if (f.valid()) ::shutdown(f.get(), SHUT_RDWR);
  for (auto& t : threads_) t.join();
  threads_.clear();
}
}  // namespace presync
