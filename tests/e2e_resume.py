#!/usr/bin/python3
"""A sync that goes on after presyncd, or the link, was gone: real QEMUs, real Linux guests, two presyncds between
two network namespaces.

    tests/e2e_resume.py [TestCase.test ...] [-v]     needs root; PRESYNC_BUILD names the build folder

Nobody types `presync start` after a restart, but where a test says so. Each time the guest, which rewrites checksummed memory all the while, is moved in the end, compared byte for byte, and
checks itself; and what had to be sent again is printed.
"""

import json
import os
import pathlib
import signal
import sys
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "tests"))
import e2e  # noqa: E402  (after the path is set)
from lab import hosts, presync  # noqa: E402

PAGE = 4096
# So that what the guest writes while presyncd is away is little beside its memory, on a slow machine too.
HAMMER = "presync.area_mb=8 presync.pages_s=500"


class Resuming(e2e.EndToEnd):
    def synced(self):
        move = self.move(self.spec(kernel_args=HAMMER))
        move.start()
        status = move.wait_synced()
        self.memory_bytes = status["pages"] * PAGE
        self.first_pass_bytes = status["wire_bytes"]
        self.assertEqual(status["resumption"]["from"], "")
        self.attached = self.waiting_pid(move)
        return move

    @staticmethod
    def waiting_pid(move):
        return move.target_daemon.guest_pids().get(presync.NAME)

    @staticmethod
    def start_by_hand(move, *arguments):
        """`presync start`; the reader goes on with the waiting QEMU that it has, if that is still the one."""
        return move.source_daemon.ask("start", presync.NAME, "--qmp", move.source.sockets.qmp[0], "--to", move.to, *arguments)

    @staticmethod
    def notes(move):
        """What the source's presyncd would start again."""
        return sorted(path.name for path in (move.source_daemon.folder / "state").glob("*.sync*"))

    def wait_status(self, move, wanted, seconds=30):
        deadline = time.monotonic() + seconds
        while not wanted(status := move.status()):
            self.assertLess(time.monotonic(), deadline, f"{status}\n{move.source_daemon.words()}")
            time.sleep(0.05)
        return status

    def wait_resumed(self, move, origin, count=1, seconds=60):
        """The sync goes on, from `origin`, and has caught up: what that took."""
        deadline = time.monotonic() + seconds
        while True:
            status = move.status()
            resumed = status["resumption"]
            if status["state"] == "syncing" and resumed["count"] >= count and resumed["caught_up"]:
                break
            self.assertLess(time.monotonic(), deadline, f"{status}\n{move.source_daemon.words()}")
            time.sleep(0.1)
        self.assertEqual(resumed["from"], origin, status)
        print(f"{self.id().split('.')[-1]}: went on from {origin}: {resumed['stale_pages']} pages stale,"
              f" {resumed['wire_bytes'] / 1e6:.2f} MB sent again, {resumed['hash_bytes'] / 1e6:.2f} MB of hashes;"
              f" the guest has {self.memory_bytes >> 20} MiB, its first pass took {self.first_pass_bytes / 1e6:.1f} MB",
              flush=True)
        self.assertLess(resumed["stale_pages"], status["pages"] / 10, "that is not what going on means")
        self.assertGreaterEqual(status["resent_bytes"], resumed["wire_bytes"] + resumed["hash_bytes"])
        return resumed

    def move_on(self, move):
        """Everything is there, and there only."""
        self.expect_unharmed(move)
        verified = move.source_daemon.ask("verify", presync.NAME)
        self.assertEqual(verified["pages_differing"], 0, verified)
        self.assertGreater(verified["pages_compared"], self.memory_bytes / PAGE / 2)
        if self.waiting_pid(move) != self.attached:
            move.reader.attach("target", move.target_agent)
        self.launch(move)

    def memory_files(self, move):
        return sorted(path.name for path in move.target_daemon.ram.glob("*"))


