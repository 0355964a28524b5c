#!/usr/bin/python3
"""A QEMU that was taken over, against a real presyncd with the unit's rights: he owns his own guest, and nothing else.

    tests/lying_qemu.py [TestCase.test ...] [-v]     PRESYNC_BUILD names the build folder
    tests/lying_qemu.py --runs 1000 --seed 7 LyingTest.test_monitor

Needs root, to be several users. The presyncds run as a user of their own with the unit's two capabilities, the guests'
QEMUs as one user each.
"""

import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import hosts, presync, qmp, tiny  # noqa: E402  (after the path is set)

PRESYNC_USER, VICTIM_USER, EVIL_USER = 64123, 64124, 64125  # nobody's
CAPABILITIES = "+dac_override,+sys_ptrace"
SECRET = b"VICTIM-SECRET-" * 100
AT = 40 << 20
RUNS, SEED = 24, 20261201  # of each kind, in the suite
WORKERS = 4
IN_OPEN, IN_NONBLOCK = 0x20, 0o4000


def as_user(user):
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]


class Guest:
    """A QEMU of one user, with its memory and its sockets where only that user gets."""

    def __init__(self, lab, name, user, waiting=False):
        self.folder = lab.folder / name
        self.folder.mkdir()
        self.folder.chmod(0o700)
        os.chown(self.folder, user, user)
        self.ram = pathlib.Path(f"/dev/shm/presync-lying-{os.getpid()}-{lab.folder.name}-{name}")
        lab.stack.callback(self.ram.unlink, missing_ok=True)
        self.user, self.monitor, self.glue = user, f"{self.folder}/qmp", f"{self.folder}/glue"
        words = tiny.argv(self.ram, self.monitor, self.glue, boot=lab.boot, waiting=waiting)
        words = [word.replace(presync.plugin_path(), str(lab.plugin)) for word in words]
        words += ["-qmp", f"unix:{self.folder}/operator,server=on,wait=off"]
        self.process = lab.spawn([*as_user(user), *words], self.folder / "log")
        qmp.Qmp(f"{self.folder}/operator", 20).close()  # it is up
        self.ram.chmod(0o600)


class Lab:
    """Two presyncds on loopback, and guests of several users. A context manager."""

    def __init__(self, guests):
        """`guests`: those of the target, {name: its monitor, relative to the lab's folder, or None for a command}."""
        self._guests = guests

    def __enter__(self):
        with contextlib.ExitStack() as self.stack:
            self.folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="presync-lying-")))
            self.folder.chmod(0o711)
            self.boot, self.plugin = self.folder / "boot.img", self.folder / "presync_glue.so"
            tiny.boot_disk(self.boot)
            shutil.copy(presync.plugin_path(), self.plugin)
            self.plugin.chmod(0o755)
            self.liar = shutil.copy(ROOT / "tests" / "lying_process.py", self.folder)
            os.chmod(self.liar, 0o755)
            self.two = tiny.Loopback()
            waiting = tiny.argv("{ram.ram0}", "{qmp}", "{glue}", boot=self.boot, waiting=True)
            waiting = [word.replace(presync.plugin_path(), str(self.plugin)) for word in waiting]
            self.target = self._daemon("target", {name: waiting if attach is None else f"{self.folder}/{attach}"
                                                  for name, attach in self._guests.items()})
            self.source = self._daemon("source", {})
            self.kept = self.stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()
        self.kept.close()

    def _daemon(self, host, guests):
        daemon = presync.Daemon(self.two, host, self.folder, guests=guests, insecure=True)
        daemon.prefix = [*as_user(PRESYNC_USER), f"--bounding-set=-all,{CAPABILITIES}", f"--inh-caps=-all,{CAPABILITIES}",
                         f"--ambient-caps={CAPABILITIES}"]
        for path in (daemon.folder, daemon.config):
            os.chown(path, PRESYNC_USER, PRESYNC_USER)
        return self.stack.enter_context(daemon)

    def spawn(self, words, log, **options):
        with open(log, "ab") as file:
            process = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                       preexec_fn=hosts.die_with_parent, **options)
        self.stack.callback(hosts.stop, process)
        return process

    def start(self, name, monitor, *arguments, seconds=60):
        """`presync start`: its exit code, and what it said."""
        done = self.source.run("start", name, "--qmp", monitor, "--to", f"{self.two.address['target']}:{presync.PORT}",
                               "--max-launch-time", "2s", *arguments, capture_output=True, text=True, timeout=seconds)
        return done.returncode, done.stdout + done.stderr


