#!/usr/bin/python3
"""presync with guests that libvirt manages: two libvirtds, two presyncds, a real guest between them.

    tests/libvirt.py [TestCase.test ...] [-v]     needs root; PRESYNC_BUILD names the build folder

Every guest writes to memory and to its disk the whole time, and checks both. PRESYNC_LIBVIRT_MOVES sets how many moves in a row
are made (20). The two hosts are network and mount namespaces with a libvirtd each (tools/lab/libvirt.py); QEMU is unprivileged
and sandboxed.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import guest, libvirt, presync  # noqa: E402  (after the path is set)

MOVES = int(os.environ.get("PRESYNC_LIBVIRT_MOVES", "20"))
HAMMER = "presync.area_mb=24 presync.pages_s=4000"
NAME = libvirt.NAME
OTHER = {"source": "target", "target": "source"}
SLOW_MBIT = 1  # what is left when the guest has stopped takes seconds at this rate


class Lab:
    """Two hosts and a guest. `here`: the host where it runs."""

    def __init__(self, stack, presync_xml=True, hook=True, settings=None):
        self.folder = stack.enter_context(presync.run_folder())
        self.two = stack.enter_context(libvirt.LibvirtHosts(self.folder, hook=hook))
        self.daemons = {host: stack.enter_context(libvirt.daemon(self.two, host, **(settings or {})))
                        for host in self.two.hosts}
        image = guest.image_for("hammer")
        disk = guest.copy_data_disk(image, self.folder)
        os.chown(disk, libvirt.QEMU_USER, libvirt.QEMU_USER)
        self.spec = guest.GuestSpec(image=image, data_disk=disk, workload="hammer", kernel_args=HAMMER)
        self.here = "source"
        self.two.define(self.here, libvirt.domain_xml(self.spec, self.two, presync=presync_xml))
        self.two.virsh(self.here, "start", NAME)
        self.reader = stack.enter_context(guest.BeatReader(source=self.two.agent("source")))
        self.reader.wait_beat("source", 240)

    @property
    def there(self):
        return OTHER[self.here]

    @property
    def daemon(self):
        return self.daemons[self.here]

    def start(self, *arguments):
        return self.daemon.ask("start", "--domain", NAME, "--to", f"{self.two.address[self.there]}:{presync.PORT}", *arguments)

    def ensure_sync(self):
        """There is a sync, by whomever it was begun."""
        if not (status := self.status()) or status["state"] in ("moved", "failed", "stopped"):
            with contextlib.suppress(presync.Refused):  # somebody was faster; else wait_state says so
                self.start()

    def status(self):
        return next((g for g in self.daemon.ask("status")["guests"] if g["name"] == NAME), None)

    def wait_state(self, *states, seconds=120):
        deadline = time.monotonic() + seconds
        while True:
            status = self.status()
            if status and status["state"] in states:
                return status
            if time.monotonic() > deadline:
                raise AssertionError(f"not {states}, but: {status}\n{self.words()}")
            time.sleep(0.05)

    def words(self):
        return "\n".join(f"=== {host}\n{self.daemons[host].words(25)}\n{self.two.words(host)}" for host in self.two.hosts)

    def virsh_arguments(self, *more, uri=None, how=("--live", "--p2p")):
        """Of a `virsh migrate` that an operator types."""
        stream = f"unix:///run/presync/libvirt/libvirt-{libvirt.UUID}.stream" if uri is None else uri
        return ["migrate", *how, "--unsafe", "--persistent", "--undefinesource", NAME,
                self.two.peer_uri(self.there), "--migrateuri", stream, *more]

    def mark(self):
        """What comes now is about one launch: no beat on the other host is to be missed, where QEMU is yet to be started."""
        self.reader.mark()
        there = self.there
        self._attaching = threading.Thread(target=self._attach, args=(there,), daemon=True)
        self._attaching.start()

    def _attach(self, there):
        with contextlib.suppress(guest.AgentError):
            self.reader.attach(there, self.two.agent(there), 120)

    def attached(self):
        self._attaching.join(30)

    def turn(self):
        """The guest has moved."""
        self.here = self.there

    def presync(self, host, *arguments):
        """What a person types there; the exit code and all that it prints."""
        done = self.daemons[host].run(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout


class LibvirtTest(unittest.TestCase):
    """What the tests have in common."""

    @classmethod
    def setUpClass(cls):
        if why := libvirt.available():
            raise unittest.SkipTest(why)
        cls.stack = contextlib.ExitStack()
        cls.addClassCleanup(cls.stack.close)

    def check_guest(self, lab):
        answer = lab.reader.command("check", 120)
        bad = {k: v for k, v in answer.items() if k.endswith(("_bad", "_errors", "_dropped")) and v}
        self.assertEqual(bad, {}, answer)
        return answer

    def expect_moved(self, lab, before):
        """The guest runs there, whole, and only there; libvirt knows it. Turns the lab around."""
        lab.attached()
        lab.reader.wait_beat(lab.there, 60)
        after = self.check_guest(lab)
        beats = lab.reader.result()
        self.assertTrue(beats.clean(), beats)
        self.assertGreater(after["counter"], before["counter"])
        self.assertGreater(after["file_records"], before["file_records"])
        self.assertEqual(lab.two.state(lab.there), "running")
        self.assertIn(lab.two.state(lab.here), ("", "shut off"))
        self.assertEqual(lab.two.qemu_pids(lab.here), [])
        self.assertEqual(lab.two.left_over(lab.here), [])
        lab.turn()
        return beats

    def launch(self, lab, *arguments):
        before = self.check_guest(lab)
        lab.mark()
        report = lab.daemon.ask("launch", NAME, "--wait", *arguments)
        return report, self.expect_moved(lab, before)

    def move_plainly(self, lab, *how):
        """Without presync."""
        before = self.check_guest(lab)
        lab.mark()
        lab.two.virsh(lab.here, *lab.virsh_arguments(uri=f"tcp:{lab.two.address[lab.there]}", how=how or ("--live", "--p2p")))
        lab.attached()
        lab.reader.wait_beat(lab.there, 60)
        after = lab.reader.command("check", 120)
        self.assertGreater(after["counter"], before["counter"])
        self.assertEqual(lab.two.state(lab.there), "running")
        self.assertEqual(lab.two.state(lab.here), "")
        lab.turn()


class MoveTest(LibvirtTest):
    """To and fro, again and again, by presync launch and by virsh migrate in turns."""

    def test_to_and_fro(self):
        lab = Lab(self.stack)
        launches, stops, gaps = [], [], []
        for number in range(MOVES):
            lab.start()
            lab.wait_state("syncing")
            if number % 4 == 3:  # an operator's own way
                before = self.check_guest(lab)
                lab.mark()
                lab.two.virsh(lab.here, *lab.virsh_arguments())
                beats = self.expect_moved(lab, before)
                report = lab.daemons[lab.there].ask("report", NAME)["launches"][-1]
                self.assertNotIn("error", report)
            else:
                report, beats = self.launch(lab, *(["--verify"] if number % 2 == 0 else []))
                if number % 2 == 0:
                    self.assertEqual(report["pages_differing"], 0)
                    self.assertGreater(report["pages_compared"], 0)
                else:
                    stops.append(report["downtime_ms"])
            launches.append(report["launch_ms"])
            gaps.append(beats.switch_ms)
        plain = self.plain(lab)
        print(f"{MOVES} moves: launch median {statistics.median(launches):.0f} ms, worst {max(launches):.0f}; stopped (not verified)"
              f" median {statistics.median(stops):.0f} ms, worst {max(stops):.0f}; between two beats median"
              f" {statistics.median(gaps):.0f} ms, worst {max(gaps):.0f}. Plain virsh migrate: stopped {plain} ms")

    def plain(self, lab):
        """What a plain virsh migrate of the same guest over the same link stops it for, by libvirt's own account."""
        lab.two.virsh(lab.here, *lab.virsh_arguments(uri=f"tcp:{lab.two.address[lab.there]}"))
        lab.turn()
        for line in lab.two.virsh(lab.here, "domjobinfo", NAME, "--completed").splitlines():
            if line.startswith("Total downtime:"):
                return int(line.split()[2])
        return None


