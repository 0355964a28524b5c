#include "transport/tls/tls_identity.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <ctime>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "transport/unique_fd.h"

namespace presync {
namespace {

// What arrived is decrypted from a buffer of this size: a system call for each 16 records.
constexpr size_t kReadBufferBytes = 256 << 10;

bool IsPlain(const std::string& name) {
  return !name.empty() && name.size() <= 253 &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '.' || c == '-' || c == '_';
         });
}

std::string TextOf(const ASN1_STRING* text) {
  return {reinterpret_cast<const char*>(ASN1_STRING_get0_data(text)),
          static_cast<size_t>(ASN1_STRING_length(text))};
}

std::string FirstDnsName(const X509& certificate) {
  auto* names = static_cast<GENERAL_NAMES*>(
      X509_get_ext_d2i(&certificate, NID_subject_alt_name, nullptr, nullptr));
  std::string found;
  for (int i = 0; i < sk_GENERAL_NAME_num(names) && found.empty(); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names, i);
    if (name->type == GEN_DNS) found = TextOf(name->d.dNSName);
  }
  GENERAL_NAMES_free(names);
  return found;
}

absl::Status CheckFile(const std::string& path, const char* what, bool secret) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) {
    return absl::ErrnoToStatus(errno, absl::StrCat("open ", what, " ", path));
  }
  struct stat file = {};
  if (::fstat(fd.get(), &file) != 0 || !S_ISREG(file.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(what, " ", path, ": not a regular file"));
  }
  if (secret && (file.st_mode & (S_IRWXO | S_IWGRP)) != 0) {
    return absl::PermissionDeniedError(
        absl::StrCat(what, " ", path, ": others may read or change it; chmod 600 ", path));
  }
  return absl::OkStatus();
}

absl::Status Bad(const std::string& path, const std::string& what) {
  const std::string words = TakeTlsErrors();
  return absl::InvalidArgumentError(
      absl::StrCat(path, ": ", what, words.empty() ? "" : ": ", words));
}

absl::Time ExpiryOf(const X509& certificate) {
  std::tm when = {};
  if (ASN1_TIME_to_tm(X509_get0_notAfter(&certificate), &when) != 1) return absl::InfinitePast();
  return absl::FromTimeT(::timegm(&when));
}

void SetRules(SSL_CTX* context) {
  SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  // No session is ever taken up again, so nothing recorded can be played back.
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_num_tickets(context, 0);
  SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_ENABLE_KTLS | SSL_OP_NO_COMPRESSION);
  // A write hands over one record at a time, so that the lock on the connection is short, and what
  // waits may be given again from elsewhere.
  SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  SSL_CTX_set_read_ahead(context, 1);
  SSL_CTX_set_default_read_buffer_len(context, kReadBufferBytes);
}

// Says now what every peer would say later.
absl::Status CheckOwnCertificate(SSL_CTX* context, const TlsFiles& files) {
  X509* own = SSL_CTX_get0_certificate(context);
  if (CertificateName(*own).empty()) {
    return Bad(files.certificate, absl::StrCat("names no host: ", kNeedsDnsName));
  }
  X509_STORE_CTX* check = X509_STORE_CTX_new();
  STACK_OF(X509)* chain = nullptr;
  SSL_CTX_get0_chain_certs(context, &chain);
  const bool ready = X509_STORE_CTX_init(check, SSL_CTX_get_cert_store(context), own, chain) == 1;
  const bool good = ready && X509_verify_cert(check) == 1;
  const std::string why = X509_verify_cert_error_string(X509_STORE_CTX_get_error(check));
  X509_STORE_CTX_free(check);
  ERR_clear_error();
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(files.certificate, ": no peer would believe it by ", files.ca, ": ", why));
}

void IgnoreBrokenPipes() {
  struct sigaction old = {};
  if (::sigaction(SIGPIPE, nullptr, &old) == 0 && old.sa_handler == SIG_DFL) {
    ::signal(SIGPIPE, SIG_IGN);
  }
}

}  // namespace

std::string TakeTlsErrors() {
  std::string words;
  while (const unsigned long code = ERR_get_error()) {  // NOLINT: OpenSSL's type
    const char* reason = ERR_reason_error_string(code);
    if (reason != nullptr) words = words.empty() ? reason : absl::StrCat(words, ", ", reason);
  }
  return words;
}

std::string CertificateName(const X509& certificate) {
  const std::string name = FirstDnsName(certificate);
  return IsPlain(name) ? name : "";
}

absl::StatusOr<TlsIdentity::Loaded> TlsIdentity::Read(const TlsFiles& files) {
  for (const auto& [path, what, secret] :
       {std::tuple(files.certificate, "certificate", false), std::tuple(files.key, "key", true),
        std::tuple(files.ca, "ca", false)}) {
    if (absl::Status s = CheckFile(path, what, secret); !s.ok()) return s;
  }
  ERR_clear_error();
  std::shared_ptr<SSL_CTX> context(SSL_CTX_new(TLS_method()), SSL_CTX_free);
  if (context == nullptr) return absl::InternalError("OpenSSL: " + TakeTlsErrors());
  SetRules(context.get());
  if (SSL_CTX_use_certificate_chain_file(context.get(), files.certificate.c_str()) != 1) {
    return Bad(files.certificate, "holds no certificate (PEM)");
  }
  if (SSL_CTX_use_PrivateKey_file(context.get(), files.key.c_str(), SSL_FILETYPE_PEM) != 1) {
    return Bad(files.key, "no key (PEM, without a password) of " + files.certificate);
  }
  if (SSL_CTX_load_verify_locations(context.get(), files.ca.c_str(), nullptr) != 1) {
    return Bad(files.ca, "holds no certificate (PEM)");
  }
  if (absl::Status s = CheckOwnCertificate(context.get(), files); !s.ok()) return s;
  const X509& own = *SSL_CTX_get0_certificate(context.get());
  return Loaded{context, CertificateName(own), ExpiryOf(own)};
}

absl::StatusOr<std::unique_ptr<TlsIdentity>> TlsIdentity::Load(const TlsFiles& files) {
  absl::StatusOr<Loaded> loaded = Read(files);
  if (!loaded.ok()) return loaded.status();
  IgnoreBrokenPipes();
  return std::unique_ptr<TlsIdentity>(new TlsIdentity(files, *std::move(loaded)));
}

absl::Status TlsIdentity::Reload() {
  absl::StatusOr<Loaded> loaded = Read(files_);
  if (!loaded.ok()) return loaded.status();
  MutexLock lock(&mutex_);
  loaded_ = *std::move(loaded);
  return absl::OkStatus();
}

std::string TlsIdentity::name() const {
  MutexLock lock(&mutex_);
  return loaded_.name;
}

absl::Time TlsIdentity::expires() const {
  MutexLock lock(&mutex_);
  return loaded_.expires;
}

std::shared_ptr<SSL_CTX> TlsIdentity::context() const {
  MutexLock lock(&mutex_);
  return loaded_.context;
}

}  // namespace presync