class ResumeTest(Resuming):
    def test_source_presyncd_killed(self):
        move = self.synced()
        move.source_daemon.kill()
        self.expect_unharmed(move)
        move.source_daemon.start()
        self.wait_resumed(move, "copy")
        self.move_on(move)

    def test_source_presyncd_upgraded(self):
        move = self.synced()
        self.assertEqual(self.notes(move), [f"{presync.NAME}.sync"])
        move.source_daemon.stop()
        self.assertEqual(self.notes(move), [f"{presync.NAME}.sync"])
        self.expect_unharmed(move)
        move.source_daemon.start()
        self.wait_resumed(move, "copy")
        self.move_on(move)
        self.assertEqual(self.notes(move), [], "it has moved")

    def test_started_by_hand_nevertheless(self):
        """Right after the restart, and again: it is the same sync. With other options it is not, and said so."""
        move = self.synced()
        move.source_daemon.kill()
        move.source_daemon.start()
        sessions = {self.start_by_hand(move)["session"] for _ in range(3)}
        self.assertEqual(len(sessions), 1)
        self.wait_resumed(move, "copy")
        self.assertEqual(move.status()["session"], sessions.pop())
        self.refused(move.source_daemon, "start", presync.NAME, "--qmp", move.source.sockets.qmp[0], "--to", move.to,
                     "--max-launch-time", "3s", words=["already", "other options", "presync stop"])
        self.move_on(move)

    def test_its_options_go_on_too(self):
        move = self.move(self.spec(kernel_args=HAMMER))
        move.start("--max-launch-time", "1700ms", "--transport", "tcp", "--compression", "none", "--dirty-log", "uffd-handler")
        move.wait_synced()
        move.source_daemon.kill()
        move.source_daemon.start()
        status = self.wait_status(move, lambda status: status["state"] == "syncing", 60)
        self.assertEqual((status["max_launch_ms"], status["dirty_log"], status["link"]), (1700, "uffd-handler", "tcp"))
        self.launch(move)

    def test_killed_again_and_again(self):
        """Also while it is about to go on."""
        move = self.synced()
        for seconds in (0, 0.05, 0.3, 1):
            move.source_daemon.kill()
            move.source_daemon.start()
            time.sleep(seconds)
        self.wait_resumed(move, "copy")
        self.move_on(move)

    def test_source_qemu_ended_meanwhile(self):
        """There is nothing to go on with: it is said, and not tried again."""
        move = self.synced()
        move.source_daemon.kill()
        move.source.process.kill()
        move.source.process.wait()
        move.source_daemon.start()
        status = self.wait_status(move, lambda status: status["state"] == "failed")
        self.assertIn("has ended", status["problem"])
        self.assertEqual(self.notes(move), [])
        move.source_daemon.stop()
        move.source_daemon.start()
        self.assertEqual(move.source_daemon.ask("status")["guests"], [])

    def test_killed_after_the_move(self):
        move = self.synced()
        self.launch(move)
        move.source_daemon.kill()
        self.assertEqual(self.notes(move), [])
        move.source_daemon.start()
        self.assertEqual(move.source_daemon.ask("status")["guests"], [])
        self.check_guest(move.reader)

    def test_killed_after_stop(self):
        move = self.synced()
        move.source_daemon.ask("stop", presync.NAME)
        move.source_daemon.kill()
        move.source_daemon.start()
        self.assertEqual(move.source_daemon.ask("status")["guests"], [])
        self.expect_unharmed(move)

    def test_target_presyncd_killed(self):
        move = self.synced()
        move.target_daemon.kill()
        self.expect_unharmed(move)
        move.target_daemon.start()
        resumed = self.wait_resumed(move, "ledger")
        self.assertEqual(resumed["hash_bytes"], 0)
        self.move_on(move)

    def test_target_presyncd_upgraded(self):
        move = self.synced()
        files = self.memory_files(move)
        move.target_daemon.stop()
        self.assertEqual(self.memory_files(move), files, "its memory waits")
        self.expect_unharmed(move)
        move.target_daemon.start()
        self.wait_resumed(move, "ledger")
        self.move_on(move)

    def test_both_killed(self):
        move = self.synced()
        move.source_daemon.kill()
        move.target_daemon.kill()
        self.expect_unharmed(move)
        # The source's comes first, and has nobody to talk to: as a running sync would.
        move.source_daemon.start()
        self.wait_status(move, lambda status: status["state"] == "connecting" and "refused" in status["problem"])
        move.target_daemon.start()
        self.wait_resumed(move, "copy")
        self.move_on(move)

    def test_link_down(self):
        move = self.synced()
        move.two.link_down()
        time.sleep(10)
        self.expect_unharmed(move)
        move.two.link_up()
        deadline = time.monotonic() + 60
        while move.status()["reconnects"] == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        if move.status()["reconnects"] > 0:  # else TCP outlasted it
            self.wait_resumed(move, "ledger")
        self.move_on(move)

    def test_the_waiting_qemu_killed(self):
        """Its memory outlives it, but nobody knows what it did to that before it ended: the copy is proven."""
        move = self.synced()
        os.kill(move.target_daemon.guest_pids()[presync.NAME], signal.SIGKILL)
        self.expect_unharmed(move)
        self.wait_resumed(move, "copy")
        self.move_on(move)

    def test_stopped_by_a_person(self):
        """Then nothing is kept."""
        move = self.synced()
        move.source_daemon.ask("stop", presync.NAME)
        deadline = time.monotonic() + 30
        while self.memory_files(move):
            self.assertLess(time.monotonic(), deadline, "the target's memory is free")
            time.sleep(0.1)
        self.start_by_hand(move)
        self.assertEqual(move.wait_synced()["resumption"]["count"], 0)
        self.move_on(move)

    def test_a_guest_that_moved_is_no_copy(self):
        """The target's presyncd is killed after a move: the guest that runs there is nobody's copy."""
        move = self.synced()
        self.launch(move)
        files = self.memory_files(move)
        move.target_daemon.kill()
        move.target_daemon.start()
        self.assertEqual(move.target_daemon.ask("status")["incoming"], [])
        self.assertEqual(self.memory_files(move), files)
        beat = move.reader.wait_beat("target", 30)
        self.assertGreater(move.reader.wait_beat("target", 30).number, beat.number)
        self.check_guest(move.reader)


