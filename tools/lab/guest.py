"""Builds QEMU's command line for the test guest and runs it.

A source and a target get the same GuestSpec, so that their machines are alike; what differs is in
Sockets (file names; passed through verbatim, so placeholders of a template work too):

    argv = qemu_argv(spec, "target", Sockets(ram=["{ram}"], qmp=["{qmp}"], agent="/run/a.sock",
                                             serial="/run/serial.log"))

Trimmed RAM.  QEMU 7.2's own migration loses writes of a guest that TCG runs.  Measured 2026-11,
workload hammer, stock pre-copy, runs taken in turn: with 256 MiB 3 of 3 guests crashed on the
target, with 256 MiB less 8 KiB 3 of 3 arrived without a bad page; redis fell silent in 3 of 9.
QEMU 10.0 at 256 MiB was clean in the one run that converged.  The likely cause: where a RAM
block's size is a multiple of 64 pages QEMU collects the dirty bitmap word by word and TCG's TLB
does not hear of it, so the next write to such a page goes unseen.  For a stock migration to
compare with, guests therefore get 8 KiB (to which QEMU rounds RAM) less than they ask for.
trim_kb=0 gives all of it; huge pages need that.
"""

import dataclasses
import functools
import glob
import os
import pathlib
import re
import shutil
import subprocess

from . import hosts as _hosts
from .agent import AgentError, BeatReader
from .qmp import Qmp

TOOLS = pathlib.Path(__file__).resolve().parent.parent
AGENT_PORT = "org.presync.agent"
LabError = _hosts.LabError
_RAM_PREFIX = "/dev/shm/presync-lab-"


