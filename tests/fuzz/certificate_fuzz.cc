// The name in a certificate, by which a peer is known: nothing but what a name may consist of.
// Reading the certificate is OpenSSL's.
#include <openssl/x509.h>

#include <memory>

#include "tests/fuzz/fuzz_input.h"
#include "transport/tls/tls_identity.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::unique_ptr<X509, decltype(&X509_free)> certificate(
      d2i_X509(nullptr, &data, static_cast<long>(size)), X509_free);  // NOLINT: OpenSSL's type
  presync::TakeTlsErrors();
  if (certificate == nullptr) return 0;
  const std::string name = presync::CertificateName(*certificate);
  FUZZ_REQUIRE(name.size() <= 253);
  for (const unsigned char c : name) {
    FUZZ_REQUIRE((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                 c == '.' || c == '-' || c == '_');
  }
  return 0;
}
