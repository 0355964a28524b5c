// Who this host is to its peers, and whom it believes: a certificate, its key, and the authority
// that signed the certificates of all hosts. TLS 1.3 only, and both sides show a certificate.
#pragma once

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "transport/mutex.h"

typedef struct ssl_ctx_st SSL_CTX;  // OpenSSL's own names; nobody else needs its headers
typedef struct ssl_st SSL;
typedef struct x509_st X509;

namespace presync {

// Paths of PEM files.
struct TlsFiles {
  std::string certificate;  // this host's, then those between it and the authority, if any
  std::string key;          // of the certificate; nobody but its owner may read it
  std::string ca;           // the authority's certificate, or several
};

// The name that a certificate gives its host: its first DNS name (subjectAltName). Empty: it has
// none (a common name is no name of a host: anything may stand there), or one with other characters
// than letters, digits, '.', '-', '_', so also one with a wildcard.
std::string CertificateName(const X509& certificate);

// For texts about a certificate without such a name: what to do.
inline constexpr char kNeedsDnsName[] =
    "its first DNS name (subjectAltName) is its name, which has no wildcard, and a common name "
    "does "
    "not count; make it anew with one (tools/make-certs, or docs/security.md)";

// Thread-safe.
class TlsIdentity {
 public:
  // Reads the files. What is wrong with them is said with the file's name: NOT_FOUND: no such file.
  // PERMISSION_DENIED: can't be read, or others than its owner may read the key.
  // INVALID_ARGUMENT: no PEM, a key that is not the certificate's, a certificate that the authority
  // did not sign, that has run out, or that names no host.
  //
  // Has the process ignore SIGPIPE from now on, unless it handles it: OpenSSL writes to sockets
  // whose other end may be gone.
  static absl::StatusOr<std::unique_ptr<TlsIdentity>> Load(const TlsFiles& files);

  // Reads the files again, for connections made from now on. On an error the old ones stay. As
  // Load.
  absl::Status Reload() ABSL_LOCKS_EXCLUDED(mutex_);

  // This host's own name, as CertificateName.
  std::string name() const ABSL_LOCKS_EXCLUDED(mutex_);
  // When this host's certificate runs out.
  absl::Time expires() const ABSL_LOCKS_EXCLUDED(mutex_);

  // For tls_session.cc: what new connections are made of.
  std::shared_ptr<SSL_CTX> context() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Loaded {
    std::shared_ptr<SSL_CTX> context;
    std::string name;
    absl::Time expires;
  };
  TlsIdentity(TlsFiles files, Loaded loaded)
      : files_(std::move(files)), loaded_(std::move(loaded)) {}
  static absl::StatusOr<Loaded> Read(const TlsFiles& files);

  const TlsFiles files_;
  mutable Mutex mutex_;
  Loaded loaded_ ABSL_GUARDED_BY(mutex_);
};

// What OpenSSL says of the last failure in this thread, for people; empties its queue.
std::string TakeTlsErrors();

}  // namespace presync