def write_secret(guest):
    with open(guest.ram, "r+b") as file:
        file.seek(AT)
        file.write(SECRET)


def read_at(path):
    with open(path, "rb") as file:
        file.seek(AT)
        return file.read(len(SECRET))


def maps_of(daemon):
    return pathlib.Path(f"/proc/{daemon.process.pid}/maps").read_text()


@unittest.skipIf(os.geteuid() != 0, "needs root, to be several users")
class AnotherGuestTest(unittest.TestCase):
    """One guest's QEMU names the memory, or the plug-in, of another guest."""

    def lie(self, lab, evil, victim, *more):
        """A monitor that passes all on to evil's, but calls the victim's memory its own."""
        monitor = f"{evil.folder}/liar"
        lab.spawn([*as_user(evil.user), sys.executable, lab.liar, "--name", victim.ram, monitor, evil.monitor, *more],
                  evil.folder / "liar.log")
        deadline = time.monotonic() + 20
        while not os.path.exists(monitor):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.02)
        return monitor

    def refused(self, lab, monitor, words, *arguments):
        code, said = lab.start("evil", monitor, *arguments)
        self.assertNotEqual(code, 0, said)
        self.assertIn(words, said)
        self.assertFalse(any(guest["state"] == "syncing" for guest in lab.source.ask_status()["guests"]))

    def test_a_monitor_that_names_anothers_memory(self):
        with Lab({"evil": None}) as lab:
            victim, evil = Guest(lab, "victim", VICTIM_USER), Guest(lab, "evil", EVIL_USER)
            write_secret(victim)
            glue = ("--glue", victim.glue)
            self.refused(lab, self.lie(lab, evil, victim), "is not this guest's", *glue)
            # And one that has memory of its own, so that its process looks like a QEMU.
            own = evil.folder / "own"
            self.refused(lab, self.lie(lab, evil, victim, own), "is not this guest's", *glue)
            self.assertNotIn(str(victim.ram), maps_of(lab.source))
            self.assertEqual(list(lab.target.ram.glob("evil*")), [])
            # His own guest he may have kept in sync.
            code, said = lab.start("evil", evil.monitor, "--wait")
            self.assertEqual(code, 0, said)

    def test_the_plug_in_of_another(self):
        with Lab({"evil": None}) as lab:
            victim, evil = Guest(lab, "victim", VICTIM_USER), Guest(lab, "evil", EVIL_USER)
            self.refused(lab, evil.monitor, "not this guest's QEMU", "--glue", victim.glue)

    def test_a_waiting_qemu_that_names_anothers_memory(self):
        """There presyncd would write into it."""
        with Lab({"evil": "waiting/liar"}) as lab:
            victim, waiting = Guest(lab, "victim", VICTIM_USER), Guest(lab, "waiting", EVIL_USER, waiting=True)
            evil = Guest(lab, "evil", EVIL_USER)
            write_secret(victim)
            self.lie(lab, waiting, victim, "", "-S")
            self.refused(lab, evil.monitor, "is not this guest's")
            self.assertEqual(read_at(victim.ram), SECRET)
            self.assertNotIn(str(victim.ram), maps_of(lab.target))

    def test_a_waiting_qemu_that_tells_the_truth(self):
        with Lab({"evil": "waiting/qmp"}) as lab:
            waiting, evil = Guest(lab, "waiting", EVIL_USER, waiting=True), Guest(lab, "evil", EVIL_USER)
            write_secret(evil)
            code, said = lab.start("evil", evil.monitor, "--wait")
            self.assertEqual(code, 0, said)
            done = lab.source.run("launch", "evil", "--verify", capture_output=True, text=True, timeout=60)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            self.assertEqual(read_at(waiting.ram), SECRET)


