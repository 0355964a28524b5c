// Real certificates for tests, by tools/make-certs and openssl: good ones, and each kind of bad
// one.
#pragma once

#include <memory>
#include <string>

#include "transport/tls/tls_identity.h"

namespace presync {

// Everything in a folder of its own, which goes with it. Made once a process: Shared.
class TestCertificates {
 public:
  static const TestCertificates& Shared();
  ~TestCertificates();

  // "one", "two": hosts of the authority, for 127.0.0.1 and ::1. "elsewhere": the same, for another
  // address. "stranger": of another authority, and believes that one only. "expired": of the
  // authority, but it ran out. "unnamed", "address", "wild": of the authority, with no DNS name, or
  // one that is a wildcard. "several": with a name, and a wildcard besides.
  TlsFiles Files(const std::string& host) const;

  // Loaded; ends the test process when that fails, as it does for "expired".
  std::shared_ptr<const TlsIdentity> Identity(const std::string& host) const;

  const std::string& folder() const { return folder_; }

 private:
  TestCertificates();
  void Sign(const std::string& host, const std::string& names) const;
  std::string folder_;
};

}  // namespace presync
