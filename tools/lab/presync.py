"""presyncd on the two hosts of the lab, and `presync` to talk to them."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

from . import certificates as _certificates
from . import guest as _guest
from . import hosts as _hosts

PORT = 7350
NAME = "demo"
LabError = _hosts.LabError


def build_folder():
    """Where the programs are: PRESYNC_BUILD, or build/release of this checkout."""
    default = pathlib.Path(__file__).resolve().parent.parent.parent / "build" / "release"
    folder = pathlib.Path(os.environ.get("PRESYNC_BUILD", default))
    if not (folder / "tools" / "presyncd").exists():
        raise LabError(f"{folder} has no presyncd: build it first (cmake --preset release; ninja)")
    return folder


def installed():
    """Whether the programs to use are those that a package installed: PRESYNC_INSTALLED is set."""
    return bool(os.environ.get("PRESYNC_INSTALLED"))


def program(name):
    """The path of "presyncd" or "presync"."""
    if installed():
        return pathlib.Path({"presyncd": "/usr/sbin", "presync": "/usr/bin"}[name]) / name
    return build_folder() / "tools" / name


def plugin_path():
    """The library that QEMU loads."""
    if installed():
        return "/usr/lib/x86_64-linux-gnu/qemu/presync_glue.so"
    return str(build_folder() / "qemu-glue" / "plugin" / "presync_glue.so")


class Refused(Exception):
    """presync ended with an error.  `code` is its exit code, str() its words."""

    def __init__(self, code, words):
        super().__init__(words)
        self.code = code


class Daemon:
    """One presyncd.  A context manager; it is stopped by its id, the guests it started too."""

    def __init__(self, two, host, folder, guests=None, defaults=None, insecure=False, rules=None, settings=None,
                 tables=None):
        """`guests`: {name: argv or monitor socket of a waiting QEMU}.  With certificates, unless `insecure`.
        `rules`: {peer: {key: value}}, who may push; all hosts of the lab if not given.
        `settings`: further top-level keys of the configuration; `tables`: {name: {key: value}}, whole tables."""
        self.host = host
        self._two = two
        self.folder = pathlib.Path(folder) / host
        self.folder.mkdir(exist_ok=True)
        self.ram = pathlib.Path(f"/dev/shm/presync-lab-{os.getpid()}-{self.folder.parent.name}-{host}")
        self.socket = f"{self.folder}/presyncd.sock"
        self.log = f"{self.folder}/presyncd.log"
        self.process = None
        self.prefix = []  # of the command: another user's rights, for example
        if insecure:
            self._security, self._rules = ["insecure = true"], {}
        else:
            certificates = _certificates.of_lab(folder, two)
            self._security = _certificates.settings(certificates, host)
            self._rules = {peer: {} for peer in two.hosts} if rules is None else rules
        self._tables = tables or {}
        self._write_config(guests or {}, defaults or {}, settings or {})

    def _write_config(self, guests, defaults, settings=None):
        lines = [f'listen = "{self._two.address[self.host]}:{PORT}"', f'socket = "{self.socket}"',
                 f'state_folder = "{self.folder}/state"', f'run_folder = "{self.folder}/run"',
                 f'ram_folder = "{self.ram}"', *self._security]
        # Disks and build folders here are whose they are: QEMUs as presyncd's user, also where the package is installed.
        lines += [f"{key} = {json.dumps(value)}" for key, value in {"qemu_user": "own", **(settings or {})}.items()]
        if defaults:
            lines += ["[defaults]", *(f"{key} = {json.dumps(value)}" for key, value in defaults.items())]
        for table, keys in self._tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        for peer, rules in self._rules.items():
            lines += [f'[peer."{peer}"]', *(f"{key} = {json.dumps(value)}" for key, value in rules.items())]
        for name, how in guests.items():
            key = "attach" if isinstance(how, str) else "command"
            lines += [f"[guest.{name}]", f"{key} = {json.dumps(how)}"]
        self.config = self.folder / "presyncd.toml"
        self.config.write_text("\n".join(lines) + "\n")

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()
        self.end_guests()
        shutil.rmtree(self.ram, ignore_errors=True)

    def start(self, seconds=20):
        """Starts presyncd and waits until it answers."""
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = self._two.popen(
                self.host, [*self.prefix, program("presyncd"), "-c", self.config],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Refused):
                self.ask_status()
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"presyncd on {self.host} did not start:\n{self.words()}")
            time.sleep(0.05)

    def stop(self):
        """As systemd does."""
        if self.process is not None:
            _hosts.stop(self.process, 30)

    def kill(self):
        """As a crash does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def guest_pids(self):
        """{name: pid} of the guests' QEMUs that this presyncd started, dead or alive."""
        pids = {}
        for note in (self.folder / "run" / "guests").glob("*.guest"):
            with contextlib.suppress(ValueError, OSError):
                pids[note.stem] = json.loads(note.read_text())["pid"]
        return pids

    def end_guests(self):
        """Ends the QEMUs that this presyncd started and that outlived it."""
        for pid in self.guest_pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def words(self, lines=15):
        """The end of its log."""
        with open(self.log, encoding="utf-8", errors="replace") as file:
            return "\n".join(file.read().splitlines()[-lines:])

    def run(self, *arguments, **options):
        """`presync ARGUMENTS` on this host, as subprocess.run."""
        return subprocess.run([program("presync"), "--socket", self.socket,
                               *map(str, arguments)], check=False, **options)

    def ask_status(self):
        """What `presync status --json` says, without a process of its own: for whoever asks many times a second."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(20)
                connection.connect(self.socket)
                connection.sendall(b'{"command": "status"}\n')
                with connection.makefile("rb") as lines:
                    answer = json.loads(lines.readline())
        except (OSError, ValueError) as error:
            raise Refused(3, f"presyncd on {self.host} does not answer: {error}") from error
        if not answer.get("ok"):
            raise Refused(1, answer.get("error", ""))
        return answer

    def ask(self, *arguments):
        """The same with --json: its answer, or Refused."""
        done = self.run(*arguments, "--json", capture_output=True, text=True)
        if done.returncode != 0:
            raise Refused(done.returncode, done.stderr.strip())
        return json.loads(done.stdout.splitlines()[-1])


class Move:
    """A source guest, the two presyncds and what is needed to move the guest.  A context manager.

        with TwoHosts() as two, Move(two, folder, spec) as move:
            move.start(); move.source_daemon.ask("launch", NAME)
    """

    def __init__(self, two, folder, spec, defaults=None, target_spec=None, insecure=False, rules=None, settings=None):
        """`spec`: without a plug-in; it is added here.  `target_spec`: if it differs.  `rules`: the target's."""
        self.two = two
        self.folder = pathlib.Path(folder)
        self.spec = spec
        self._stack = contextlib.ExitStack()
        self._target_spec = target_spec or spec
        self._defaults = defaults
        self._insecure = insecure
        self._rules = rules
        self._settings = settings
        self.source = self.reader = self.source_daemon = self.target_daemon = None
        self.target_agent = f"{self.folder}/target.agent"
        self._attached = None  # the waiting QEMU that the reader reads

    def __enter__(self):
        import dataclasses
        with contextlib.ExitStack() as stack:
            template = dataclasses.replace(self._target_spec,
                                           plugin=f"{plugin_path()},socket={{glue}}")
            count = 2 if self.spec.two_backends else 1
            sockets = _guest.Sockets(ram=[f"{{ram.ram{i}}}" for i in range(count)], qmp=["{qmp}"],
                                     agent=self.target_agent, serial=f"{self.folder}/target.serial")
            command = _guest.qemu_argv(template, "target", sockets)
            self.target_daemon = stack.enter_context(
                Daemon(self.two, "target", self.folder, {NAME: command}, self._defaults,
                       self._insecure, self._rules, self._settings))
            self.source_daemon = stack.enter_context(
                Daemon(self.two, "source", self.folder, {}, self._defaults, self._insecure,
                       settings=self._settings))
            spec = dataclasses.replace(
                self.spec, plugin=f"{plugin_path()},socket={self.folder}/source.glue")
            self.source = stack.enter_context(
                _guest.Guest(spec, "source", self.folder, monitors=2,
                             popen=functools.partial(self.two.popen, "source")))
            self.reader = stack.enter_context(self.source.reader())
            self.source.wait_boot(self.reader)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    @property
    def to(self):
        return f"{self.two.address['target']}:{PORT}"

    def start(self, *arguments):
        """`presync start`; connects the beat reader to the waiting target."""
        answer = self.source_daemon.ask("start", NAME, "--qmp", self.source.sockets.qmp[0],
                                        "--to", self.to, *arguments)
        # A target that went on with its copy may still have the QEMU that the reader has already.
        waiting = self.target_daemon.guest_pids().get(NAME)
        if waiting is None or waiting != self._attached:
            self.reader.attach("target", self.target_agent)
        self._attached = waiting
        return answer

    def status(self):
        """presync status of the guest on the source."""
        guests = self.source_daemon.ask("status", NAME)["guests"]
        return guests[0] if guests else None

    def wait_synced(self, seconds=120):
        deadline = time.monotonic() + seconds
        while True:
            status = self.status()
            if status["state"] == "syncing":
                return status
            if time.monotonic() > deadline or status["state"] not in ("first-pass", "connecting"):
                raise LabError(f"the guest is not in sync: {status}\n{self.source_daemon.words()}")
            time.sleep(0.1)


def run_folder():
    """A temporary folder for a lab run."""
    return tempfile.TemporaryDirectory(prefix="presync-lab-")