class Opened:
    """Who opens files that are nobody's business: what the kernel saw (inotify)."""

    def __init__(self, paths):
        libc = ctypes.CDLL(None)
        self._fd = libc.inotify_init1(IN_NONBLOCK)
        for path in paths:
            assert libc.inotify_add_watch(self._fd, str(path).encode(), IN_OPEN) >= 0, path

    def any(self):
        try:
            return bool(os.read(self._fd, 65536))
        except BlockingIOError:
            return False

    def close(self):
        os.close(self._fd)


def held_by(daemon):
    """How many descriptors and threads a presyncd has."""
    folder = pathlib.Path(f"/proc/{daemon.process.pid}")
    return len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))


class Worker(threading.Thread):
    """Plays run after run, each with a liar of its own seed, in front of one real QEMU."""

    def __init__(self, lab, name, what, seeds, others):
        super().__init__()
        self.lab, self.guest, self.what, self.seeds, self.others = lab, name, what, seeds, others
        self.evil = None
        self.accepted = self.played = 0
        self.failures = []

    def run(self):
        for seed in self.seeds:
            try:
                self.play(seed)
                self.played += 1
            except Exception as error:  # for the test to tell, with the seed
                self.failures.append(f"seed {seed}: {type(error).__name__}: {error}")
                return
        try:
            self.tell_the_truth()
        except Exception as error:
            self.failures.append(f"{self.guest}, at the end: {type(error).__name__}: {error}")

    def liar(self, seed):
        """Begins to lie: the process, and the sockets of its monitor and its plug-in."""
        if self.evil is None or self.evil.process.poll() is not None:
            self.evil = Guest(self.lab, f"{self.guest}-{seed}", EVIL_USER)
        evil, folder = self.evil, self.evil.folder
        monitor, glue, inner = (f"{folder}/{seed}.{kind}" for kind in ("q", "g", "i"))
        liar = self.lab.spawn(
            [*as_user(EVIL_USER), "env", f"LD_PRELOAD={self.lab.plugin}", f"PRESYNC_GLUE_SOCKET={inner}", sys.executable,
             self.lab.liar, seed, self.what, evil.ram, monitor, evil.monitor, glue, inner, *self.others],
            self.lab.folder / "liars.log")
        for path in (monitor, glue, inner):
            while not os.path.exists(path):
                if liar.poll() is not None:
                    raise RuntimeError("the liar did not start")
                time.sleep(0.01)
        return liar, monitor, glue

    def play(self, seed):
        liar, monitor, glue = self.liar(seed)
        # What does not answer is waited for: its end is what ends a run.
        timer = threading.Timer(3, liar.kill)
        timer.start()
        try:
            log = ("auto", "uffd-async", "uffd-handler")[seed % 3]
            code, _ = self.lab.start(self.guest, monitor, "--glue", glue, "--dirty-log", log)
            self.accepted += code == 0
            if code == 0:
                command = (("verify",), ("launch",), ("status",), ("launch", "--verify"))[seed % 4]
                self.ask(*command)
        finally:
            timer.cancel()
            liar.kill()
            liar.wait()
        self.ask("stop")

    def tell_the_truth(self):
        """A guest of this name may be kept in sync all the same, and with the end of that the target lets go of what it
        keeps of a sync that broke (for ten minutes)."""
        with contextlib.suppress(KeyError, ProcessLookupError):  # what a launch has brought there
            os.kill(self.lab.target.guest_pids()[self.guest], signal.SIGKILL)
        evil = Guest(self.lab, f"{self.guest}-true", EVIL_USER)
        deadline = time.monotonic() + 60
        while True:
            code, said = self.lab.start(self.guest, evil.monitor, "--wait")
            if code == 0:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(said)
            self.lab.source.run("may-start", self.guest, "--clear", "-c", self.lab.source.config,
                                capture_output=True, timeout=30)
            time.sleep(0.5)
        self.ask("stop")

    def ask(self, *command):
        self.lab.source.run(command[0], self.guest, *command[1:], capture_output=True, timeout=90)


