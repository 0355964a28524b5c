"""A slow disk of known content (slow_fs.c) for a guest, and what the guest's reader says of it (tools/guest/reader.c)."""

import contextlib
import json
import os
import pathlib
import subprocess
import time

from . import hosts as _hosts
from . import presync as _presync

DISK_MB = 32


class NotHere(Exception):
    """This machine has no such disk; the text says why."""


class SlowDisk:
    """A context manager. `path` is the disk."""

    def __init__(self, folder):
        self._mount = pathlib.Path(folder) / "slow"
        self.path = self._mount / "disk"

    def __enter__(self):
        self._mount.mkdir()
        program = _presync.build_folder() / "tests" / "slow_fs"
        self._process = subprocess.Popen([program, self._mount, str(DISK_MB), "0"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        if not self._process.stdout.readline():
            raise NotHere("slow_fs could not mount its file system: see above")
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # then it unmounts, and ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        _hosts.stop(self._process)
        self._process.stdout.close()

    def set_delay(self, delay_ms):
        self._process.stdin.write(f"{int(delay_ms * 1000)}\n")
        self._process.stdin.flush()


def disk_arguments(path, device="virtio-blk", cache="none", aio="threads", iothread=False):
    """(QEMU's, the kernel's name of the disk)."""
    drive = f"if=none,id=slow,format=raw,cache={cache},aio={aio},file={path},file.locking=off"
    if device == "ide":  # which knows no disks that are read-only
        return ["-drive", drive, "-device", "piix3-ide,id=slowbus", "-device", "ide-hd,bus=slowbus.0,drive=slow"], "/dev/sda"
    arguments = ["-drive", f"{drive},readonly=on"]
    if device == "virtio-scsi":
        return [*arguments, "-device", "virtio-scsi-pci,id=slowbus", "-device", "scsi-hd,bus=slowbus.0,drive=slow"], "/dev/sda"
    if iothread:
        return [*arguments, "-object", "iothread,id=io0", "-device", "virtio-blk-pci,drive=slow,iothread=io0"], "/dev/vdc"
    return [*arguments, "-device", "virtio-blk-pci,drive=slow"], "/dev/vdc"


class Reader:
    """What the guest's reader says on one serial line."""

    def __init__(self, path):
        self._path = path

    def last(self, offset=0):
        """Its newest report from `offset` on, or None."""
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            file.seek(offset)
            for line in reversed(file.read().decode(errors="replace").splitlines()):
                if line.startswith("reader: {"):
                    with contextlib.suppress(ValueError):
                        return json.loads(line.removeprefix("reader: "))
        return None

    def size(self):
        return os.path.getsize(self._path) if os.path.exists(self._path) else 0

    def await_rounds(self, rounds, offset, seconds=60):
        """Its report after so many further rounds."""
        deadline = time.monotonic() + seconds
        first = None
        while time.monotonic() < deadline:
            report = self.last(offset)
            first = first or report
            if report and report["round"] >= first["round"] + rounds:
                return report
            time.sleep(0.1)
        raise _hosts.LabError(f"the guest's reader says nothing: {self._path}")
