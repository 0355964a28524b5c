// The handshake: who is believed, who is not, and what both sides hear of it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/transport/loopback.h"
#include "tests/transport/tls/certificates.h"
#include "transport/clock.h"
#include "transport/tls/connection.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

const TestCertificates& Certificates() { return TestCertificates::Shared(); }

absl::Time Soon() { return MonotonicNow() + absl::Seconds(20); }

struct Pair {
  absl::StatusOr<Connection> dialled, accepted;
};

absl::StatusOr<Connection> Wrap(UniqueFd socket, absl::StatusOr<std::unique_ptr<TlsSession>> tls) {
  if (!tls.ok()) return tls.status();
  return Connection(std::move(socket), *std::move(tls));
}

// Both sides shake hands, as `host` was dialled.
Pair Shake(const std::string& dialler, const std::string& accepter,
           const std::string& host = "127.0.0.1") {
  SocketPairs sockets = *ConnectLoopback(1);
  Pair pair;
  const auto own = Certificates().Identity(accepter);
  std::thread other([&] {
    UniqueFd socket = std::move(sockets.target[0]);
    auto tls = TlsSession::Accept(socket.get(), *own, Soon());
    if (!tls.ok()) CloseGently(std::move(socket), absl::Seconds(1));
    pair.accepted = Wrap(std::move(socket), std::move(tls));
  });
  UniqueFd socket = std::move(sockets.source[0]);
  auto tls = TlsSession::Connect(socket.get(), *Certificates().Identity(dialler), host, Soon());
  pair.dialled = Wrap(std::move(socket), std::move(tls));
  if (!pair.dialled.ok()) socket.reset();
  other.join();
  return pair;
}

// What the first receive says: there, who dialled learns that its certificate is not believed.
absl::Status FirstWord(Connection* connection) {
  char byte = 0;
  while (true) {
    short events = 0;
    const absl::StatusOr<size_t> n = connection->TryReceive({&byte, 1}, &events);
    if (!n.ok()) return n.status();
    if (*n > 0) return absl::OkStatus();
    if (absl::Status s = AwaitSocket(connection->fd(), events, Soon()); !s.ok()) return s;
  }
}

TEST(Tls, BothSidesKnowEachOther) {
  Pair pair = Shake("one", "two");
  ASSERT_TRUE(pair.dialled.ok()) << pair.dialled.status();
  ASSERT_TRUE(pair.accepted.ok()) << pair.accepted.status();
  EXPECT_EQ(pair.dialled->peer_name(), "two");
  EXPECT_EQ(pair.accepted->peer_name(), "one");
  EXPECT_THAT(pair.dialled->tls()->Describe(), HasSubstr("TLS_"));
  short events = 0;
  ASSERT_EQ(*pair.accepted->TrySend({"x", 1}, &events), 1u);
  EXPECT_TRUE(FirstWord(&*pair.dialled).ok());
}

