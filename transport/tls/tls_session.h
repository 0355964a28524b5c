// One TLS connection over a socket that it does not own. See connection.h for what uses it.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "transport/mutex.h"
#include "transport/tls/tls_identity.h"

namespace presync {

// Any thread may use it; one thread at a time sends, one at a time receives.
class TlsSession {
 public:
  // Shake hands over `socket`, a connected one that is made non-blocking and must stay open while
  // the session lives. The first dials: the other side's certificate must be for `host`, the name
  // or address as it was dialled. UNAUTHENTICATED: the other side has no certificate that is
  // believed here (or, Accept, none at all), with the reason; or says so of ours. UNAVAILABLE: it
  // does not speak TLS, or is gone. DEADLINE_EXCEEDED.
  //
  // A dialling side learns only by its first receive that its certificate is not believed.
  static absl::StatusOr<std::unique_ptr<TlsSession>> Connect(int socket,
                                                             const TlsIdentity& identity,
                                                             const std::string& host,
                                                             absl::Time deadline);
  static absl::StatusOr<std::unique_ptr<TlsSession>> Accept(int socket, const TlsIdentity& identity,
                                                            absl::Time deadline);
  ~TlsSession();
  TlsSession(const TlsSession&) = delete;
  TlsSession& operator=(const TlsSession&) = delete;

  // The other side's name: CertificateName. Never empty.
  const std::string& peer_name() const { return peer_name_; }
  // "TLS_AES_256_GCM_SHA384", and whether the kernel encrypts.
  std::string Describe() const ABSL_LOCKS_EXCLUDED(mutex_);

  // How many bytes were taken or received; 0: not now, wait until the socket is ready for `events`
  // (of poll(2)). `bytes` must not be empty; what TrySend did not take must be given again, first.
  // Codes as above.
  absl::StatusOr<size_t> TrySend(absl::Span<const char> bytes, short* events)
      ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<size_t> TryReceive(absl::Span<char> bytes, short* events)
      ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Free {
    void operator()(SSL* ssl) const;
  };
  TlsSession() = default;
  static absl::StatusOr<std::unique_ptr<TlsSession>> Shake(int socket, const TlsIdentity& identity,
                                                           const std::string* host,
                                                           absl::Time deadline);
  // Ok: try again when the socket is ready for `*events`.
  absl::Status Judge(int result, int error, short* events) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // OpenSSL's object is one thread's at a time; each call under the lock moves one record at most.
  mutable Mutex mutex_;
  std::shared_ptr<SSL_CTX> context_;
  std::unique_ptr<SSL, Free> ssl_ ABSL_PT_GUARDED_BY(mutex_);
  std::string peer_name_;
};

}  // namespace presync
