"""Guests without a system, between two presyncds on loopback: what takes a second to start, needs no privilege, and is
enough wherever a real QEMU is the point and what runs in it is not."""

import contextlib
import os
import pathlib
import subprocess
import tempfile
import time

from . import hosts as _hosts
from . import presync as _presync
from . import qmp as _qmp

NAME = "tiny"
QEMU = "qemu-system-x86_64"


class Loopback:
    """Two hosts that are addresses of the loopback interface: as hosts.TwoHosts, without a network."""

    hosts = ("source", "target")

    def __init__(self):
        # Others may do the same at the same time.
        net = f"127.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}"
        self.address = {host: f"{net}.{number}" for number, host in enumerate(self.hosts, 1)}

    def popen(self, _host, argv, **options):
        return subprocess.Popen([str(word) for word in argv], preexec_fn=_hosts.die_with_parent, **options)


def boot_disk(path):
    """A boot sector that rewrites a word of each KiB between 128 KiB and 576 KiB, 18 times a second, for ever."""
    code = bytes([0x31, 0xC0, 0x8E, 0xD8,  # xor ax,ax; mov ds,ax
                  0xBB, 0x00, 0x20,        # again: mov bx,2000h
                  0x8E, 0xC3,              # segment: mov es,bx
                  0x31, 0xFF,              # xor di,di
                  0x26, 0xFF, 0x05,        # word: inc word [es:di]
                  0x81, 0xC7, 0x00, 0x04,  # add di,400h
                  0x75, 0xF7,              # jnz word
                  0xFB, 0xF4,              # sti; hlt
                  0x81, 0xC3, 0x00, 0x10,  # add bx,1000h
                  0x81, 0xFB, 0x00, 0x90,  # cmp bx,9000h
                  0x75, 0xE7,              # jne segment
                  0xEB, 0xE2])             # jmp again
    pathlib.Path(path).write_bytes(code.ljust(510, b"\0") + b"\x55\xAA" + bytes(1024 * 1024 - 512))


def argv(ram, qmp, glue, *, boot, machine="q35", cpu="", memory="64M", extra=(), qemu=QEMU, data_dirs=(), waiting=False):
    """The command of a guest of 64 MiB, or of one that waits for its state."""
    words = [qemu, *(word for folder in data_dirs for word in ("-L", folder)),
             "-name", NAME, "-nodefaults", "-no-user-config", "-display", "none",
             "-machine", f"{machine},memory-backend=ram0", "-accel", "tcg,thread=multi", "-m", memory,
             "-object", f"memory-backend-file,id=ram0,size=64M,share=on,mem-path={ram}",
             "-plugin", f"{_presync.plugin_path()},socket={glue}", "-qmp", f"unix:{qmp},server=on,wait=off",
             "-drive", f"if=none,id=boot,format=raw,file={boot},readonly=on",
             "-device", "virtio-blk-pci,drive=boot,bootindex=0"]
    if cpu:
        words += ["-cpu", cpu]
    return [*words, *extra, *(("-incoming", "defer", "-S") if waiting else ())]


class Pair:
    """A guest at the source and a presyncd on each host; a context manager."""

    def __init__(self, source=None, target=None, **both):
        """`source`, `target`, `both`: further arguments of argv(), for one side or for both.  "{folder}" in `extra` is
        the pair's folder."""
        self._source, self._target = {**both, **(source or {})}, {**both, **(target or {})}
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="presync-tiny-")))
            boot = self.folder / "boot.img"
            boot_disk(boot)
            self.two = Loopback()
            waiting = argv("{ram.ram0}", "{qmp}", "{glue}", boot=boot, waiting=True, **self._placed(self._target))
            self.source = stack.enter_context(_presync.Daemon(self.two, "source", self.folder, insecure=True))
            self.target = stack.enter_context(
                _presync.Daemon(self.two, "target", self.folder, guests={NAME: waiting}, insecure=True))
            self.ram = pathlib.Path(f"/dev/shm/presync-tiny-{os.getpid()}-{self.folder.name}")
            stack.callback(self.ram.unlink, missing_ok=True)
            self.monitor = f"{self.folder}/presync.qmp"  # presync's own
            words = argv(self.ram, self.monitor, f"{self.folder}/glue", boot=boot, **self._placed(self._source))
            words += ["-qmp", f"unix:{self.folder}/operator.qmp,server=on,wait=off"]
            log = stack.enter_context(open(self.folder / "qemu.log", "wb"))
            self.qemu = self.two.popen("source", words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(_hosts.stop, self.qemu)
            self.qmp = stack.enter_context(_qmp.Qmp(f"{self.folder}/operator.qmp", 20))
            self._await_writes()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _placed(self, arguments):
        extra = tuple(word.replace("{folder}", str(self.folder)) for word in arguments.get("extra", ()))
        return {**arguments, "extra": extra}

    def _await_writes(self, seconds=30):
        """Waits until the boot sector runs."""
        deadline = time.monotonic() + seconds
        with open(self.ram, "rb", buffering=0) as ram:
            while time.monotonic() < deadline:
                ram.seek(0x80000)
                if ram.read(2) != b"\0\0":
                    return
                time.sleep(0.05)
        raise _presync.LabError("the guest's boot sector does not run")

    def presync(self, *arguments, host="source", seconds=120):
        """`presync ARGUMENTS`: its exit code, and all that it said."""
        daemon = getattr(self, host)
        done = daemon.run(*arguments, capture_output=True, text=True, timeout=seconds)
        return done.returncode, done.stdout + done.stderr

    def start(self, *arguments):
        return self.presync("start", NAME, "--qmp", self.monitor, "--to", f"{self.two.address['target']}:{_presync.PORT}",
                            "--max-launch-time", "2s", *arguments)

    def status(self):
        guests = self.source.ask_status()["guests"]
        return guests[0] if guests else {}

    def wait_for(self, wanted, seconds=60):
        """Waits until wanted(status) holds, and returns that status."""
        deadline = time.monotonic() + seconds
        while True:
            status = self.status()
            if wanted(status):
                return status
            if time.monotonic() > deadline:
                raise _presync.LabError(f"not as wanted: {status}\n{self.source.words()}\n{self.target.words()}")
            time.sleep(0.05)

    def wait_synced(self):
        return self.wait_for(lambda status: status.get("state") == "syncing")

    def run_state(self):
        return self.qmp.execute("query-status")["status"]