TEST(Tls, AnotherHostOfTheSameAuthorityIsNotTheOneThatWasDialled) {
  const Pair pair = Shake("one", "elsewhere");
  EXPECT_EQ(pair.dialled.status().code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(pair.dialled.status().ToString(), HasSubstr("IP address mismatch"));
  EXPECT_FALSE(pair.accepted.ok());
  EXPECT_EQ(Shake("one", "two", "three").dialled.status().code(),
            absl::StatusCode::kUnauthenticated);
  EXPECT_TRUE(Shake("one", "two", "two").dialled.ok()) << "dialled by name";
}

TEST(Tls, AnotherAuthoritysHostsAreStrangers) {
  const Pair dials = Shake("stranger", "two");
  EXPECT_EQ(dials.dialled.status().code(), absl::StatusCode::kUnauthenticated);
  Pair pair = Shake("one", "stranger");
  EXPECT_EQ(pair.dialled.status().code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(pair.accepted.status().ToString(), HasSubstr("not believe this host's certificate"));
}

// A client of OpenSSL's own, which looks at nothing: what somebody hostile would use.
class RawClient {
 public:
  RawClient(UniqueFd socket, const std::string& host, int version = TLS1_3_VERSION)
      : socket_(std::move(socket)), context_(SSL_CTX_new(TLS_client_method())) {
    SSL_CTX_set_max_proto_version(context_, version);
    if (!host.empty()) {
      const TlsFiles files = Certificates().Files(host);
      SSL_CTX_use_certificate_chain_file(context_, files.certificate.c_str());
      SSL_CTX_use_PrivateKey_file(context_, files.key.c_str(), SSL_FILETYPE_PEM);
    }
    ssl_ = SSL_new(context_);
    SSL_set_fd(ssl_, socket_.get());
  }
  ~RawClient() {
    SSL_free(ssl_);
    SSL_CTX_free(context_);
  }
  // Why it failed, by then or by the first answer; empty: it did not.
  std::string Run() {
    char byte = 0;
    if (SSL_connect(ssl_) == 1 && SSL_read(ssl_, &byte, 1) == 1) return "";
    return TakeTlsErrors();
  }

 private:
  UniqueFd socket_;
  SSL_CTX* context_;
  SSL* ssl_;
};

absl::Status AcceptRaw(const std::string& host, std::string* client_heard,
                       int version = TLS1_3_VERSION) {
  SocketPairs sockets = *ConnectLoopback(1);
  std::thread client(
      [&] { *client_heard = RawClient(std::move(sockets.source[0]), host, version).Run(); });
  UniqueFd socket = std::move(sockets.target[0]);
  absl::Status status;
  {
    const auto session = TlsSession::Accept(socket.get(), *Certificates().Identity("two"), Soon());
    status = session.status();
    CloseGently(std::move(socket), absl::Seconds(1));
  }
  client.join();
  return status;
}

TEST(Tls, RefusesWhoShowsNoCertificateABadOneOrSpeaksAnOldVersion) {
  std::string heard;
  absl::Status status = AcceptRaw("", &heard);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(status.ToString(), HasSubstr("no certificate"));
  EXPECT_THAT(heard, HasSubstr("certificate required"));

  status = AcceptRaw("expired", &heard);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(status.ToString(), HasSubstr("expired"));
  EXPECT_THAT(heard, HasSubstr("certificate expired"));

  status = AcceptRaw("stranger", &heard);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(heard, HasSubstr("unknown ca"));

  EXPECT_FALSE(AcceptRaw("one", &heard, TLS1_2_VERSION).ok());
  EXPECT_THAT(heard, HasSubstr("protocol version"));
}

// Anything may stand in a common name, and a wildcard is many hosts' name.
TEST(Tls, OnlyADnsNameIsAName) {
  for (const char* host : {"unnamed", "address", "wild"}) {
    std::string heard;
    const absl::Status status = AcceptRaw(host, &heard);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated) << host;
    EXPECT_THAT(status.ToString(), HasSubstr("subjectAltName")) << host;
    EXPECT_THAT(status.ToString(), HasSubstr("tools/make-certs")) << host;
    const absl::Status own = TlsIdentity::Load(Certificates().Files(host)).status();
    EXPECT_EQ(own.code(), absl::StatusCode::kInvalidArgument) << host;
    EXPECT_THAT(own.ToString(), HasSubstr("tools/make-certs")) << host;
  }
  EXPECT_EQ(Shake("several", "one").accepted->peer_name(), "several");
  EXPECT_TRUE(Shake("one", "several", "several").dialled.ok());
  const absl::Status wild = Shake("one", "several", "two.example.org").dialled.status();
  EXPECT_EQ(wild.code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(wild.ToString(), HasSubstr("one of its DNS names"));
}

TEST(Tls, WhoDialsHearsThatItsCertificateIsNotBelieved) {
  // A target whose authority is another one, but which the dialler believes: two of "one"'s files
  // and the stranger's authority, as after half of a change of authorities.
  TlsFiles files = Certificates().Files("two");
  const std::string both = Certificates().folder() + "/both.crt";
  {
    std::ofstream out(both);
    out << std::ifstream(files.ca).rdbuf()
        << std::ifstream(Certificates().folder() + "/other/ca.crt").rdbuf();
  }
  TlsFiles stranger = Certificates().Files("stranger");
  stranger.ca = both;
  const auto dialler = *TlsIdentity::Load(stranger);
  SocketPairs sockets = *ConnectLoopback(1);
  std::thread target([&] {
    UniqueFd socket = std::move(sockets.target[0]);
    EXPECT_FALSE(TlsSession::Accept(socket.get(), *Certificates().Identity("two"), Soon()).ok());
    CloseGently(std::move(socket), absl::Seconds(5));
  });
  UniqueFd socket = std::move(sockets.source[0]);
  auto tls = TlsSession::Connect(socket.get(), *dialler, "127.0.0.1", Soon());
  ASSERT_TRUE(tls.ok()) << tls.status();
  Connection connection(std::move(socket), *std::move(tls));
  const absl::Status heard = FirstWord(&connection);
  EXPECT_EQ(heard.code(), absl::StatusCode::kUnauthenticated) << heard;
  connection = Connection();
  target.join();
}

TEST(Tls, SomebodySilentIsNotWaitedForForEver) {
  const SocketPairs sockets = *ConnectLoopback(1);
  const auto session = TlsSession::Accept(sockets.target[0].get(), *Certificates().Identity("two"),
                                          MonotonicNow() + absl::Milliseconds(50));
  EXPECT_EQ(session.status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(TlsIdentity, SaysWhatIsWrongWithItsFiles) {
  const auto error = [](TlsFiles files) { return TlsIdentity::Load(files).status(); };
  const TlsFiles good = Certificates().Files("one");
  EXPECT_EQ((*TlsIdentity::Load(good))->name(), "one");

  TlsFiles files = good;
  files.key = "/nowhere.key";
  EXPECT_EQ(error(files).code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(error(files).ToString(), HasSubstr("/nowhere.key"));

  files.key = Certificates().Files("two").key;
  EXPECT_EQ(error(files).code(), absl::StatusCode::kInvalidArgument);

  files.key = Certificates().folder() + "/open.key";
  std::filesystem::copy_file(good.key, files.key);
  ::chmod(files.key.c_str(), 0644);
  EXPECT_EQ(error(files).code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(error(files).ToString(), HasSubstr("chmod 600"));

  files = good;
  files.ca = Certificates().Files("stranger").ca;
  EXPECT_THAT(error(files).ToString(), HasSubstr("no peer would believe it"));
  EXPECT_THAT(error(Certificates().Files("expired")).ToString(), HasSubstr("expired"));
  files.certificate = files.key;
  EXPECT_THAT(error(files).ToString(), HasSubstr("holds no certificate"));
}

TEST(TlsIdentity, TakesNewFilesWhenToldAndKeepsTheOldOnesWhenTheyAreBad) {
  const std::string base = Certificates().folder() + "/changing";
  const auto put = [&](const std::string& host) {
    const auto files = Certificates().Files(host);
    const auto how = std::filesystem::copy_options::overwrite_existing;
    std::filesystem::copy_file(files.certificate, base + ".crt", how);
    std::filesystem::copy_file(files.key, base + ".key", how);
  };
  put("one");
  const auto identity =
      *TlsIdentity::Load({base + ".crt", base + ".key", Certificates().Files("one").ca});
  EXPECT_EQ(identity->name(), "one");
  put("two");
  EXPECT_EQ(identity->name(), "one");
  ASSERT_TRUE(identity->Reload().ok());
  EXPECT_EQ(identity->name(), "two");
  put("expired");
  EXPECT_FALSE(identity->Reload().ok());
  EXPECT_EQ(identity->name(), "two");
}

}  // namespace
}  // namespace presync
