"""Hosts with a systemd of their own, on one machine: for what an operator types on a Debian, services included.

    with TwoHosts() as two, Machine(two, "source", "host1", root, folder) as machine:
        machine.run("apt-get install ./presync_*.deb")

A Machine is a host of TwoHosts whose root is a layer over `root`, a Debian with the package systemd; `root` itself is not
changed.  Its systemd runs in namespaces of its own (pids, mounts, name, cgroups), with the host's network.  What is written
lies below `folder`.  Needs root, overlayfs and a cgroup2 mount; all of it ends with the object.
"""

import contextlib
import pathlib
import subprocess
import time

from . import hosts as _hosts

LabError = _hosts.LabError
# Arguments: the layer's folder, the root below it, the host's name, and what is mounted: OUTSIDE:INSIDE:ro or rw.
_BOOT = r"""
set -e
root=$1/root
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$root"
hostname "$3"
echo "$3" >"$root/etc/hostname"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/shm" "$root/dev/pts"
for device in null zero full random urandom tty kvm userfaultfd; do
  [ ! -e /dev/$device ] || { touch "$root/dev/$device"; mount --bind /dev/$device "$root/dev/$device"; }
done
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
shift 3
for each; do
  IFS=: read -r outside inside mode <<<"$each"
  mkdir -p "$root$inside"
  mount --bind "$outside" "$root$inside"
  [ "$mode" = rw ] || mount -o remount,bind,ro "$root$inside"
done
cd "$root"
mkdir -p .outside
pivot_root . .outside
umount -l /.outside
exec env -i container=presync-lab PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --show-status=0
"""


def _cgroup2():
    """Where cgroup2 is mounted."""
    for line in pathlib.Path("/proc/mounts").read_text(encoding="ascii").splitlines():
        if line.split()[2] == "cgroup2":
            return pathlib.Path(line.split()[1])
    raise LabError("no cgroup2 is mounted: mount -t cgroup2 cgroup2 FOLDER")


class Machine:
    """See the module's text."""

    def __init__(self, two, host, name, root, folder, mounts=()):
        """`mounts`: "OUTSIDE:INSIDE:ro" or ":rw"."""
        self.name = name
        self._two, self._host, self._root, self._mounts = two, host, pathlib.Path(root), list(mounts)
        self._folder = pathlib.Path(folder) / name
        self._process = self._init = self._cgroup = None

    def __enter__(self):
        for part in ("root", "upper", "work"):
            (self._folder / part).mkdir(parents=True)
        self._cgroup = _cgroup2() / f"presync-lab-{self._folder.parent.name}-{self.name}"
        self._cgroup.mkdir()
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def _boot(self, seconds=90):
        enter = f'echo $$ >"{self._cgroup}/cgroup.procs"; exec unshare --mount --propagation private --pid --fork --kill-child --uts --ipc ' \
                '--cgroup bash -c "$@"'
        with open(self._folder / "boot.log", "w", encoding="utf-8") as log:
            self._process = self._two.popen(
                self._host, ["bash", "-c", enter, "enter", _BOOT, "boot", self._folder, self._root, self.name, *self._mounts],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + seconds
        while True:
            time.sleep(0.2)
            if self._process.poll() is not None or time.monotonic() > deadline:
                words = (self._folder / "boot.log").read_text(encoding="utf-8", errors="replace")[-2000:]
                raise LabError(f"{self.name} did not boot:\n{words}")
            with contextlib.suppress(OSError, IndexError):
                pid = self._process.pid
                self._init = int(pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0])
                if self.try_run("systemctl is-system-running").stdout.strip() in ("running", "degraded"):
                    return

    def close(self):
        """As pulling the plug does.  May be called twice."""
        if self._process is not None:
            _hosts.stop(self._process, 0)  # init goes with it, and with init all the others
        if self._cgroup is not None:
            for _ in range(100):
                for folder in sorted(self._cgroup.rglob("*"), reverse=True):
                    if folder.is_dir():
                        with contextlib.suppress(OSError):
                            folder.rmdir()
                with contextlib.suppress(FileNotFoundError, OSError):
                    self._cgroup.rmdir()
                if not self._cgroup.exists():
                    break
                time.sleep(0.05)

    def path(self, inside):
        """A file of the machine's, from outside; sockets too."""
        return pathlib.Path(f"/proc/{self._init}/root{inside}")

    def try_run(self, command, seconds=300):
        """What a shell of root's does there, as subprocess.run; its output has the errors too."""
        argv = ["nsenter", "-t", str(self._init), "-m", "-p", "-u", "-i", "-C", "-n", "env", "-i", "HOME=/root", "LC_ALL=C.UTF-8",
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive",
                "bash", "-c", f"cd; {command}"]
        return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              check=False, timeout=seconds)

    def run(self, command, seconds=300):
        """The same; its output, or LabError."""
        done = self.try_run(command, seconds)
        if done.returncode != 0:
            raise LabError(f"{self.name}# {command}\nended with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout
