#!/usr/bin/python3
"""A QEMU that was taken over, against a real presyncd with the unit's rights: he owns his own guest, and nothing else.

    tests/lying_qemu.py [TestCase.test ...] [-v]     PRESYNC_BUILD names the build folder

Needs root, to be several users. The presyncds run as a user of their own with the unit's two capabilities, the guests'
QEMUs as one user each.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
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
        lab.spawn([*as_user(evil.user), sys.executable, pathlib.Path(__file__).resolve(), "--lie", monitor, evil.monitor,
                   victim.ram, *more], evil.folder / "liar.log")
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


def lie(path, real, memory, own="", *_):
    """Serves a monitor at `path`: what the real one says, with `memory` as the guest's, and this process as its vCPU.
    It has `own` mapped, if that is given: a file as large. Further arguments are for who looks at the command line."""
    if own:
        import mmap
        with open(own, "w+b") as file:
            file.truncate(64 << 20)
            own = mmap.mmap(file.fileno(), 64 << 20)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(4)
    while True:
        client, _ = listener.accept()
        qemu = socket.socket(socket.AF_UNIX)
        qemu.connect(real)
        threading.Thread(target=pass_on, args=(client, qemu), daemon=True).start()
        for line in qemu.makefile():
            answer = json.loads(line)
            result = answer.get("return")
            if isinstance(result, str) and "presync-lying" in result:
                answer["return"] = memory
            if isinstance(result, list):
                for each in result:
                    if isinstance(each, dict) and "thread-id" in each:
                        each["thread-id"] = os.getpid()
            with contextlib.suppress(OSError):
                client.sendall(json.dumps(answer).encode() + b"\r\n")


def pass_on(client, qemu):
    """What presyncd says, with its descriptors."""
    while True:
        words, fds, _, _ = socket.recv_fds(client, 65536, 4)
        if not words:
            qemu.shutdown(socket.SHUT_RDWR)
            return
        socket.send_fds(qemu, [words], fds)
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--lie"]:
        lie(*sys.argv[2:])
    unittest.main()
