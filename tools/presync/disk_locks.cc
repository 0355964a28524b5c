#include "tools/presync/disk_locks.h"

#include <set>

#include "absl/strings/str_cat.h"
#include "qemu-glue/qmp/json_read.h"

namespace presync {
namespace {

constexpr char kLocks[] =
    "presync itself never lets two run; this is about what people and services do: see "
    "docs/reliability.md, \"The last line\"";

// By the driver of what lies lowest (qapi/block-core.json, BlockdevDriver).
Finding JudgeDisk(const std::string& driver, const std::string& file) {
  if (driver == "file") {
    return Good("disk", absl::StrCat(file,
                                     " is a file: QEMU locks it, which reaches the other "
                                     "host if it is on NFS 4, GFS2, OCFS2 or CephFS"));
  }
  if (driver == "host_device" || driver == "iscsi" || driver == "nvme") {
    return Note("disk",
                absl::StrCat(file, " is a block device (", driver,
                             "): nothing keeps a second QEMU on another host from writing to it"),
                kLocks);
  }
  if (driver == "rbd") {
    return Note("disk",
                absl::StrCat(file,
                             " is an rbd image: only its exclusive-lock feature, taken "
                             "exclusively, keeps a second QEMU from writing to it"),
                kLocks);
  }
  return Note("disk",
              absl::StrCat(file, " (", driver,
                           "): presync does not know whether anything keeps a second QEMU on "
                           "another host from writing to it"),
              kLocks);
}

}  // namespace

std::vector<Finding> JudgeDisks(const Json& nodes) {
  // What lies upon others is theirs to lock; a filter or a format is no disk of its own.
  static const std::set<std::string>* const upper = new std::set<std::string>{"raw",
                                                                              "qcow2",
                                                                              "qed",
                                                                              "vmdk",
                                                                              "vdi",
                                                                              "vhdx",
                                                                              "luks",
                                                                              "throttle",
                                                                              "copy-on-read",
                                                                              "blkdebug",
                                                                              "copy-before-write",
                                                                              "commit",
                                                                              "mirror_top",
                                                                              "null-co"};
  std::vector<Finding> findings;
  std::set<std::string> seen;
  if (!nodes.is_array()) return findings;
  for (const Json& node : nodes) {
    const std::string driver = StringAt(node, "drv");
    const std::string file = StringAt(node, "file");
    if (BoolAt(node, "ro").value_or(true) || upper->contains(driver)) continue;
    if (seen.insert(file).second) findings.push_back(JudgeDisk(driver, file));
  }
  return findings;
}

std::vector<Finding> ExamineDisks(QmpClient& qmp, absl::Time deadline) {
  const absl::StatusOr<Json> nodes =
      qmp.Execute("query-named-block-nodes", {{"flat", true}}, deadline);
  if (!nodes.ok()) return {};
  return JudgeDisks(*nodes);
}

}  // namespace presync