class DirectTest(LibvirtTest):
    """presyncd, or virsh, talks to both libvirts: migration = "direct", virsh migrate without --p2p."""

    def test_moves(self):
        lab = Lab(self.stack, settings={"libvirt": {"migration": "direct"}})
        lab.start()
        lab.wait_state("syncing")
        report, _ = self.launch(lab, "--verify")
        self.assertEqual(report["pages_differing"], 0)
        lab.start()
        lab.wait_state("syncing")
        before = self.check_guest(lab)
        lab.mark()
        lab.two.virsh(lab.here, *lab.virsh_arguments(how=("--live",)))
        self.expect_moved(lab, before)
        lab.start()
        lab.wait_state("syncing")
        lab.two.kill_libvirtd(lab.there)
        with self.assertRaisesRegex(presync.Refused, "libvirt"):
            lab.daemon.ask("launch", NAME)
        lab.two.start_libvirtd(lab.there)
        self.assertEqual(lab.two.state(lab.here), "running")
        lab.wait_state("syncing")
        self.launch(lab)


class FailureTest(LibvirtTest):
    """Whatever fails: one guest that runs, libvirt of the same mind, nothing left there, and the next launch works."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.lab = Lab(cls.stack)

    def setUp(self):
        self.lab.two.set_rate(1000)
        for daemon in self.lab.daemons.values():  # a test that failed may have left it so
            if daemon.process.poll() is not None:
                daemon.start()
        self.lab.ensure_sync()
        self.lab.wait_state("syncing")

    def expect_here(self, seconds=60):
        """The guest goes on here as if nothing had happened, and nothing of it is there but its mirror."""
        lab = self.lab
        deadline = time.monotonic() + seconds
        while (lab.two.state(lab.here) != "running" or lab.two.state(lab.there) not in ("", "shut off")
               or lab.two.qemu_pids(lab.there)):
            self.assertLess(time.monotonic(), deadline, (lab.two.state(lab.here), lab.two.state(lab.there), lab.words()))
            time.sleep(0.2)
        lab.reader.wait_beat(lab.here, 30)
        self.check_guest(lab)
        self.assertEqual(len(lab.two.qemu_pids(lab.here)), 1)
        capabilities = json.loads(lab.two.virsh(lab.here, "qemu-monitor-command", NAME,
                                                '{"execute": "query-migrate-capabilities"}'))["return"]
        deadline = time.monotonic() + 10
        while {"capability": "x-ignore-shared", "state": True} in capabilities:
            self.assertLess(time.monotonic(), deadline, "RAM would be missing in a virsh save")
            time.sleep(0.2)
            capabilities = json.loads(lab.two.virsh(lab.here, "qemu-monitor-command", NAME,
                                                    '{"execute": "query-migrate-capabilities"}'))["return"]

    def expect_retry_works(self):
        self.lab.two.set_rate(1000)
        self.lab.ensure_sync()
        self.lab.wait_state("syncing")
        self.launch(self.lab, "--verify")

    def fails(self, *arguments):
        """A launch that has to fail; its words."""
        with self.assertRaises(presync.Refused) as caught:
            self.lab.daemon.ask("launch", NAME, *arguments)
        return str(caught.exception)

    def migrate_slowly(self, *more):
        """virsh migrate, up to where the guest stands still and presync has its device state."""
        lab = self.lab
        lab.two.set_rate(SLOW_MBIT)
        virsh = lab.two.start_virsh(lab.here, *lab.virsh_arguments(*more))
        deadline = time.monotonic() + 60
        while lab.status()["state"] != "launching" or lab.two.state(lab.here) != "paused":
            self.assertLess(time.monotonic(), deadline, lab.words())
            self.assertIsNone(virsh.poll(), virsh.stderr.read() if virsh.poll() is not None else "")
            time.sleep(0.02)
        return virsh

    def expect_failed(self, virsh, seconds=90):
        _, errors = virsh.communicate(timeout=seconds)
        self.assertNotEqual(virsh.returncode, 0, "the migration had to fail")
        return errors

    def moved_or_here(self, virsh, before):
        lab = self.lab
        virsh.communicate(timeout=90)
        if virsh.returncode == 0:
            self.expect_moved(lab, before)
            lab.two.set_rate(1000)
            lab.start()
            return
        if lab.two.state(lab.here) == "paused":  # by virsh, as asked
            lab.two.virsh(lab.here, "resume", NAME)
        self.expect_here()

    def test_hook_missing(self):
        lab = self.lab
        lab.two.remove_hook(lab.there)
        self.addCleanup(lab.two.install_hook, lab.there)
        self.fails()
        self.expect_here()
        lab.two.install_hook(lab.there)
        self.expect_retry_works()

    def test_target_libvirtd_gone(self):
        lab = self.lab
        lab.two.kill_libvirtd(lab.there)
        self.assertIn("libvirt", self.fails())
        lab.two.start_libvirtd(lab.there)
        self.expect_here()
        self.expect_retry_works()

    def test_target_libvirtd_gone_while_the_guest_stands_still(self):
        lab = self.lab
        virsh = self.migrate_slowly()
        lab.two.kill_libvirtd(lab.there)
        self.expect_failed(virsh)
        lab.two.start_libvirtd(lab.there)
        self.expect_here()
        self.expect_retry_works()

    def test_capability_on_one_side_only(self):
        """A migration past presync's gate: RAM is left out on the source, and QEMU on the target knows nothing of it."""
        lab = self.lab
        done = lab.two.try_virsh(lab.here, *lab.virsh_arguments(uri=f"tcp:{lab.two.address[lab.there]}"))
        self.assertNotEqual(done.returncode, 0, "half a guest was let through")
        self.expect_here()
        self.expect_retry_works()

    def test_disk_not_shared(self):
        lab = self.lab
        lab.two.run(lab.there, ["mount", "--bind", "/dev/null", lab.spec.data_disk])
        try:
            self.fails()
        finally:
            lab.two.run(lab.there, ["umount", lab.spec.data_disk])
        self.expect_here()
        self.expect_retry_works()

    def test_link_lost_after_the_guest_stopped(self):
        lab = self.lab
        virsh = self.migrate_slowly()
        lab.two.link_down()
        try:
            self.expect_failed(virsh)
            self.assertEqual(lab.two.state(lab.here), "running", "the guest had to go on without the link")
        finally:
            lab.two.link_up()
        self.expect_here()
        self.expect_retry_works()

    def test_virsh_timeout(self):
        """Time is up while the guest stands still: one way or the other, it runs once."""
        lab = self.lab
        before = self.check_guest(lab)
        lab.mark()
        virsh = self.migrate_slowly("--timeout", "1")
        self.moved_or_here(virsh, before)
        self.expect_retry_works()

    def test_domjobabort_before_the_guest_stops(self):
        lab = self.lab
        marker = lab.two.run_presync(lab.there) / "libvirt" / f"libvirt-{libvirt.UUID}.qmp"
        virsh = lab.two.start_virsh(lab.here, *lab.virsh_arguments())
        deadline = time.monotonic() + 60
        while not marker.exists():  # QEMU is started on the target
            self.assertLess(time.monotonic(), deadline, lab.words())
            time.sleep(0.002)
        lab.two.virsh(lab.here, "domjobabort", NAME)
        self.expect_failed(virsh)
        self.expect_here()
        self.expect_retry_works()

    def test_domjobabort_while_the_guest_stands_still(self):
        """QEMU has saved all: libvirt may call it off, or too late. Either way the guest runs once."""
        lab = self.lab
        before = self.check_guest(lab)
        lab.mark()
        virsh = self.migrate_slowly()
        lab.two.try_virsh(lab.here, "domjobabort", NAME)
        self.moved_or_here(virsh, before)
        self.expect_retry_works()

    def test_target_presyncd_gone(self):
        lab = self.lab
        virsh = self.migrate_slowly()
        lab.daemons[lab.there].kill()
        self.expect_failed(virsh)
        self.expect_here()
        lab.daemons[lab.there].start()
        self.expect_retry_works()

    def test_source_presyncd_gone(self):
        """Its sync goes on by itself."""
        lab = self.lab
        lab.daemon.kill()
        self.expect_here()
        lab.daemon.start()
        status = lab.wait_state("syncing")
        self.assertEqual(status["resumption"]["from"], "copy", status)
        self.assertEqual(lab.start()["session"], lab.status()["session"], "typed nevertheless: it is the same")
        self.expect_retry_works()

    def test_libvirtd_not_up_yet(self):
        lab = self.lab
        lab.daemon.kill()
        lab.two.kill_libvirtd(lab.here)
        lab.daemon.start()
        deadline = time.monotonic() + 30
        while "libvirt" not in (status := lab.status())["problem"]:
            self.assertLess(time.monotonic(), deadline, status)
            time.sleep(0.05)
        self.assertEqual(status["state"], "connecting")
        lab.two.start_libvirtd(lab.here)
        lab.wait_state("syncing")
        self.expect_here()
        self.expect_retry_works()

    def restart_target_presyncd(self, end):
        lab = self.lab
        daemon = lab.daemons[lab.there]
        end(daemon)
        self.assertEqual(lab.two.state(lab.here), "running")
        # The hook refuses, or (nothing is mirrored there any more) the source takes no stream.
        self.assertNotEqual(lab.two.try_virsh(lab.here, *lab.virsh_arguments()).returncode, 0)
        self.expect_here()
        daemon.start()
        # All memory is sent again, until then the launch is refused or fails, and changes nothing.
        lab.two.try_virsh(lab.here, *lab.virsh_arguments())
        self.assertEqual((lab.two.state(lab.here), lab.two.state(lab.there)), ("running", ""), lab.words())
        lab.wait_state("syncing")
        self.expect_here()
        self.assertEqual([m.suffix for m in lab.two.run_presync(lab.there).glob(f"libvirt/{libvirt.UUID}.*")], [".mirrored"])
        self.expect_retry_works()

    def test_target_presyncd_killed_while_synced(self):
        self.restart_target_presyncd(lambda daemon: daemon.kill())

    def test_target_presyncd_stopped_while_synced(self):
        self.restart_target_presyncd(lambda daemon: daemon.stop())

    def test_source_presyncd_gone_while_the_guest_stands_still(self):
        lab = self.lab
        virsh = self.migrate_slowly()
        lab.daemon.kill()
        self.expect_failed(virsh)
        self.assertEqual(lab.two.state(lab.here), "running", lab.words())
        lab.daemon.start()
        self.expect_here()
        self.expect_retry_works()

    def test_an_old_record_and_a_domain_that_leaves(self):
        """A presyncd that finds the record of a launch that never was must not end the guest, which came and leaves without it."""
        lab = self.lab
        virsh = self.migrate_slowly()
        records = lab.daemons[lab.there].folder / "state"
        deadline = time.monotonic() + 60
        while not any(path.read_bytes().strip(b"\0") for path in records.glob("*.target")):  # it waits, in writing
            self.assertLess(time.monotonic(), deadline, lab.words())
            time.sleep(0.05)
        lab.daemons[lab.there].kill()
        self.expect_failed(virsh)
        self.expect_here()
        lab.two.set_rate(1000)
        with contextlib.suppress(presync.Refused):
            lab.daemon.ask("stop", NAME)
        (lab.two.run_presync(lab.there) / "libvirt" / f"{libvirt.UUID}.mirrored").unlink()  # as the hook says
        self.move_plainly(lab, "--p2p")  # the guest stands still: see docs/libvirt.md, "Limits"
        lab.two.set_rate(100)
        virsh = lab.two.start_virsh(lab.here, *lab.virsh_arguments(uri=f"tcp:{lab.two.address[lab.there]}", how=("--p2p",)))
        deadline = time.monotonic() + 60
        while lab.two.state(lab.here) != "paused":  # as libvirt says of one that comes, too
            self.assertLess(time.monotonic(), deadline, lab.words())
            self.assertIsNone(virsh.poll(), virsh.stderr.read() if virsh.poll() is not None else "")
            time.sleep(0.02)
        lab.daemon.start()
        open_matters = lab.daemon.ask("status")["open_matters"]
        self.assertEqual([m["phase"] for m in open_matters], ["waiting"], lab.words())
        self.assertIn("it leaves", open_matters[0]["known"])
        self.assertFalse(open_matters[0]["for_a_person"])
        virsh.communicate(timeout=120)
        self.assertEqual(virsh.returncode, 0, lab.words())
        deadline = time.monotonic() + 20
        while lab.daemon.ask("status")["open_matters"]:
            self.assertLess(time.monotonic(), deadline, lab.daemon.ask("status")["open_matters"])
            time.sleep(0.2)
        lab.turn()
        lab.reader.attach(lab.here, lab.two.agent(lab.here), 60)
        self.expect_here()
        self.expect_retry_works()

    def test_sync_not_ready(self):
        lab = self.lab
        lab.daemon.ask("stop", NAME)
        lab.two.set_rate(20)
        lab.start()
        done = lab.two.try_virsh(lab.here, *lab.virsh_arguments())
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("presync", done.stderr)
        self.expect_here()
        self.expect_retry_works()


