#include "tests/transport/tls/certificates.h"

#include <stdio.h>
#include <stdlib.h>

#include <filesystem>

#include "absl/strings/str_cat.h"

namespace presync {
namespace {

[[noreturn]] void Die(const std::string& what) {
  fprintf(stderr, "test certificates: %s\n", what.c_str());
  abort();
}

void Shell(const std::string& command) {
  if (::system(absl::StrCat("{ ", command, "; } >/dev/null").c_str()) != 0) Die(command);
}

}  // namespace

const TestCertificates& TestCertificates::Shared() {
  static const TestCertificates certificates;
  return certificates;
}

TestCertificates::TestCertificates() {
  char name[] = "/tmp/presync-certificates-XXXXXX";
  if (::mkdtemp(name) == nullptr) Die("mkdtemp");
  folder_ = name;
  const std::string other = folder_ + "/other";
  Shell(absl::StrCat(PRESYNC_MAKE_CERTS, " --folder ", folder_,
                     " one,127.0.0.1,::1 two,127.0.0.1,::1 elsewhere,192.0.2.1"));
  Shell(absl::StrCat(PRESYNC_MAKE_CERTS, " --folder ", other, " stranger,127.0.0.1"));
  Shell(absl::StrCat("cd ", folder_, " && cp other/stranger.crt other/stranger.key ."));
  Shell(absl::StrCat("cd ", folder_, " && cp two.key expired.key",
                     " && openssl req -new -key expired.key -subj /CN=expired -out expired.csr",
                     " && echo subjectAltName=DNS:expired,IP:127.0.0.1 > expired.ext",
                     " && openssl x509 -req -in expired.csr -CA ca.crt -CAkey ca.key -days -1",
                     " -extfile expired.ext -out expired.crt 2>/dev/null"));
  Sign("unnamed", "");
  Sign("address", "IP:127.0.0.1");
  Sign("wild", "'DNS:*.example.org,IP:127.0.0.1'");
  Sign("several", "'DNS:several,DNS:*.example.org,IP:127.0.0.1'");
}

// `names` as subjectAltName, beside the common name.
void TestCertificates::Sign(const std::string& host, const std::string& names) const {
  Shell(absl::StrCat("cd ", folder_, " && cp two.key ", host,
                     ".key && openssl req -new -key two.key", " -subj /CN=", host, " -out ", host,
                     ".csr && echo ", names.empty() ? "" : absl::StrCat("subjectAltName=", names),
                     " > ", host, ".ext && openssl x509 -req -in ", host,
                     ".csr -CA ca.crt -CAkey ca.key", " -days 1 -extfile ", host, ".ext -out ",
                     host, ".crt 2>/dev/null"));
}

TestCertificates::~TestCertificates() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

TlsFiles TestCertificates::Files(const std::string& host) const {
  return {.certificate = absl::StrCat(folder_, "/", host, ".crt"),
          .key = absl::StrCat(folder_, "/", host, ".key"),
          .ca = absl::StrCat(folder_, host == "stranger" ? "/other/ca.crt" : "/ca.crt")};
}

std::shared_ptr<const TlsIdentity> TestCertificates::Identity(const std::string& host) const {
  absl::StatusOr<std::unique_ptr<TlsIdentity>> identity = TlsIdentity::Load(Files(host));
  if (!identity.ok()) Die(identity.status().ToString());
  return *std::move(identity);
}

}  // namespace presync
