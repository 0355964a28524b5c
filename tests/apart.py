#!/usr/bin/python3
"""What a QEMU that presyncd started can reach once its guest has taken it over: its own guest, and nothing else.

    tests/apart.py [TestCase.test ...] [-v]     needs root; PRESYNC_BUILD names the build folder

A presyncd with a user of its own and the capabilities of its unit, on loopback, and real QEMUs with guests without a system. What the
QEMU would do is done by processes with its user, groups and (no) capabilities.

    PRESYNC_BEFORE=BUILD tests/apart.py UpgradeTest -v     BUILD: the build folder of an earlier version
"""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import hosts, presync, qmp, tiny  # noqa: E402  (after the path is set)

OWN_USER = 64124  # presyncd's; nobody's otherwise
QEMU_USERS = range(64200, 64210)
UNIT = (ROOT / "tools" / "presyncd" / "presyncd.service").read_text(encoding="utf-8")
OTHER = "other"  # a second guest


def capabilities():
    """Those that the unit gives presyncd, as setpriv writes them."""
    names = re.search(r"^AmbientCapabilities=(.*)$", UNIT, re.M)[1].split()
    return "-all," + ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in names)


def status_of(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


class ApartPair(tiny.Pair):
    """Its target's presyncd has a user of its own, and two guests may come there."""

    def __enter__(self):
        super().__enter__()
        with contextlib.ExitStack() as undo:
            undo.push(self)
            self.folder.chmod(0o711)
            self.target.stop()
            self._become_own_user()
            self._start_other()
            undo.pop_all()
        return self

    def _become_own_user(self):
        target = self.target
        shutil.rmtree(target.ram, ignore_errors=True)
        shutil.rmtree(target.folder / "state", ignore_errors=True)
        shutil.rmtree(target.folder / "run", ignore_errors=True)
        plugin = shutil.copy(presync.plugin_path(), self.folder)  # where every user finds it
        config = target.config.read_text(encoding="utf-8").replace(presync.plugin_path(), plugin)
        command = re.search(rf"^\[guest.{tiny.NAME}\]\n(.*)$", config, re.M)[1]
        config = self._settings(config) + f"[guest.{OTHER}]\n{command}\n"
        target.config.write_text(config, encoding="utf-8")
        target.prefix = ["setpriv", f"--reuid={OWN_USER}", f"--regid={OWN_USER}", "--clear-groups",
                         f"--bounding-set={capabilities()}", f"--inh-caps={capabilities()}", f"--ambient-caps={capabilities()}",
                         "--no-new-privs"]
        os.chmod(target.folder, 0o711)
        for path in (target.folder, *target.folder.iterdir()):
            os.chown(path, OWN_USER, OWN_USER)
        target.start()

    def _settings(self, config):
        return config.replace('qemu_user = "own"', f'qemu_user = "{QEMU_USERS[0]}-{QEMU_USERS[-1]}"')

    def _start_other(self):
        """A second guest at the source."""
        ram = pathlib.Path(f"{self.ram}-{OTHER}")
        self._stack.callback(ram.unlink, missing_ok=True)
        self.other_monitor = f"{self.folder}/{OTHER}.qmp"
        words = tiny.argv(ram, self.other_monitor, f"{self.folder}/{OTHER}.glue", boot=self.folder / "boot.img")
        log = self._stack.enter_context(open(self.folder / "other.log", "wb"))
        qemu = self.two.popen("source", words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._stack.callback(hosts.stop, qemu)
        deadline = time.monotonic() + 30
        while not os.path.exists(self.other_monitor):
            if time.monotonic() > deadline:
                raise presync.LabError("the second guest does not start")
            time.sleep(0.05)

    def start_other(self):
        return self.presync("start", OTHER, "--qmp", self.other_monitor, "--to", f"{self.two.address['target']}:{presync.PORT}",
                            "--max-launch-time", "2s", "--wait")


class ReachTest(unittest.TestCase):
    """Where QEMUs are apart."""

    def setUp(self):
        if os.geteuid() != 0:
            self.skipTest("needs root")
        self.pair = self.enterContext(ApartPair()) if hasattr(self, "enterContext") else self._enter(ApartPair())
        self.guests = self.pair.target.folder / "run" / "guests"

    def _enter(self, context):
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()

    def as_qemu(self, pid, *argv):
        """What a process gets that has the user, the groups and the capabilities of the QEMU `pid`."""
        status = status_of(pid)
        groups = ["--groups", ",".join(status["Groups"].split())] if status["Groups"].strip() else ["--clear-groups"]
        return subprocess.run(
            ["setpriv", f"--reuid={status['Uid'].split()[1]}", f"--regid={status['Gid'].split()[1]}", *groups, "--inh-caps=-all",
             "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs", *map(str, argv)],
            capture_output=True, text=True, timeout=30, check=False)

    def refused(self, pid, what, script):
        done = self.as_qemu(pid, "sh", "-c", f"cd {self.guests}; {script} && echo REACHED")
        self.assertNotIn("REACHED", done.stdout, f"{what}: {done.stdout}{done.stderr}")

    def start_both(self):
        code, words = self.pair.start("--wait")
        self.assertEqual(code, 0, words + self.pair.target.words(40))
        code, words = self.pair.start_other()
        self.assertEqual(code, 0, words + self.pair.target.words(40))
        return (self.pair.target.guest_pids()[name] for name in (tiny.NAME, OTHER))

    def test_a_qemu_reaches_its_own_guest_and_nothing_else(self):
        pair = self.pair
        mine, other = self.start_both()
        users = [int(status_of(pid)["Uid"].split()[1]) for pid in (mine, other)]
        self.assertNotIn(OWN_USER, users, "QEMUs are not presyncd's user")
        self.assertNotEqual(users[0], users[1], "each guest's QEMU is a user of its own")
        for pid in (mine, other):
            self.assertEqual(int(status_of(pid)["CapPrm"], 16), 0)
            self.assertEqual(status_of(pid)["NoNewPrivs"].strip(), "1")
        key = pair.target.folder / "host.key"
        key.write_text("the host's key\n", encoding="ascii")
        key.chmod(0o600)
        os.chown(key, OWN_USER, OWN_USER)
        daemon = pair.target.process.pid
        for what, script in (
                ("a note", "echo x > x.guest"), ("its own note", "echo >> tiny.guest"),
                ("a link where a note will be made", "ln -s /etc/passwd tiny.guest.new"),
                ("its log's name", "rm -f tiny.log && [ ! -e tiny.log ]"), ("others' logs", "cat other.log"),
                ("what there is", "ls ."), ("the records", f"ls {pair.target.folder}/state"), ("the key", f"cat {key}"),
                ("presyncd's memory", f"head -c 1 /proc/{daemon}/maps"), ("presyncd's descriptors", f"ls /proc/{daemon}/fd"),
                ("presyncd itself", f"kill -0 {daemon}"), ("another QEMU", f"kill -0 {other}"),
                ("another QEMU's memory", f"head -c 1 /proc/{other}/maps"),
                ("another guest's memory", f"head -c 1 {pair.target.ram}/other.ram0.ram"),
                ("another guest's sockets", "ls other.d"),
                ("another guest's monitor", "python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"other.d/qmp\")'"),
                ("the control socket", f"{presync.program('presync')} --socket {pair.target.socket} status")):
            self.refused(mine, what, script)
        own = self.as_qemu(mine, "sh", "-c", f"cd {self.guests}/tiny.d && ls && touch x && head -c 1 {pair.target.ram}/tiny.ram0.ram > /dev/null")
        self.assertEqual(own.returncode, 0, own.stderr)
        self.assertIn("qmp", own.stdout)

    def test_its_guest_moves_outlives_presyncd_and_leaves_nothing(self):
        pair = self.pair
        mine, _ = self.start_both()
        code, words = pair.presync("launch", tiny.NAME, "--verify")
        self.assertEqual(code, 0, words)
        for signal_it in (pair.target.stop, pair.target.kill):
            signal_it()
            pair.target.start()
            self.assertEqual(pair.target.guest_pids()[tiny.NAME], mine)
            self.assertTrue(os.path.exists(f"/proc/{mine}"), "the guest runs on")
        # Its monitor is where it was before QEMUs were apart, too, and presyncd takes it for a source.
        code, words = pair.presync("doctor", "--qmp", self.guests / "tiny.qmp", host="target")
        self.assertIn("one of 64200-64209", words)
        self.assertRegex(words, r"dirty log.*uffd", words)
        os.kill(mine, 9)
        deadline = time.monotonic() + 20
        while any(self.guests.glob("tiny*.guest")) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [path.name for path in (*self.guests.glob("tiny.*"), *pair.target.ram.glob("tiny.*"))]
        self.assertEqual(left, ["tiny.log"])

    def test_without_the_capabilities_presyncd_says_so(self):
        target = self.pair.target
        target.stop()
        target.prefix = [word for word in target.prefix if not word.startswith(("--inh", "--amb", "--bound"))]
        with self.assertRaises(presync.LabError):
            target.start()
        self.assertIn("it lacks CAP_CHOWN", target.words())
        self.assertIn('qemu_user = "own"', target.words())
        config = target.config.read_text(encoding="utf-8")
        target.config.write_text(re.sub("^qemu_user = .*$", 'qemu_user = "auto"', config, flags=re.M), encoding="utf-8")
        target.start()
        self.assertIn("QEMUs are started as presyncd's own user", target.words())
        self.assertFalse(target.ask_status()["qemu"]["apart"])
        words = self.pair.presync("doctor", host="target")[1]
        self.assertRegex(words, "QEMUs +those that presyncd starts run as its own user")

    def test_a_folder_that_somebody_else_made_is_refused(self):
        target = self.pair.target
        target.stop()
        shutil.rmtree(target.ram)
        os.mkdir(target.ram)
        os.chown(target.ram, 1234, 1234)
        os.chmod(target.ram, 0o777)
        with self.assertRaises(presync.LabError):
            target.start()
        self.assertIn(f"ram_folder: {target.ram} is user 1234's, mode 0777", target.words())
        os.chown(target.ram, OWN_USER, OWN_USER)
        os.chmod(target.ram, 0o700)
        target.start()


class EarlierPair(ApartPair):
    """The target's first presyncd is of an earlier version, whose QEMUs are its own user."""

    def _settings(self, config):
        return config.replace('qemu_user = "own"\n', "")

    def _become_own_user(self):
        after = os.environ.get("PRESYNC_BUILD")
        os.environ["PRESYNC_BUILD"] = os.environ["PRESYNC_BEFORE"]
        try:
            super()._become_own_user()
        finally:
            os.environ.pop("PRESYNC_BUILD")
            if after is not None:
                os.environ["PRESYNC_BUILD"] = after


@unittest.skipUnless(os.environ.get("PRESYNC_BEFORE"), "PRESYNC_BEFORE names no build folder of an earlier version")
class UpgradeTest(unittest.TestCase):
    """An earlier version's presyncd is replaced while its guest runs."""

    def test_a_guest_is_not_touched(self):
        pair = EarlierPair()
        self.addCleanup(pair.__exit__, None, None, None)
        pair.__enter__()
        self.assertEqual(pair.start("--wait")[0], 0, pair.target.words())
        code, words = pair.presync("launch", tiny.NAME, "--verify")
        self.assertEqual(code, 0, words)
        qemu = pair.target.guest_pids()[tiny.NAME]
        self.assertEqual(int(status_of(qemu)["Uid"].split()[1]), OWN_USER)
        pair.target.stop()
        config = pair.target.config.read_text(encoding="utf-8")
        pair.target.config.write_text(f'qemu_user = "{QEMU_USERS[0]}-{QEMU_USERS[-1]}"\n{config}', encoding="utf-8")
        pair.target.start()
        self.assertEqual(pair.target.guest_pids()[tiny.NAME], qemu)
        self.assertEqual(int(status_of(qemu)["Uid"].split()[1]), OWN_USER)
        # The next guest's QEMU is apart already.
        code, words = pair.start_other()
        self.assertEqual(code, 0, words + pair.target.words(40))
        self.assertIn(int(status_of(pair.target.guest_pids()[OTHER])["Uid"].split()[1]), QEMU_USERS)
        monitor = pair.target.folder / "run" / "guests" / "tiny.qmp"
        with qmp.Qmp(str(monitor), 20) as client:
            self.assertEqual(client.execute("query-status")["status"], "running")
        os.kill(qemu, 9)
        deadline = time.monotonic() + 20
        while (pair.target.ram / "tiny.ram0.ram").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.assertEqual([path.name for path in pair.target.ram.iterdir()], ["other.ram0.ram"])


if __name__ == "__main__":
    hosts.leave_on_sigterm()
    unittest.main()