class VerifyTest(Resuming):
    """A page of the target's memory is spoiled behind presync's back: found, named, mended."""

    def spoil(self, move, page):
        path, = move.target_daemon.ram.glob("*.ram")
        with open(path, "r+b", buffering=0) as file:
            file.seek(page * PAGE)
            old = file.read(PAGE)
            file.seek(page * PAGE)
            file.write(bytes(byte ^ 0xff for byte in old))

    def verify(self, move):
        done = move.source_daemon.run("verify", presync.NAME, "--json", capture_output=True, text=True)
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    def test_a_spoiled_page(self):
        move = self.move(self.spec(), defaults={"audit_rate": "0"})
        move.start()
        pages = move.wait_synced()["pages"]
        code, report = self.verify(move)
        self.assertEqual((code, report["pages_differing"]), (0, 0), report)
        self.assertGreater(report["pages_compared"], pages / 2)
        # A page that happens to be stale is left aside, and sent some time: of eight some are not.
        spoiled = self.somewhere(pages)
        for page in spoiled:
            self.spoil(move, page)
        code, report = self.verify(move)
        self.assertEqual(code, 1, report)
        self.assertEqual(report["pages_differing"], len(report["differing"]), report)
        self.assertTrue(report["differing"] and set(report["differing"]) <= set(spoiled), report)
        self.assertIn("DIFFER", move.source_daemon.words())
        self.assertEqual(move.status()["pages_differing"], report["pages_differing"])
        self.assertIn("sent again", move.source_daemon.words())
        self.launch(move)  # which compares every page, the mended ones among them

    @staticmethod
    def somewhere(pages):
        return [pages // 2 + i * (pages // 20) for i in range(8)]

    def test_the_audit_finds_it(self):
        move = self.move(self.spec(), defaults={"audit_rate": "200MB"})
        move.start()
        pages = move.wait_synced()["pages"]
        spoiled = self.somewhere(pages)
        for page in spoiled:
            self.spoil(move, page)
        deadline = time.monotonic() + 120
        while move.status()["pages_differing"] == 0:
            self.assertLess(time.monotonic(), deadline, move.status())
            time.sleep(0.2)
        audits = move.status()["audit"]["audits"]
        while move.status()["audit"]["audits"] < audits + 2:
            self.assertLess(time.monotonic(), deadline, move.status())
            time.sleep(0.2)
        status = move.status()
        self.assertLessEqual(status["pages_differing"], len(spoiled), status)
        self.assertEqual(status["audit"]["pages_differing"], 0, "mended")
        self.assertIn("DIFFER", move.source_daemon.words(60))
        self.launch(move)

    def test_what_the_audit_costs(self):
        """At its default: both presyncds together, an idle sync with the audit and one without."""
        used = {}
        for rate in ("0", "4MB"):
            spec = self.spec(kernel_args="presync.area_mb=24 presync.pages_s=0")
            with presync.run_folder() as folder, hosts.TwoHosts() as two, \
                    presync.Move(two, folder, spec, defaults={"audit_rate": rate}) as move:
                move.start()
                move.wait_synced()
                time.sleep(3)
                daemons = (move.source_daemon, move.target_daemon)
                before = [self.cpu_seconds(daemon.process.pid) for daemon in daemons]
                time.sleep(20)
                used[rate] = [self.cpu_seconds(d.process.pid) - b for d, b in zip(daemons, before)]
                self.assertEqual(move.status()["pages_differing"], 0)
        print(f"processor time in 20 s, source and target: without audit {used['0']}, with {used['4MB']}", flush=True)

    @staticmethod
    def cpu_seconds(pid):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    hosts.leave_on_sigterm()
    unittest.main()
