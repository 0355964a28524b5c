#include "transport/tls/tls_session.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "transport/clock.h"

namespace presync {
namespace {

absl::Status AwaitReady(int fd, short events, absl::Time deadline) {
  while (true) {
    const absl::Duration left = deadline - MonotonicNow();
    if (left <= absl::ZeroDuration()) {
      return absl::DeadlineExceededError("the TLS handshake was not done in time");
    }
    const int64_t ms = absl::ToInt64Milliseconds(
        absl::Ceil(std::min(left, absl::Hours(1)), absl::Milliseconds(1)));
    pollfd p = {.fd = fd, .events = events, .revents = 0};
    const int ready = ::poll(&p, 1, static_cast<int>(ms));
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return absl::ErrnoToStatus(errno, "poll");
  }
}

absl::Status MakeNonBlocking(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags >= 0 && ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0) return absl::OkStatus();
  return absl::ErrnoToStatus(errno, "make a socket non-blocking");
}

// The certificate must be for whom was dialled: a name, or an address without its zone.
bool SetExpectedHost(SSL* ssl, const std::string& host) {
  X509_VERIFY_PARAM* param = SSL_get0_param(ssl);
  const std::string address = host.substr(0, host.find('%'));
  unsigned char raw[sizeof(in6_addr)];
  if (::inet_pton(AF_INET, address.c_str(), raw) == 1 ||
      ::inet_pton(AF_INET6, address.c_str(), raw) == 1) {
    return X509_VERIFY_PARAM_set1_ip_asc(param, address.c_str()) == 1;
  }
  SSL_set_tlsext_host_name(ssl, host.c_str());
  X509_VERIFY_PARAM_set_hostflags(
      param, X509_CHECK_FLAG_NO_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT);
  return X509_VERIFY_PARAM_set1_host(param, host.c_str(), host.size()) == 1;
}

// Of the alerts that a peer may send: those which are about our certificate.
bool IsAboutOurCertificate(int reason) {
  switch (reason) {
    case SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED:
    case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
    case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
    case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
    case SSL_R_TLSV1_ALERT_ACCESS_DENIED:
      return true;
    default:
      return false;
  }
}

}  // namespace

void TlsSession::Free::operator()(SSL* ssl) const { SSL_free(ssl); }

TlsSession::~TlsSession() = default;

absl::StatusOr<std::unique_ptr<TlsSession>> TlsSession::Connect(int socket,
                                                                const TlsIdentity& identity,
                                                                const std::string& host,
                                                                absl::Time deadline) {
  return Shake(socket, identity, &host, deadline);
}

absl::StatusOr<std::unique_ptr<TlsSession>> TlsSession::Accept(int socket,
                                                               const TlsIdentity& identity,
                                                               absl::Time deadline) {
  return Shake(socket, identity, nullptr, deadline);
}

absl::StatusOr<std::unique_ptr<TlsSession>> TlsSession::Shake(int socket,
                                                              const TlsIdentity& identity,
                                                              const std::string* host,
                                                              absl::Time deadline) {
  if (absl::Status s = MakeNonBlocking(socket); !s.ok()) return s;
  std::unique_ptr<TlsSession> session(new TlsSession());
  session->context_ = identity.context();
  MutexLock lock(&session->mutex_);  // nobody else has it yet
  session->ssl_.reset(SSL_new(session->context_.get()));
  SSL* const ssl = session->ssl_.get();
  if (ssl == nullptr || SSL_set_fd(ssl, socket) != 1 ||
      (host != nullptr && !SetExpectedHost(ssl, *host))) {
    return absl::InternalError("TLS: " + TakeTlsErrors());
  }
  while (true) {
    ERR_clear_error();
    errno = 0;
    const int result = host != nullptr ? SSL_connect(ssl) : SSL_accept(ssl);
    if (result == 1) break;
    short events = 0;
    if (absl::Status s = session->Judge(result, errno, &events); !s.ok()) return s;
    if (absl::Status s = AwaitReady(socket, events, deadline); !s.ok()) return s;
  }
  const X509* certificate = SSL_get0_peer_certificate(ssl);
  if (certificate != nullptr) session->peer_name_ = CertificateName(*certificate);
  if (session->peer_name_.empty()) {
    return absl::UnauthenticatedError(
        absl::StrCat("its certificate names no host: ", kNeedsDnsName));
  }
  return session;
}

absl::Status TlsSession::Judge(int result, int error, short* events) {
  const int kind = SSL_get_error(ssl_.get(), result);
  if (kind == SSL_ERROR_WANT_READ || kind == SSL_ERROR_WANT_WRITE) {
    *events = kind == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT;
    return absl::OkStatus();
  }
  const int reason = ERR_GET_REASON(ERR_peek_error());
  const long verified = SSL_get_verify_result(ssl_.get());  // NOLINT: OpenSSL's type
  const std::string words = TakeTlsErrors();
  if (reason == SSL_R_CERTIFICATE_VERIFY_FAILED && verified != X509_V_OK) {
    return absl::UnauthenticatedError(
        absl::StrCat("its certificate is not believed: ", X509_verify_cert_error_string(verified),
                     verified == X509_V_ERR_HOSTNAME_MISMATCH
                         ? "; what was dialled must be one of its DNS names (subjectAltName)"
                         : ""));
  }
  if (reason == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE) {
    return absl::UnauthenticatedError("it shows no certificate");
  }
  if (IsAboutOurCertificate(reason)) {
    return absl::UnauthenticatedError(
        absl::StrCat("it does not believe this host's certificate: ", words));
  }
  if (kind == SSL_ERROR_ZERO_RETURN || reason == SSL_R_UNEXPECTED_EOF_WHILE_READING ||
      (kind == SSL_ERROR_SYSCALL && error == 0)) {
    return absl::UnavailableError("the peer closed the connection");
  }
  if (kind == SSL_ERROR_SYSCALL) return absl::UnavailableError(std::strerror(error));
  return absl::UnavailableError(absl::StrCat("TLS: ", words.empty() ? "failed" : words));
}

std::string TlsSession::Describe() const {
  MutexLock lock(&mutex_);
  const char* cipher = SSL_get_cipher_name(ssl_.get());
  const bool kernel = BIO_get_ktls_send(SSL_get_wbio(ssl_.get())) != 0;
  return absl::StrCat(cipher, kernel ? ", by the kernel" : "");
}

absl::StatusOr<size_t> TlsSession::TrySend(absl::Span<const char> bytes, short* events) {
  MutexLock lock(&mutex_);
  ERR_clear_error();
  errno = 0;
  size_t sent = 0;
  const int result = SSL_write_ex(ssl_.get(), bytes.data(), bytes.size(), &sent);
  if (result == 1) return sent;
  if (absl::Status s = Judge(result, errno, events); !s.ok()) return s;
  return 0;
}

absl::StatusOr<size_t> TlsSession::TryReceive(absl::Span<char> bytes, short* events) {
  MutexLock lock(&mutex_);
  ERR_clear_error();
  errno = 0;
  size_t received = 0;
  const int result = SSL_read_ex(ssl_.get(), bytes.data(), bytes.size(), &received);
  if (result == 1) return received;
  if (absl::Status s = Judge(result, errno, events); !s.ok()) return s;
  return 0;
}

}  // namespace presync
