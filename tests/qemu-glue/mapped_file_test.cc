#include "qemu-glue/mapped_file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/qemu-glue/fake_qmp_server.h"
#include "transport/clock.h"

namespace presync {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBytes = 16 * kPageBytes;

absl::Time Soon() { return MonotonicNow() + absl::Seconds(30); }

// The process behind the monitor is the test itself; it maps what a QEMU, or a liar, might.
class MappedFileTest : public ::testing::Test {
 protected:
  MappedFileTest() {
    base_ = absl::StrCat("/dev/shm/presync-mapped-test-", ::getpid());
    server_ = std::make_unique<FakeQmpServer>(
        AnswerEach([](const std::string& command, const Json&) -> Json {
          if (command != "query-cpus-fast") return nullptr;
          return Json::array({{{"thread-id", ::getpid()}}});
        }));
    qmp_ = *QmpClient::Connect(server_->path(), Soon());
    absl::StatusOr<PeerProcess> process = PeerProcess::Identify(*qmp_, Soon());
    EXPECT_TRUE(process.ok()) << process.status();
    process_ = std::make_unique<PeerProcess>(*std::move(process));
  }
  ~MappedFileTest() override {
    qmp_.reset();
    Unmap();
    for (const char* name : {"a", "b", "link"}) ::unlink(Path(name).c_str());
  }

  std::string Path(const std::string& name) const { return base_ + name; }

  UniqueFd Make(const std::string& name) {
    UniqueFd fd(::open(Path(name).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    EXPECT_EQ(::ftruncate(fd.get(), kBytes), 0);
    return fd;
  }

  void Map(int fd, int rights = PROT_READ | PROT_WRITE, int flags = MAP_SHARED,
           uint64_t bytes = kBytes) {
    mapped_ = ::mmap(nullptr, bytes, rights, flags, fd, 0);
    ASSERT_NE(mapped_, MAP_FAILED);
    mapped_bytes_ = bytes;
  }
  void Unmap() {
    if (mapped_bytes_ > 0) ::munmap(mapped_, mapped_bytes_);
    mapped_bytes_ = 0;
  }

  absl::StatusOr<UniqueFd> Open(const std::string& said) {
    return OpenMappedFile(*process_, said, kBytes);
  }

  // Whether it is the very file, and can be written.
  static bool IsFile(const UniqueFd& opened, const UniqueFd& file) {
    struct stat a = {};
    struct stat b = {};
    EXPECT_EQ(::fstat(opened.get(), &a), 0);
    EXPECT_EQ(::fstat(file.get(), &b), 0);
    EXPECT_EQ(::pwrite(opened.get(), "x", 1, 0), 1);
    return a.st_dev == b.st_dev && a.st_ino == b.st_ino;
  }

  std::string base_;
  std::unique_ptr<FakeQmpServer> server_;
  std::unique_ptr<QmpClient> qmp_;
  std::unique_ptr<PeerProcess> process_;
  void* mapped_ = nullptr;
  uint64_t mapped_bytes_ = 0;
};

TEST_F(MappedFileTest, OpensWhatTheProcessHasMapped) {
  const UniqueFd file = Make("a");
  Map(file.get());
  const absl::StatusOr<UniqueFd> opened = Open(Path("a"));
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_TRUE(IsFile(*opened, file));
  EXPECT_TRUE(CheckMapped(*process_, "ram0", file.get(), kBytes).ok());
}

TEST_F(MappedFileTest, OpensOneThatHasLostItsNameOrHasAnother) {
  const UniqueFd file = Make("a");
  Map(file.get());
  ASSERT_EQ(::symlink(Path("a").c_str(), Path("link").c_str()), 0);
  absl::StatusOr<UniqueFd> opened = Open(Path("link"));
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_TRUE(IsFile(*opened, file));
  ASSERT_EQ(::unlink(Path("a").c_str()), 0);
  opened = Open(Path("a"));
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_TRUE(IsFile(*opened, file));
  const UniqueFd another = Make("a");
  opened = Open(Path("a"));
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_TRUE(IsFile(*opened, file)) << "not the one that is there now";
}

TEST_F(MappedFileTest, OpensAMemfd) {
  const UniqueFd file(::memfd_create("presync-mapped-test", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(file.get(), kBytes), 0);
  Map(file.get());
  const absl::StatusOr<UniqueFd> opened = Open("/memfd:presync-mapped-test");
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_TRUE(IsFile(*opened, file));
}

// By the descriptor that QEMU keeps; the mapping itself opens for whoever has the right.
TEST_F(MappedFileTest, OpensOneWithoutADescriptorOnlyByTheMapping) {
  Map(Make("a").get());
  const absl::StatusOr<UniqueFd> opened = Open(Path("a"));
  EXPECT_EQ(opened.ok(), ::geteuid() == 0) << opened.status();
}

TEST_F(MappedFileTest, RefusesWhatTheProcessHasNotMapped) {
  const UniqueFd mine = Make("a");
  const UniqueFd others = Make("b");  // open here, which is not enough
  Map(mine.get());
  const absl::Status refused = Open(Path("b")).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_THAT(refused.message(), HasSubstr("is not this guest's"));
  EXPECT_FALSE(Open("/etc/passwd").ok());
  EXPECT_FALSE(Open("").ok());
  EXPECT_FALSE(Open("/dev/null").ok());
  EXPECT_EQ(CheckMapped(*process_, "ram0", others.get(), kBytes).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(MappedFileTest, RefusesMappingsThatAreNotWholeSharedAndWritable) {
  const UniqueFd file = Make("a");
  Map(file.get(), PROT_READ);
  EXPECT_EQ(Open(Path("a")).status().code(), absl::StatusCode::kFailedPrecondition);
  Unmap();
  Map(file.get(), PROT_READ | PROT_WRITE, MAP_PRIVATE);
  EXPECT_EQ(Open(Path("a")).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(CheckMapped(*process_, "ram0", file.get(), kBytes).ok());
  Unmap();
  Map(file.get(), PROT_READ | PROT_WRITE, MAP_SHARED, kBytes / 2);
  EXPECT_EQ(Open(Path("a")).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(CheckMapped(*process_, "ram0", file.get(), kBytes).ok());
}

TEST_F(MappedFileTest, AProcessThatHasEndedHasMappedNothing) {
  const UniqueFd file = Make("a");
  const pid_t child = ::fork();
  if (child == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    FakeQmpServer server(AnswerEach([](const std::string& command, const Json&) -> Json {
      if (command != "query-cpus-fast") return nullptr;
      return Json::array({{{"thread-id", ::getpid()}}});
    }));
    ::symlink(server.path().c_str(), Path("link").c_str());
    ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    ::pause();
    ::_exit(0);
  }
  absl::StatusOr<std::unique_ptr<QmpClient>> qmp = absl::UnavailableError("");
  while (!qmp.ok()) qmp = QmpClient::Connect(Path("link"), Soon());
  const absl::StatusOr<PeerProcess> process = PeerProcess::Identify(**qmp, Soon());
  ASSERT_TRUE(process.ok()) << process.status();
  while (!CheckMapped(*process, "ram0", file.get(), kBytes).ok()) ::usleep(1000);
  ::kill(child, SIGKILL);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_EQ(CheckMapped(*process, "ram0", file.get(), kBytes).code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(OpenMappedFile(*process, Path("a"), kBytes).status().code(),
            absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace presync