def image(workloads="text"):
    """The folder of the guest's kernel and disks; builds it if need be (text: some 20 s)."""
    done = subprocess.run([TOOLS / "guest" / "build-image", "--with", workloads],
                          stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise LabError("tools/guest/build-image failed: see above")
    return pathlib.Path(done.stdout.split()[-1])


def image_for(workload):
    """The smallest image that has this workload."""
    return image("text" if workload in ("idle", "text", "hammer", "reads") else "all")


def qemu10():
    """(binary, data folders) of QEMU 10, for GuestSpec; fetches it if need be."""
    done = subprocess.run([TOOLS / "setup", "--qemu10", "--no-packages"], stdout=subprocess.PIPE,
                          text=True, check=False)
    if done.returncode != 0:
        raise LabError("tools/setup --qemu10 failed: see above")
    binary = pathlib.Path(done.stdout.split()[-1])
    data = binary.parent.parent / "share" / "qemu"
    return str(binary), ((str(data), "/usr/share/seabios") if data.is_dir() else ())


@functools.lru_cache(maxsize=1)
def kvm_usable():
    """Whether a stock guest runs under KVM here: /dev/kvm may be opened, and the processor has virtualization.

    Without the latter a /dev/kvm is one of the software kind (kvm_pvm), which makes a virtual machine but
    can't run a kernel that was not built for it (seen 2026-11-24: the guest ends before its first line).
    """
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError:
        return False
    return re.search(r"^flags\s*:.*\b(vmx|svm)\b", pathlib.Path("/proc/cpuinfo").read_text(), re.M) is not None


@dataclasses.dataclass(frozen=True)
class GuestSpec:
    """What a guest is; the same for the source and the target."""

    image: pathlib.Path  # from image()
    data_disk: str  # a copy of the image's data.img, which source and target share
    workload: str = "text"
    beat_ms: int = 10
    memory_mb: int = 256
    trim_kb: int = 8  # see Trimmed RAM
    two_backends: bool = False  # RAM in two files, as two NUMA nodes
    machine: str = "q35"
    network: bool = False  # a virtio-net card (without a network behind it)
    vga: str = "none"
    qemu: str = "qemu-system-x86_64"
    data_dirs: tuple = ()  # for -L, in this order
    plugin: str = ""  # what follows -plugin; "" for none
    ld_preload: str = ""
    kernel_args: str = ""  # e.g. "presync.area_mb=64 presync.pages_s=1000"
    extra: tuple = ()  # more arguments for QEMU


@dataclasses.dataclass(frozen=True)
class Sockets:
    """File names of one QEMU.  Each monitor serves one client at a time, so name one for each."""

    ram: list  # one file, or two with two_backends
    qmp: list
    agent: str
    serial: str


def _backends(spec):
    return 2 if spec.two_backends else 1


def _ram_kb(spec):
    return spec.memory_mb * 1024 - _backends(spec) * spec.trim_kb


def _memory(spec, ram):
    count = _backends(spec)
    if len(ram) != count:
        raise LabError(f"this guest needs {count} RAM file(s), {len(ram)} given")
    size = spec.memory_mb * 1024 // count - spec.trim_kb
    argv = []
    for node, path in enumerate(ram):
        argv += ["-object",
                 f"memory-backend-file,id=ram{node},size={size}K,share=on,mem-path={path}"]
        if spec.two_backends:
            argv += ["-numa", f"node,nodeid={node},memdev=ram{node}"]
    return argv if spec.two_backends else [*argv, "-machine", "memory-backend=ram0"]


def cache_mode(path):
    """As for any guest that is to migrate: not through the host's page cache, which QEMU would have to drop before the
    guest runs on the target (14 to 27 ms of a standstill here).  Not every file system can: tmpfs from Linux 6.6 on."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return "writeback"
    return "none"


def _disk(index, path, read_only):
    mode = "on" if read_only else "off"
    return ["-drive", f"if=none,id=disk{index},format=raw,cache={cache_mode(path)},file={path},readonly={mode}",
            "-device", f"virtio-blk-pci,drive=disk{index}"]


def qemu_argv(spec, role, sockets, paused=True):
    """QEMU's command line as a list.  `role` is "source" (runs at once) or "target" (waits for
    migrate-incoming and, if `paused`, for cont when the guest has arrived)."""
    accel = ["kvm", "host"] if kvm_usable() else ["tcg,thread=multi", "max"]
    append = (f"console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off init_on_alloc=0 nokaslr "
              f"presync.workload={spec.workload} presync.beat_ms={spec.beat_ms} {spec.kernel_args}")
    argv = ["env", f"LD_PRELOAD={spec.ld_preload}"] if spec.ld_preload else []
    argv.append(spec.qemu)
    for folder in spec.data_dirs:
        argv += ["-L", str(folder)]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
             "-machine", spec.machine, "-accel", accel[0], "-cpu", accel[1], "-smp", "1",
             "-m", f"{_ram_kb(spec)}K", *_memory(spec, sockets.ram), "-vga", spec.vga,
             "-kernel", f"{spec.image}/kernel", "-initrd", f"{spec.image}/initramfs",
             "-append", append.strip(),
             "-chardev", f"file,id=serial,path={sockets.serial}", "-serial", "chardev:serial",
             *_disk(0, f"{spec.image}/system.img", True), *_disk(1, spec.data_disk, False),
             "-device", "virtio-serial-pci",
             "-chardev", f"socket,id=agent,path={sockets.agent},server=on,wait=off",
             "-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
    if spec.network:
        argv += ["-netdev", "hubport,id=net0,hubid=0",
                 "-device", "virtio-net-pci,netdev=net0,romfile=,mac=52:54:00:10:23:01"]
    for path in sockets.qmp:
        argv += ["-qmp", f"unix:{path},server=on,wait=off"]
    if spec.plugin:
        argv += ["-plugin", spec.plugin]
    if role == "target":
        argv += ["-incoming", "defer", *(["-S"] if paused else [])]
    elif role != "source":
        raise LabError(f"a guest's role is source or target, not '{role}'")
    return argv + list(spec.extra)


def copy_data_disk(image_folder, folder):
    """A fresh data disk in `folder`; returns its path."""
    to = f"{folder}/data.img"
    subprocess.run(["cp", "--sparse=always", f"{image_folder}/data.img", to], check=True)
    return to


def _remove_left_behind():
    """RAM files whose process no longer exists (it was killed)."""
    for path in glob.glob(f"{_RAM_PREFIX}*.ram"):
        pid = path.removeprefix(_RAM_PREFIX).split("-")[0]
        if not os.path.exists(f"/proc/{pid}"):
            pathlib.Path(path).unlink(missing_ok=True)


class Guest:
    """One QEMU of ours: a context manager that starts it and, at the end, stops it by its id and
    removes the RAM files it made (of what is in `folder` the caller disposes)."""

    def __init__(self, spec, role, folder, popen=None, ram=None, monitors=1, paused=True):
        """`folder` holds sockets and logs.  `popen(argv, **options)` starts the process; default:
        on this host; functools.partial(hosts.popen, "source"): inside one of two.  `ram`: names
        of the RAM files, default in /dev/shm and removed at the end; given ones stay.  `paused`:
        see qemu_argv."""
        self.spec = spec
        self.role = role
        self._paused = paused
        base = f"{folder}/{role}"
        self._own_ram = ram is None
        if ram is None:
            _remove_left_behind()
            name = f"{_RAM_PREFIX}{os.getpid()}-{pathlib.Path(folder).name}-{role}"
            ram = [f"{name}-{node}.ram" for node in range(_backends(spec))]
        self.sockets = Sockets(ram=ram, qmp=[f"{base}.qmp{i}" for i in range(monitors)],
                               agent=f"{base}.agent", serial=f"{base}.serial")
        self.log = f"{base}.qemu.log"
        self._popen = popen or self._start_here
        self.process = None

    @staticmethod
    def _start_here(argv, **options):
        return subprocess.Popen(argv, preexec_fn=_hosts.die_with_parent, **options)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Starts QEMU; does not wait for it."""
        if shutil.which(self.spec.qemu) is None:
            raise LabError(f"there is no '{self.spec.qemu}': run tools/setup")
        argv = qemu_argv(self.spec, self.role, self.sockets, self._paused)
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = self._popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self):
        """Ends QEMU.  May be called twice."""
        if self.process is not None:
            _hosts.stop(self.process)
        if self._own_ram:
            for path in self.sockets.ram:
                pathlib.Path(path).unlink(missing_ok=True)

    def qmp(self, monitor=0, seconds=10):
        """A new connection to one of the monitors."""
        return Qmp(self.sockets.qmp[monitor], seconds)

    def wait_boot(self, reader, seconds=60):
        """Waits for the agent's next beat through `reader`, a BeatReader attached to us."""
        try:
            return reader.wait_beat(self.role, seconds)
        except AgentError as error:
            raise LabError(f"the guest did not come up: {error}\n{self.last_words()}") from error

    def last_words(self):
        """The ends of QEMU's output and the guest's console, for an error text."""
        words = []
        for path in (self.log, self.sockets.serial):
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    words += [f"--- {path}", *file.read().splitlines()[-15:]]
            except OSError as error:
                words.append(str(error))
        if self.process is not None and self.process.poll() is not None:
            words.append(f"--- QEMU ended with {self.process.returncode}")
        return "\n".join(words)

    def reader(self):
        """A BeatReader on this guest's socket."""
        return BeatReader(**{self.role: self.sockets.agent})
