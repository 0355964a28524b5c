#!/usr/bin/python3
"""What presync says and does when a guest, or its operator, does something else than to be launched.

    tests/tiny_guests.py [TestCase.test ...] [-v]     PRESYNC_BUILD names the build folder

With real QEMUs and guests without a system, on loopback; needs no privilege but what presyncd needs for its dirty log.
"""

import pathlib
import signal
import subprocess
import sys
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import guest, presync, qmp, tiny  # noqa: E402  (after the path is set)

INTERRUPTED = 130


def interrupt(pair, *arguments):
    """`presync ARGUMENTS`, and Ctrl-C once it waits: its exit code, what it said, and how long it took to end."""
    command = [presync.program("presync"), "--socket", pair.source.socket, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        time.sleep(1)
        if process.poll() is not None:
            raise AssertionError(f"{arguments} did not wait: {process.stdout.read()}")
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        words, _ = process.communicate(timeout=20)
        return process.returncode, words, time.monotonic() - began
    finally:
        process.kill()
        process.wait()


def with_value(words, value):
    return tuple(word.replace("{}", str(value)) for word in words)


class WordsTest(unittest.TestCase):
    """What a person is told."""

    def test_ctrl_c_ends_the_waiting_and_says_what_goes_on(self):
        """The target's presyncd hangs, as on a host that swaps."""
        with tiny.Pair() as pair:
            pair.target.process.send_signal(signal.SIGSTOP)
            to = f"{pair.two.address['target']}:{presync.PORT}"
            code, words, _ = interrupt(pair, "start", tiny.NAME, "--qmp", pair.monitor, "--to", to)
            pair.target.process.send_signal(signal.SIGCONT)
            self.assertEqual(code, INTERRUPTED, words)
            self.assertIn("presync stop tiny", words)
            pair.wait_synced()  # as it was told: the start went on
            pair.target.process.send_signal(signal.SIGSTOP)
            try:
                for command in ("verify", "launch"):
                    code, words, _ = interrupt(pair, command, tiny.NAME)
                    self.assertEqual(code, INTERRUPTED, words)
                    self.assertIn("goes on", words)
                    self.assertIn("presync status tiny", words)
            finally:
                pair.target.process.send_signal(signal.SIGCONT)

    def test_stop_of_a_guest_that_has_moved(self):
        with tiny.Pair() as pair:
            self.assertEqual(pair.start("--wait")[0], 0)
            code, words = pair.presync("launch", tiny.NAME)
            self.assertEqual(code, 0, words)
            self.assertNotIn("launch now =", pair.presync("status")[1])
            code, words = pair.presync("stop", tiny.NAME)
            self.assertEqual(code, 0, words)
            self.assertIn(f"runs on {pair.two.address['target']}", words)
            self.assertNotIn("goes on here", words)

    def test_guest_whose_qemu_ended(self):
        with tiny.Pair() as pair:
            self.assertEqual(pair.start("--wait")[0], 0)
            pair.qemu.kill()
            pair.qemu.wait()
            status = pair.wait_for(lambda each: each["state"] == "failed")
            self.assertIn("QEMU here has ended", status["problem"])
            self.assertIsNone(status["predicted_launch_ms"])
            words = pair.presync("status")[1]
            self.assertNotIn("launch now", words)
            self.assertNotIn("No such process", words)

    def test_block_job_is_found_before_the_guest_is_stopped(self):
        with DisksPair(extra=with_value(DISK, 16)) as pair:
            self.assertEqual(pair.start("--wait")[0], 0)
            pair.qmp.execute("drive-backup", raw={
                "device": "d", "job-id": "bk", "sync": "full", "target": f"{pair.folder}/bk.img", "format": "raw",
                "speed": 1 << 16})
            code, words = pair.presync("launch", tiny.NAME)
            self.assertEqual(code, 1, words)
            self.assertIn("'bk' (backup)", words)
            self.assertIn("block-job-cancel", words)
            self.assertFalse(stopped(pair))
            pair.qmp.execute("block-job-cancel", raw={"device": "bk", "force": True})
            pair.qmp.wait_event("BLOCK_JOB_CANCELLED")
            code, words = pair.presync("launch", tiny.NAME, "--verify")
            self.assertEqual(code, 0, words)


class DisksPair(tiny.Pair):
    """With disks in its folder, which both hosts reach: N.img of N MiB, and d.qcow2."""

    def _placed(self, arguments):
        words = " ".join(arguments.get("extra", ()))
        for size in (4, 8, 16):
            if f"/{size}.img" in words:
                (self.folder / f"{size}.img").write_bytes(b"\7" * (size << 20))
        if "d.qcow2" in words and not (self.folder / "d.qcow2").exists():
            make_qcow2(self.folder, self.folder / "d.qcow2")
        return super()._placed(arguments)


def make_qcow2(folder, path):
    """An empty image of 16 MiB, which may have snapshots; QEMU itself can make one."""
    path.touch()
    socket = f"{folder}/maker.qmp"
    maker = subprocess.Popen([tiny.QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-qmp",
                              f"unix:{socket},server=on,wait=off"])
    try:
        with qmp.Qmp(socket, 20) as monitor:
            monitor.execute("blockdev-add", raw={"driver": "file", "filename": str(path), "node-name": "file"})
            monitor.execute("blockdev-create", raw={"job-id": "make", "options": {
                "driver": "qcow2", "file": "file", "size": 16 << 20}})
            while monitor.execute("query-jobs")[0]["status"] != "concluded":
                time.sleep(0.02)
    finally:
        maker.terminate()
        maker.wait()


def stopped(pair):
    """Whether the source's guest was ever stopped."""
    pair.run_state()  # events come before this answer
    try:
        pair.qmp.last_time_of("STOP")
    except KeyError:
        return False
    return True


VGA = ("-device", "VGA,vgamem_mb={}")
RNG_SERIAL = ("-device", "virtio-rng-pci", "-device", "virtio-serial-pci")
DISK = ("-drive", "if=none,id=d,format=raw,file={folder}/{}.img", "-device", "virtio-blk-pci,drive=d")
PORT = ("-device", "pcie-root-port,id=rp1,chassis=1")


class ChangeTest(unittest.TestCase):
    """Devices and memory that come and go while the guest is in sync."""

    def expect_hindrance(self, pair, *words):
        """It is said without being asked, and a launch is refused before the guest is stopped."""
        status = pair.wait_for(lambda each: all(word in each.get("problem", "") for word in words), 20)
        self.assertFalse(status["launchable"])
        code, said = pair.presync("launch", tiny.NAME)
        self.assertEqual(code, 1, said)
        for word in words:
            self.assertIn(word, said)
        self.assertFalse(stopped(pair))

    def test_device_that_is_refused_at_the_start(self):
        """Its memory is written unseen: when it is gone everything is compared again."""
        with tiny.Pair(extra=PORT) as pair:
            self.assertEqual(pair.start("--wait")[0], 0)
            shared = pathlib.Path(f"{pair.ram}-shared")
            self.addCleanup(shared.unlink, missing_ok=True)
            pair.qmp.execute("object-add", raw={"qom-type": "memory-backend-file", "id": "shm", "size": 1 << 20,
                                                "share": True, "mem-path": str(shared)})
            pair.qmp.execute("device_add", driver="ivshmem-plain", id="iv", memdev="shm", bus="rp1")
            self.expect_hindrance(pair, "ivshmem-plain", "unseen")
            before = pair.status()["reconnects"]
            with open(pair.ram, "r+b") as ram:  # as such a device would: past QEMU's page tables
                ram.seek(32 << 20)
                ram.write(b"unseen" * 100)
            pair.qmp.execute("device_del", id="iv")
            pair.qmp.execute("system_reset")  # the guest has no system that would let go of it
            pair.qmp.wait_event("DEVICE_DELETED")
            pair.qmp.execute("object-del", id="shm")
            pair.wait_for(lambda each: each["reconnects"] > before and each["state"] == "syncing" and each["launchable"])
            code, said = pair.presync("launch", tiny.NAME, "--verify")
            self.assertEqual(code, 0, said)

    def test_memory_that_is_plugged_in(self):
        with tiny.Pair(memory="64M,slots=4,maxmem=1G") as pair:
            self.assertEqual(pair.start("--wait")[0], 0)
            dimm = pathlib.Path(f"{pair.ram}-dimm")
            self.addCleanup(dimm.unlink, missing_ok=True)
            pair.qmp.execute("object-add", raw={"qom-type": "memory-backend-file", "id": "ram1", "size": 128 << 20,
                                                "share": True, "mem-path": str(dimm)})
            pair.qmp.execute("device_add", driver="pc-dimm", id="dimm1", memdev="ram1")
            self.expect_hindrance(pair, "'ram1' of 128 MiB", "presync start")

    def test_reset_and_loadvm_are_seen(self):
        disk = ("-drive", "if=none,id=d,format=qcow2,file={folder}/d.qcow2", "-device", "virtio-blk-pci,drive=d")
        with DisksPair(extra=disk) as pair:
            self.assertEqual(pair.start("--wait")[0], 0)
            for command in ("savevm one", "system_reset", "loadvm one"):
                said = pair.qmp.execute("human-monitor-command", command_line=command, seconds=60)
                self.assertEqual(said, "")
                pair.wait_synced()
                code, words = pair.presync("verify", tiny.NAME)
                self.assertEqual(code, 0, f"after {command}: {words}")
            code, words = pair.presync("launch", tiny.NAME, "--verify")
            self.assertEqual(code, 0, words)


class FitTest(unittest.TestCase):
    """A target whose QEMU is not like the source's."""

    def start(self, source=None, target=None):
        """What `presync start` says: its exit code, words, and the status after it."""
        with DisksPair(source=source, target=target) as pair:
            code, words = pair.start()
            return code, words, pair.status()

    def test_what_a_launch_would_fail_of(self):
        cases = {
            "machine type: pc-q35-7.2-machine": ({"machine": "pc-q35-7.2"}, {"machine": "pc-q35-7.1"}),
            "smp cpus: 2": ({"extra": ("-smp", "2")}, {}),
            "memory slots": ({"memory": "64M,slots=4,maxmem=1G"}, {}),
            "vga.vram: 16777216": ({"extra": with_value(VGA, 16)}, {"extra": with_value(VGA, 32)}),
            "virtio-rng-pci at the source, none": ({"extra": RNG_SERIAL[:2]}, {}),
            "virtio-rng-pci at the source, virtio-serial-pci": ({"extra": RNG_SERIAL},
                                                               {"extra": RNG_SERIAL[2:] + RNG_SERIAL[:2]}),
        }
        for difference, (source, target) in cases.items():
            with self.subTest(difference):
                code, words, status = self.start(source, target)
                self.assertEqual(code, 1, words)
                self.assertIn(difference, words)
                self.assertEqual(status, {})

    def test_what_qemu_would_not_say(self):
        cases = {
            "CPU model: qemu64": ({"cpu": "qemu64"}, {"cpu": "qemu32"}),
            "8388608 at the source, 4194304 on the target": ({"extra": with_value(DISK, 8)},
                                                             {"extra": with_value(DISK, 4)}),
            "none at the source, virtio-rng-pci": ({}, {"extra": RNG_SERIAL[:2]}),
        }
        for warning, (source, target) in cases.items():
            with self.subTest(warning):
                code, words, status = self.start(source, target)
                self.assertEqual(code, 0, words)
                self.assertIn(warning, words)
                self.assertIn(warning, " ".join(status["warnings"]))

    def test_device_that_is_plugged_in_later(self):
        with tiny.Pair(extra=PORT) as pair:
            self.assertEqual(pair.start("--wait")[0], 0)
            pair.qmp.execute("device_add", driver="virtio-rng-pci", id="rng1", bus="rp1")
            status = pair.wait_for(lambda each: "virtio-rng-pci" in each.get("problem", ""), 20)
            self.assertFalse(status["launchable"])
            pair.wait_synced()
            code, words = pair.presync("launch", tiny.NAME)
            self.assertEqual(code, 1, words)
            self.assertIn("virtio-rng-pci at the source, none on the target", words)
            self.assertFalse(stopped(pair))

    def test_newer_qemu_takes_the_same_machine(self):
        """An alias of the machine's type is another machine there; its full name is the same."""
        binary, data_dirs = guest.qemu10()
        newer = {"qemu": binary, "data_dirs": data_dirs}
        code, words, _ = self.start({}, newer)
        self.assertEqual(code, 1, words)
        self.assertIn("machine type: pc-q35-7.2-machine at the source, pc-q35-10.0-machine", words)
        machine = {"machine": "pc-q35-7.2"}
        with tiny.Pair(source=machine, target={**machine, **newer}) as pair:
            code, words = pair.start("--wait")
            self.assertEqual(code, 0, words)
            code, words = pair.presync("launch", tiny.NAME, "--verify")
            self.assertEqual(code, 0, words)


if __name__ == "__main__":
    unittest.main()