@unittest.skipIf(os.geteuid() != 0, "needs root, to be several users")
class LyingTest(unittest.TestCase):
    """Seeded lies in what a real QEMU, or the real plug-in, says."""

    def play(self, what):
        names = [f"evil{number}" for number in range(WORKERS)]
        print(f"seed {SEED}, {RUNS} runs", file=sys.stderr)
        with Lab({"good": None, **{name: None for name in names}}) as lab:
            canary = lab.folder / "canary"
            canary.write_bytes(bytes(64 << 20))
            canary.chmod(0o600)
            good = Guest(lab, "good", VICTIM_USER)
            code, said = lab.start("good", good.monitor, "--wait")
            self.assertEqual(code, 0, said)
            daemons = (lab.source, lab.target)
            before = [held_by(daemon) for daemon in daemons]
            others = [str(good.ram), str(canary), good.glue, good.monitor, lab.source.socket, "/etc/shadow", "/dev/zero"]
            with contextlib.closing(Opened([good.ram, canary, "/etc/shadow"])) as opened:
                seeds = range(SEED, SEED + RUNS)
                workers = [Worker(lab, name, what, seeds[at::WORKERS], others) for at, name in enumerate(names)]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                self.assertFalse(opened.any(), "a file of others was opened")
            self.assertEqual([each for worker in workers for each in worker.failures], [])
            self.assertEqual(sum(worker.played for worker in workers), RUNS)
            self.assertGreater(sum(worker.accepted for worker in workers), 0, "no lie came far")
            self.all_is_as_before(lab, good, daemons, before)

    def all_is_as_before(self, lab, good, daemons, before):
        for daemon in daemons:
            self.assertIsNone(daemon.process.poll(), daemon.words())
        state = next(guest for guest in lab.source.ask_status()["guests"] if guest["name"] == "good")
        self.assertEqual(state["state"], "syncing", state)
        done = lab.source.run("verify", "good", capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        deadline = time.monotonic() + 40
        after = before
        while time.monotonic() < deadline:
            after = [held_by(daemon) for daemon in daemons]
            if all(now <= then for a, b in zip(after, before) for now, then in zip(a, b)):
                break
            time.sleep(0.2)
        else:
            self.fail(f"(descriptors, threads) of source and target before {before}, now {after}")
        for daemon in daemons:  # and it still hears
            daemon.process.terminate()
            daemon.process.wait(30)
        self.assertEqual([daemon.process.returncode for daemon in daemons], [0, 0])
        self.assertIsNone(good.process.poll())

    def test_monitor(self):
        self.play("monitor")

    def test_plugin(self):
        self.play("plugin")

    def test_a_userfaultfd_that_never_comes_to_rest(self):
        """The kernel says "again" for as long as its event lies unread, and the liar lives on."""
        with Lab({"evil": None}) as lab:
            _, monitor, glue = Worker(lab, "evil", "restless", (), ()).liar(0)
            code, said = lab.start("evil", monitor, "--glue", glue, "--dirty-log", "uffd-async", seconds=30)
            self.assertNotEqual(code, 0, said)
            self.assertIn("does not come to rest", said)
            lab.source.process.terminate()
            self.assertEqual(lab.source.process.wait(20), 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=SEED)
    known, rest = parser.parse_known_args()
    RUNS, SEED = known.runs, known.seed
    unittest.main(argv=[sys.argv[0], *rest])
