"""Two hosts with a presyncd each and one guest that lives through many handovers and faults.

Used by tests/fault_campaign --real and tests/soak: what may be broken is reached through here, and
`decide` says from outside what became of the guest.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time

from . import guest as _guest
from . import hosts as _hosts
from . import presync as _presync
from .agent import AgentError, BeatReader
from .proxies import QmpFront, WireProxy
from .qmp import Qmp, QmpError
from .slow_disk import Reader

TOOLS = pathlib.Path(__file__).resolve().parent
NAME = _presync.NAME
LabError = _hosts.LabError
PATIENCE_S = 12  # what presync settles by itself it has settled by then


class Violation(Exception):
    """What must never happen did; the text says what. `kind` is one of the campaign's counts."""

    def __init__(self, kind, text):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Qemu:
    """One QEMU process of the pair, as /proc shows it."""

    pid: int
    side: str
    watch: str  # the monitor that is ours alone


def alive(pid):
    """Whether a process lives (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Fronts:
    """Takes the fronted monitors of the QEMUs as they start (tools/lab/fronted)."""

    def __init__(self, path):
        self._path = path
        self._fronts = {}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(16)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                text, fds, _, _ = socket.recv_fds(connection, 4096, 1)
                front = text.decode().strip()
                old = self._fronts.get(front)
                self._fronts[front] = QmpFront(socket.socket(fileno=fds[0]), front.removesuffix(".front"))
                if old:
                    old.close()
                connection.sendall(b"x")

    def of(self, front):
        return self._fronts[front]

    def heal(self):
        for front in self._fronts.values():
            front.fault = None

    def close(self):
        self._socket.close()
        for front in self._fronts.values():
            front.close()


class Pair:
    """A context manager. `here` and `there` are the sides where the guest is and where it would go."""

    RAM_FOLDER_FACTOR = 2.5  # how much of a guest's memory fits into a host's tmpfs
    READS_MS = 5  # how long reads of the slow disk take while nothing is wrong with it

    def __init__(self, folder, spec, defaults=None, insecure=False, disk=None):
        """`insecure`: without TLS, so that the proxies see which control message passes; else no fault at a step strikes.
        `disk`: the slow disk that the guest's reader reads (lab/slow_disk.py), if it has one."""
        self.insecure = insecure
        self.disk = disk
        self.folder = pathlib.Path(folder)
        self.spec = spec
        self.defaults = defaults
        self.here, self.there = _hosts.TwoHosts.hosts
        self.boots = 0
        self._stack = contextlib.ExitStack()
        self.decided_by_hand = False  # in the last run
        self.monitor = ""  # the guest's, where presyncd is told to find it
        self._boot = contextlib.ExitStack()
        self.reader = None
        self._attached = {}
        self._serial = None  # of the newest boot

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.two = stack.enter_context(_hosts.TwoHosts())
            self.fronts = Fronts(f"{self.folder}/fronts")
            stack.callback(self.fronts.close)
            self.daemons, self.proxies = {}, {}
            for side in self.two.hosts:
                self.daemons[side] = stack.enter_context(self._daemon(stack, side))
                other = next(host for host in self.two.hosts if host != side)
                self.proxies[side] = stack.enter_context(
                    WireProxy(self.two.namespace[side], (self.two.address[other], _presync.PORT)))
            stack.callback(self._end_boot)
            stack.callback(self._end_qemus)
            self.boot(self.here)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _daemon(self, stack, side):
        sockets = _guest.Sockets(ram=["{ram.ram0}"], qmp=["{qmp}", f"{self.folder}/{side}.watch"],
                                 agent=f"{self.folder}/{side}.agent", serial=f"{self.folder}/{side}.serial")
        spec = dataclasses.replace(self.spec, plugin=f"{_presync.plugin_path()},socket={{glue}}")
        # One that ends in order empties its memory, which is the copy as long as it waits.
        argv = [text.replace("share=on,mem-path=", "share=on,discard-data=on,mem-path=")
                for text in _guest.qemu_argv(spec, "target", sockets)]
        command = [str(TOOLS / "fronted"), f"{self.folder}/fronts", "{qmp}.front", *argv]
        daemon = _presync.Daemon(self.two, side, self.folder, {NAME: command}, self.defaults, self.insecure)
        # Of its own, so that it can be full.
        daemon.ram.mkdir(mode=0o700)
        size = int(self.spec.memory_mb * self.RAM_FOLDER_FACTOR)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m,mode=700", "presync-lab", daemon.ram], check=True)
        stack.callback(self._unmount, daemon.ram)
        return daemon

    @staticmethod
    def _unmount(folder):
        subprocess.run(["umount", "-l", folder], check=False)
        with contextlib.suppress(OSError):
            folder.rmdir()

    # ---- the guest ----

    def boot(self, side):
        """A new guest on `side`; waits until it is up. A machine that is very busy may need a second try."""
        for attempt in range(3):
            try:
                return self._boot_once(side)
            except LabError:
                if attempt == 2:
                    raise

    def may_start(self, side, clear=False):
        """Whether presync may-start lets a service on `side` start the guest; `clear`: a person says that it may."""
        daemon = self.daemons[side]
        argv = [_presync.build_folder() / "tools" / "presync", "may-start", NAME, "-c", daemon.config,
                *(["--clear"] if clear else [])]
        return subprocess.run([str(a) for a in argv], check=False, capture_output=True).returncode == 0

    def _boot_once(self, side):
        self._end_boot()
        self.may_start(side, clear=True)
        self.boots += 1
        self.here, self.there = side, next(host for host in self.two.hosts if host != side)
        folder = self.folder / f"boot{self.boots}"
        folder.mkdir()
        spec = dataclasses.replace(self.spec, plugin=f"{_presync.plugin_path()},socket={folder}/glue")
        popen = functools.partial(self._popen_fronted, side, f"{folder}/source.qmp0.front")
        source = self._boot.enter_context(
            _guest.Guest(spec, "source", folder, popen=popen, monitors=2))
        self.monitor = source.sockets.qmp[0] + ".front"
        self._reader_for(f"{side}", source.sockets.agent)
        self._serial = source.sockets.serial
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(AgentError):
                return self.reader.wait_beat(side, 5)
            if source.process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"the guest did not come up\n{source.last_words()}")

    def _popen_fronted(self, side, front, argv, **options):
        return self.two.popen(side, [TOOLS / "fronted", f"{self.folder}/fronts", front, *argv], **options)

    def _reader_for(self, side, agent):
        if self.reader:
            self.reader.close()
        self.reader = BeatReader(**{side: agent})
        self._attached = {}

    def _end_boot(self):
        if self.reader:
            self.reader.close()
            self.reader = None
        self._boot.close()

    def _end_qemus(self):
        for qemu in self.qemus():
            with contextlib.suppress(ProcessLookupError):
                os.kill(qemu.pid, signal.SIGKILL)

    def qemus(self):
        """All QEMUs of this pair that live."""
        found = []
        for proc in pathlib.Path("/proc").iterdir():
            if not proc.name.isdigit():
                continue
            try:
                argv = (proc / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "qemu-system" not in argv[0] or not any(str(self.folder) in a for a in argv):
                continue
            monitors = [a.removeprefix("unix:").split(",")[0] for a, b in zip(argv[1:], argv) if b == "-qmp"]
            if len(monitors) < 2 or not alive(int(proc.name)):
                continue
            side = self._side_of(int(proc.name))
            if side:
                found.append(Qemu(int(proc.name), side, monitors[1]))
        return found

    def _side_of(self, pid):
        with contextlib.suppress(OSError):
            ours = os.stat(f"/proc/{pid}/ns/net").st_ino
            for side, namespace in self.two.namespace.items():
                if os.stat(f"/run/netns/{namespace}").st_ino == ours:
                    return side
        return None

    def qemu_on(self, side):
        """The one QEMU on `side`, or None."""
        return next((qemu for qemu in self.qemus() if qemu.side == side), None)

    @staticmethod
    def run_state(qemu):
        """QEMU's own word: "running", "paused", "inmigrate", ...; "gone"."""
        try:
            with Qmp(qemu.watch, 5) as qmp:
                return qmp.execute("query-status", 10)["status"]
        except QmpError:
            return "unknown" if alive(qemu.pid) else "gone"

    # ---- presync ----

    def to(self, through_proxy):
        if through_proxy:
            return f"127.0.0.1:{self.proxies[self.here].port}"
        return f"{self.two.address[self.there]}:{_presync.PORT}"

    def ask(self, side, *arguments):
        return self.daemons[side].ask(*arguments)

    def session(self):
        """The guest's status where it is, or None."""
        guests = self.daemons[self.here].ask_status()["guests"]
        return next((g for g in guests if g["name"] == NAME), None)

    def open_matters(self):
        """{side: what recovery could not settle}, of both daemons, in parts."""
        return {side: self.daemons[side].ask_status()["open_matters"] for side in self.two.hosts}

    def await_state(self, wanted, seconds, what):
        deadline = time.monotonic() + seconds
        status = None
        while time.monotonic() < deadline:
            with contextlib.suppress(_presync.Refused):
                status = self.session()
                if status is not None and status["state"] in wanted:
                    return status
            time.sleep(0.05)
        raise Violation("restarts_failed", f"{what} did not come to be in {seconds} s: {status}\n{self.words()}")

    def attach_readers(self):
        """Reads the beats of every QEMU that lives."""
        for qemu in self.qemus():
            agent = f"{self.folder}/{qemu.side}.agent"
            known = self._attached.get(qemu.side)
            if known == qemu.pid or not os.path.exists(agent) or "boot" in qemu.watch:
                continue
            with contextlib.suppress(AgentError):
                self.reader.attach(qemu.side, agent, seconds=2)
                self._attached[qemu.side] = qemu.pid

    def words(self, lines=12):
        return "\n".join(f"--- presyncd on {side}\n{daemon.words(lines)}" for side, daemon in self.daemons.items())

    # ---- faults that are undone ----

    def fill_target(self, leave_bytes=0):
        """Fills the tmpfs that the target's memory files lie in."""
        ram = self.daemons[self.there].ram
        free = os.statvfs(ram)
        with open(ram / "filler", "wb") as filler, contextlib.suppress(OSError):
            os.posix_fallocate(filler.fileno(), 0, max(4096, free.f_bavail * free.f_frsize - leave_bytes))

    def heal(self):
        """Undoes every fault, and starts the presyncds that died."""
        self.two.link_up()
        if self.disk:
            self.disk.set_delay(self.READS_MS)
        self.fronts.heal()
        for side, proxy in self.proxies.items():
            proxy.on_frame = None
            (self.daemons[side].ram / "filler").unlink(missing_ok=True)
        for daemon in self.daemons.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon.process.pid, signal.SIGCONT)
        for qemu in self.qemus():
            with contextlib.suppress(ProcessLookupError):
                os.kill(qemu.pid, signal.SIGCONT)
        for side, daemon in self.daemons.items():
            if not alive(daemon.process.pid):  # poll() says nothing while another thread waits for it
                daemon.process.wait()
                try:
                    daemon.start(40)
                except LabError as error:
                    raise Violation("restarts_failed", str(error)) from error

    # ---- what became of it ----

    def decide(self, guest_killed, seconds=75, forced=False):
        """Waits until everything is settled, then: the side that runs the guest, or None if it was killed and
        runs nowhere.  Where a guest was killed presync may leave the matter to a person: then we are the person.
        Raises Violation."""
        began = time.monotonic()
        deadline = began + seconds
        self.decided_by_hand = False
        while True:
            states = {qemu: self.run_state(qemu) for qemu in self.qemus()}
            running = [qemu for qemu, state in states.items() if state == "running"]
            if len(running) > 1 and forced:
                raise Violation("doubled_by_force", f"a person insisted: {states}")
            if len(running) > 1 and self._noticed():
                self._end_stray(running)  # as the advice says
                continue
            if len(running) > 1 and time.monotonic() < began + PATIENCE_S:
                time.sleep(0.2)  # presync looks each second
                continue
            if len(running) > 1:
                raise Violation("guests_doubled", f"two QEMUs run: {states}\n{self.words()}")
            unsettled = self._unsettled(running)
            if not unsettled and (running or guest_killed):
                break
            if (guest_killed or forced) and not running and not self.decided_by_hand and time.monotonic() > began + PATIENCE_S:
                self._decide_by_hand()
            if len(running) == 1 and time.monotonic() > began + 4 and self._noticed():
                self._say_ran(running[0].side)
            if time.monotonic() > deadline:
                if not running and forced:
                    return None  # the only copy was ended, because a person insisted
                if not running and not guest_killed:
                    raise Violation("guests_lost", f"no QEMU runs the guest: {states}; {unsettled}\n{self.words()}")
                if not unsettled:
                    break
                raise Violation("restarts_failed", f"not settled in {seconds} s: {unsettled}\n{self.words()}")
            time.sleep(0.2)
        return running[0].side if running else None

    def _noticed(self):
        """Whether a status says that somebody ran a guest who must not have."""
        with contextlib.suppress(_presync.Refused):
            return any(matter["phase"] in ("waiting", "ran-untold") and matter["for_a_person"]
                       for matters in self.open_matters().values() for matter in matters)
        return False

    def _say_ran(self, side):
        """Somebody ran the guest where it waited, and it runs nowhere else: a person says that it is the one."""
        with contextlib.suppress(_presync.Refused):
            self.ask(side, "settle", NAME, "ran")

    def _end_stray(self, running):
        """The one at the target that nobody told to run: its record says so."""
        for side, matters in self.open_matters().items():
            for matter in matters:
                if matter["phase"] in ("waiting", "ran-untold"):
                    for qemu in running:
                        if qemu.side == side:
                            os.kill(qemu.pid, signal.SIGKILL)
        time.sleep(0.3)

    def _decide_by_hand(self):
        """The guest runs nowhere: what docs/reliability.md, "What only a person can decide", says to do then. On the
        source it goes on with the copy there; on the target it is said never to have run."""
        self.decided_by_hand = True
        for side in self.two.hosts:
            with contextlib.suppress(_presync.Refused):
                if any(s["name"] == NAME and s["state"] == "in-doubt" for s in self.daemons[side].ask_status()["guests"]):
                    self.ask(side, "settle", NAME, "here")
        for side, matters in self.open_matters().items():
            for matter in matters:
                if matter["role"] == "target":
                    how = "never-ran"  # its disks were not written to since: the lab's guest has none of its own
                else:
                    how = "here" if matter["phase"] == "given-up" else "forget"
                with contextlib.suppress(_presync.Refused):
                    self.ask(side, "settle", NAME, how)

    def _unsettled(self, running):
        try:
            for side, matters in self.open_matters().items():
                if matters:
                    return f"open on {side}: {matters}"
            for side in self.two.hosts:
                for session in self.daemons[side].ask_status()["guests"]:
                    if session["state"] in ("launching", "in-doubt", "stuck"):
                        return f"session on {side} is {session['state']}: {session['problem']}"
        except _presync.Refused as error:
            return str(error)
        return ""

    def check_guest(self, side):
        """The guest's own check of its memory, counter and file, where it runs now."""
        self.attach_readers()
        try:
            self.reader.wait_beat(side, 30)
            answer = self.reader.command("check", 60)
        except AgentError as error:
            raise Violation("guests_lost", f"the guest on {side} says nothing: {error}") from error
        bad = {k: v for k, v in answer.items() if k in ("pages_bad", "file_bad", "counter_bad") and v}
        if bad:
            raise Violation("pages_differing", f"the guest finds its memory wrong: {answer}")
        beats = self.reader.result()
        if beats.doubled or beats.backwards:
            raise Violation("guests_doubled", f"beats came twice or out of order: {beats}")
        self._check_reader(side)
        return answer

    def _check_reader(self, side):
        """What it reads from its slow disk is right."""
        if not self.disk:
            return
        qemu = self.qemu_on(side)
        booted_here = qemu is not None and "boot" in qemu.watch
        reader = Reader(self._serial if booted_here else f"{self.folder}/{side}.serial")
        report = reader.await_rounds(2, reader.size())
        if report["wrong_at_once"] or report["wrong_later"]:
            raise Violation("pages_differing", f"the guest read what its disk does not hold: {report}\n{self.words()}")