class UnknownGuestTest(LibvirtTest):
    """A guest that presync does not manage starts and migrates as without presync, with the hook installed."""
    def test_moves_and_starts(self):
        # QEMU 7.2 loses writes of a guest that TCG runs while it is migrated (tools/lab/guest.py).
        how = ("--live", "--p2p") if guest.kvm_usable() else ("--p2p",)
        lab = Lab(self.stack, presync_xml=False)
        self.move_plainly(lab, *how)
        for daemon in lab.daemons.values():
            daemon.stop()
        self.move_plainly(lab, *how)
        lab.two.virsh(lab.here, "destroy", NAME)
        lab.two.virsh(lab.here, "start", NAME)
        self.assertEqual(lab.two.state(lab.here), "running")


class ReadyTest(LibvirtTest):
    """From a domain that knows nothing of presync to one that was moved, as docs/libvirt.md has it; and what doctor says on the way."""

    def doctor(self, lab, host, *arguments):
        """{what: [(level, detail, remedy)]}"""
        code, text = lab.presync(host, "doctor", *arguments, "--json")
        findings = {}
        for finding in json.loads(text.splitlines()[-1]):
            findings.setdefault(finding["what"], []).append((finding["level"], finding["detail"], finding["remedy"]))
        problems = [f for group in findings.values() for f in group if f[0] == "problem"]
        self.assertEqual(code, 1 if problems else 0, text)
        return findings

    def expect_problem(self, findings, what, *words):
        level, detail, remedy = findings[what][0]
        self.assertEqual(level, "problem", findings)
        self.assertNotEqual(remedy, "", detail)
        for word in words:
            self.assertIn(word, f"{detail} -> {remedy}")

    def expect_ready(self, findings, *what):
        for each in what:
            self.assertEqual({f[0] for f in findings[each]}, {"ok"}, findings)

    def xml(self, lab, *arguments, code=0):
        got, text = lab.presync(lab.here, "libvirt", "xml", *arguments)
        self.assertEqual(got, code, text)
        print(f"# presync libvirt xml {' '.join(arguments)}\n{text}")
        return text

    def test_from_nothing_to_moved(self):
        lab = Lab(self.stack, presync_xml=False)
        for host in lab.two.hosts:
            self.expect_ready(self.doctor(lab, host), "libvirt", "QEMU", "memory", "hook", "sockets", "plug-in", "AppArmor")
        self.expect_problem(self.doctor(lab, lab.here, "--domain", NAME), "domain", "presync libvirt xml")
        self.expect_problem(self.doctor(lab, lab.there, "--domain", NAME), "domain", "virsh list", "leave --domain out")
        with self.assertRaisesRegex(presync.Refused, "presync libvirt xml"):
            lab.start()
        self.assertIn("-plugin", self.xml(lab, NAME, code=1))
        text = self.xml(lab, NAME, "--apply")
        self.assertIn(f"virsh shutdown {NAME}", text)
        self.assertIn("This host has what else is needed", text)
        self.assertEqual(lab.two.state(lab.here), "running", "a guest that runs is not touched")
        self.expect_problem(self.doctor(lab, lab.here, "--domain", NAME), "domain", "its next start", "virsh start")
        self.assertIn("has all", self.xml(lab, NAME))
        lab.two.virsh(lab.here, "destroy", NAME)
        lab.two.virsh(lab.here, "start", NAME)
        lab.reader.mark()
        lab.reader.attach(lab.here, lab.two.agent(lab.here), 30)
        lab.reader.wait_beat(lab.here, 240)
        self.assertNotIn("virsh shutdown", self.xml(lab, NAME, "--apply"), "it has it already")
        self.expect_ready(self.doctor(lab, lab.here, "--domain", NAME), "domain", "QEMU", "dirty log")
        lab.start("--wait")
        print(lab.presync(lab.here, "doctor", "--domain", NAME)[1], lab.presync(lab.there, "doctor", "--domain", NAME)[1], sep="\n")
        here, there = (self.doctor(lab, host, "--domain", NAME) for host in (lab.here, lab.there))
        self.expect_ready(here, "domain", "guest")
        self.assertIn("syncing", here["guest"][0][1])
        self.expect_ready(there, "domain")
        self.assertIn("is mirrored here", there["domain"][0][1])
        self.launch(lab, "--verify")
        self.expect_ready(self.doctor(lab, lab.here, "--domain", NAME), "domain", "dirty log")
        self.whatever_is_missing(lab)
        self.memory_that_cant_be_mirrored(lab)

    def whatever_is_missing(self, lab):
        """Each piece of a host taken away by itself; the guest runs on."""
        host, two = lab.here, lab.two
        hook = two.folder(host) / "etc" / "hooks" / "qemu.d" / "presync"
        hook.chmod(0o644)
        self.expect_problem(self.doctor(lab, host), "hook", "can't be executed", "chmod 755")
        two.remove_hook(host)
        self.expect_problem(self.doctor(lab, host), "hook", "presync-libvirt")
        self.assertRegex(self.xml(lab, NAME, "--apply"), r"This host lacks:\nproblem +hook")
        two.install_hook(host)
        conf = two.folder(host) / "etc" / "qemu.conf"
        text = conf.read_text(encoding="ascii")
        conf.write_text(text.replace(f"{two.folder(host)}/memory", "/var/lib/libvirt/qemu/ram"), encoding="ascii")
        self.expect_problem(self.doctor(lab, host), "memory", "/var/lib/libvirt/qemu/ram", "restart libvirtd")
        conf.write_text(text, encoding="ascii")
        if pathlib.Path("/etc/apparmor.d").is_dir():
            two.run(host, ["sh", "-c", "mount -t tmpfs tmpfs /etc/apparmor.d && cd /etc/apparmor.d && "
                           "mkdir -p abstractions local/abstractions && touch abstractions/libvirt-qemu"])
            self.expect_problem(self.doctor(lab, host), "AppArmor", "presync-libvirt")
            two.run(host, ["sh", "-c", "touch /etc/apparmor.d/abstractions/presync-libvirt"])
            self.expect_problem(self.doctor(lab, host), "AppArmor", "does not include")
            two.run(host, ["sh", "-c", "echo '#include if exists <abstractions/presync-libvirt>' "
                           ">/etc/apparmor.d/local/abstractions/libvirt-qemu"])
        self.expect_ready(self.doctor(lab, host), "libvirt", "QEMU", "memory", "hook", "sockets", "plug-in", "AppArmor")
        two.kill_libvirtd(host)
        self.expect_problem(self.doctor(lab, host), "libvirt", "libvirtd")
        two.start_libvirtd(host)
        self.assertEqual(two.state(host), "running")

    def memory_that_cant_be_mirrored(self, lab):
        """Refused before anything is done, with the reason."""
        two, host = lab.two, lab.here
        other = "11111111-2222-3333-4444-555555555555"
        plain = libvirt.domain_xml(lab.spec, two, name="other", uuid=other)
        ours = "<source type='file'/>"
        self.assertEqual(plain.count(ours), 1)
        two.define(host, plain.replace(ours, "<hugepages/>"))
        self.expect_problem(self.doctor(lab, host, "--domain", "other"), "domain", "huge pages", "take <hugepages/> out")
        self.assertIn("huge pages", self.xml(lab, "other", "--apply", code=1))
        self.assertIn("<hugepages/>", two.virsh(host, "dumpxml", "other"), "what is refused is not changed")
        two.define(host, plain.replace(ours, "<source type='memfd'/>"))
        self.expect_problem(self.doctor(lab, host, "--domain", "other"), "domain", "memfd", "<source type='file'/>")
        two.virsh(host, "start", "other")
        self.addCleanup(two.try_virsh, host, "destroy", "other")
        with self.assertRaisesRegex(presync.Refused, "memfd.*<source type='file'/>"):
            lab.daemon.ask("start", "--domain", "other", "--to", f"{two.address[lab.there]}:{presync.PORT}")
        self.xml(lab, "other", "--apply")  # what may run so until its next start is no longer a memfd then
        self.assertNotIn("memfd", two.virsh(host, "dumpxml", "other", "--inactive"))


if __name__ == "__main__":
    unittest.main()
