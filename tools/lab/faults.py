"""What can be broken around a real handover, and one run of the campaign (tests/fault_campaign --real)."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import threading
import time

from . import hosts
from . import presync as _presync
from .pair import NAME, TOOLS, Qemu, Violation, alive
from .qmp import Qmp, QmpError
from .proxies import damage

# Where a fault may come: when this control message is about to pass, or after some time.
STEPS = ("begin-handover", "handover-ready", "state-chunk", "load", "loaded", "run", "running")
WHERE_SYNC, WHERE_LAUNCH = "sync", "launch"
QMP_COMMANDS = ("query-status", "migrate-set-capabilities", "migrate", "getfd", "query-migrate", "migrate-continue",
                "quit", None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run's fault; everything in it was drawn from the run's seed."""

    fault: str
    where: str  # of STEPS, or WHERE_SYNC, WHERE_LAUNCH
    after_s: float  # with WHERE_SYNC and WHERE_LAUNCH: this long after the sync or the launch began
    lasts_s: float  # faults that end
    verify: bool
    first: bool  # at a step: before the message passes (else just after)
    seed: int
    detail: str = ""

    def __str__(self):
        when = f"{'before' if self.first else 'after'} {self.where}" if self.where in STEPS else (
            f"{self.after_s * 1e3:.0f} ms into the {self.where}")
        lasts = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.fault}{' ' + self.detail if self.detail else ''} {when}{lasts}"


# name: how long it may last, in seconds (0: it does not end by itself).
FAULTS = {
    "none": 0,
    "kill source presyncd": 0, "kill target presyncd": 0, "kill source QEMU": 0, "kill target QEMU": 0,
    "end target QEMU": 0,  # in order: its memory backend has discard-data=on, so it empties the copy
    "stop source presyncd": 3, "stop target presyncd": 3, "stop source QEMU": 3, "stop target QEMU": 3,
    "link down": 10, "link flaps": 2, "connections reset": 0,
    "control truncated": 0, "control duplicated": 0, "control corrupted": 0, "control delayed": 3,
    "target full": 0,
    "QMP stalls": 4, "QMP answers an error": 0, "QMP closes": 0,
    "slow reads": 10, "a read hangs": 8,
}
SLOW_READS_MS = 100
# What people and services do beside presync (--actors): each at a step of the handover, half of them with a presyncd
# killed at the same moment, so that the guest's fate is open for a while.
ACTORS = {"cont at the source": 0, "cont at the waiting QEMU": 0, "pause at the target": 0, "quit at the target": 0,
          "QEMU's own migration": 0, "a service asks may-start": 0, "a service asks nobody": 0,
          "settle right": 0, "settle wrong": 0,
          "settle wrong with --force": 0}
_AT_STEPS_ONLY = ("control truncated", "control duplicated", "control corrupted", "control delayed")
_NOT_AT_STEPS = ("target full", "QMP stalls", "QMP answers an error", "QMP closes", "none")


def draw(rng, number, faults):
    """The plan of run `number`: every fault in turn, so that all come equally often."""
    fault = faults[number % len(faults)]
    longest = {**FAULTS, **ACTORS}[fault]
    steps = list(STEPS)
    if fault not in _AT_STEPS_ONLY:
        steps += [WHERE_LAUNCH] * 3 + [WHERE_SYNC]
    if fault in ACTORS:
        steps = ["loaded", "run", "run", "running", "running"] if fault != "QEMU's own migration" else [WHERE_SYNC]
    where = rng.choice([WHERE_LAUNCH, WHERE_SYNC] if fault in _NOT_AT_STEPS else steps)
    if fault == "target full":
        where = rng.choice((WHERE_SYNC, "before-start"))
    # Mostly short, now and then as long as it may be.
    lasts = 0.1 + (longest - 0.1) * rng.random() ** 3 if longest else 0.0
    detail = str(rng.choice(QMP_COMMANDS) or "") if fault.startswith("QMP") else ""
    return Plan(fault=fault, where=where, after_s=rng.random() * (0.15 if where == WHERE_LAUNCH else 0.5),
                lasts_s=lasts, verify=rng.random() < 0.5, first=rng.random() < 0.5, seed=rng.getrandbits(32),
                detail=detail)


class Run:
    """One run over a Pair: sync, launch, fault, heal, decide."""

    def __init__(self, pair, plan, awaits_sync=True):
        """Without `awaits_sync` the launch is ordered while the first pass goes on (but for every other fault in the
        sync): an order lifts the pace, which on a busy host makes the first pass take a minute."""
        self.pair = pair
        self.plan = plan
        self.awaits_sync = awaits_sync or (plan.where == WHERE_SYNC and plan.seed % 2 == 0)
        self.guest_killed = False
        self.struck = threading.Event()  # the fault came
        self.over = threading.Event()  # the run heals: a fault that lasts ends now
        self._threads = []
        self._striking = threading.Lock()  # a strike is whole before healing begins
        self.report = None
        self.decided_by_hand = False  # presync left it to a person
        self.forced = False  # a person insisted although presync said otherwise
        self.paused = None  # the monitor of a guest that its operator paused
        self.moved_away = None  # the monitor of one that was moved by QEMU's own migration

    def __call__(self):
        """The outcome: "moved", "stayed", "guest killed".  Raises Violation."""
        pair, plan = self.pair, self.plan
        source = pair.here
        self._sync()
        before = pair.check_guest(source)
        if plan.where == WHERE_SYNC:
            self._later(plan.after_s)
            time.sleep(plan.after_s + min(plan.lasts_s, 1))
        elif plan.where not in (WHERE_LAUNCH, "before-start"):
            pair.proxies[source].on_frame = self._on_frame
        launch = self._launch()
        if plan.where == WHERE_LAUNCH:
            self._later(plan.after_s, launch)
        self._await_launch(launch)
        with self._striking:
            self.over.set()
        for thread in self._threads:
            thread.join(30)
        pair.heal()
        with contextlib.suppress(OSError):
            launch.wait(60)
        self._actors_end()
        side = pair.decide(self.guest_killed, forced=self.forced)
        if self.plan.fault == "a service asks may-start" and side is not None:
            self._service_asks(source, side)
        if self.plan.fault == "a service asks nobody" and side not in (None, source):
            self._service_asks_nobody(source)
        self.decided_by_hand = pair.decided_by_hand
        if side is None:
            return "guest killed"
        after = pair.check_guest(side)
        if after["counter"] < before["counter"]:
            raise Violation("pages_differing", f"the guest's counter went back: {before} then {after}")
        if side != source:
            self._old_one_gone(source)
            pair.monitor = f"{pair.daemons[side].folder}/run/guests/{NAME}.d/qmp.front"
            pair.here, pair.there = side, source
        return "moved" if side != source else "stayed"

    def _sync(self):
        """A session that is in sync, over the proxy if the fault needs it."""
        pair, plan = self.pair, self.plan
        through = plan.where in STEPS or plan.fault in ("connections reset", *_AT_STEPS_ONLY)
        if plan.where == "before-start":
            self._full_start()
        session = pair.session()
        if session and session["state"] in ("moved", "failed", "stopped"):
            session = None
        if session and (session["to"].startswith("127.") != through):
            pair.ask(pair.here, "stop", NAME)
            session = None
        if not session:
            self._start(through)
        pair.await_state(("syncing",) if self.awaits_sync else ("syncing", "first-pass"), 90, "the sync")
        pair.attach_readers()

    def _start(self, through):
        """A target that was just healed may still be busy with what was before; and where launches were
        disturbed, as they are here, presync learns that the host is slow and promises less."""
        deadline = time.monotonic() + 40
        promises = ["100ms", "200ms", "400ms", "800ms", "1500ms", "3s"]
        while True:
            try:
                self.pair.ask(self.pair.here, "start", NAME, "--qmp", self.pair.monitor, "--to", self.pair.to(through),
                              "--max-launch-time", promises[0])
                return
            except _presync.Refused as error:
                if "can't be kept" in str(error) and len(promises) > 1:
                    promises.pop(0)
                    continue
                if time.monotonic() > deadline:
                    raise Violation("restarts_failed", f"presync start: {error}\n{self.pair.words()}") from error
                time.sleep(0.2)

    def _full_start(self):
        """A start towards a host without room must be refused and leave nothing."""
        pair = self.pair
        if pair.session() and pair.session()["state"] not in ("moved", "failed", "stopped"):
            pair.ask(pair.here, "stop", NAME)
        pair.fill_target()
        try:
            pair.ask(pair.here, "start", NAME, "--qmp", pair.monitor, "--to", pair.to(False),
                     "--max-launch-time", "3s")
            with contextlib.suppress(_presync.Refused):
                pair.ask(pair.here, "stop", NAME)
        except _presync.Refused:
            pass
        self.struck.set()
        pair.heal()

    def _launch(self):
        daemon = self.pair.daemons[self.pair.here]
        argv = [_presync.build_folder() / "tools" / "presync", "--socket", daemon.socket, "launch", NAME, "--json",
                "--wait", *(["--verify"] if self.plan.verify else [])]
        return subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    def _await_launch(self, launch):
        """A launch ends by itself; one that hangs on a fault that lasts is waited for after healing."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, _ = launch.communicate(timeout=25 if self.awaits_sync else 60)
            if launch.returncode == 0 and out.strip():
                import json
                self.report = json.loads(out.splitlines()[-1])
                if self.report.get("pages_differing"):
                    raise Violation("pages_differing", f"{self.report}")

    # ---- striking ----

    def _later(self, seconds, launch=None):
        """So long from now on; with `launch`, from the beginning of its handover on."""
        def strike():
            while launch is not None and launch.poll() is None and not self.over.is_set():
                with contextlib.suppress(_presync.Refused):
                    session = self.pair.session()
                    if session and session["state"] not in ("connecting", "first-pass", "syncing"):
                        break
                time.sleep(0.005)
            time.sleep(seconds)
            if not self.over.is_set():
                self._strike()

        thread = threading.Thread(target=strike, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _on_frame(self, step, forward, frame):
        if step != self.plan.where or self.struck.is_set():
            return None
        if self.plan.fault.startswith("control"):
            self.struck.set()
            kind = {"truncated": "truncate", "duplicated": "duplicate", "corrupted": "corrupt"}.get(
                self.plan.fault.split()[1])
            if kind:
                return damage(kind, frame, self.plan.seed)
            self.over.wait(self.plan.lasts_s)  # delayed
            return None
        if not self.plan.first:
            forward()
        self._strike()
        return None

    def _strike(self):
        """The fault, now. One that lasts ends in a thread of its own."""
        with self._striking:
            if not self.over.is_set():
                self.struck.set()
                self._hit()

    def _hit(self):
        what, _, whom = self.plan.fault.partition(" ")
        pair = self.pair
        if self.plan.fault in ACTORS:
            self._act()
        elif what in ("kill", "stop", "end"):
            self._signal(what, whom)
        elif self.plan.fault == "connections reset":
            pair.proxies[pair.here].reset_all()
        elif self.plan.fault == "target full":
            pair.fill_target()
        elif what == "QMP":
            kind = {"stalls": "stall", "answers an error": "error", "closes": "close"}[whom]
            pair.fronts.of(pair.monitor).fault = (kind, self.plan.detail or None)
            self._ends(pair.fronts.heal)
        elif self.plan.fault == "link down":
            pair.two.link_down()
            self._ends(pair.two.link_up)
        elif self.plan.fault == "link flaps":
            self._ends(pair.two.link_up, flap=True)
        elif self.plan.fault in ("slow reads", "a read hangs"):
            self._slow_down_reads()

    def _slow_down_reads(self):
        """All reads that begin until the fault ends take longer; or those of the next moment hang for its whole time."""
        disk = self.pair.disk
        if self.plan.fault == "slow reads":
            disk.set_delay(SLOW_READS_MS)
            self._ends(lambda: disk.set_delay(self.pair.READS_MS))
            return
        disk.set_delay(self.plan.lasts_s * 1000)
        time.sleep(0.1)
        disk.set_delay(self.pair.READS_MS)

    def _act(self):
        pair, plan = self.pair, self.plan
        if plan.seed % 2 and plan.fault not in ("QEMU's own migration", "quit at the target"):
            self._signal("kill", ("source", "target")[plan.seed // 2 % 2] + " presyncd")
        source, target = pair.qemu_on(pair.here), pair.qemu_on(pair.there)

        def told(qemu, command, **arguments):
            with contextlib.suppress(QmpError, OSError, AttributeError), Qmp(qemu.watch, 5) as qmp:
                return qmp.execute(command, 10, **arguments) is not None
            return False

        if plan.fault == "cont at the source":
            told(source, "cont")
        elif plan.fault == "cont at the waiting QEMU":
            told(target, "cont")
        elif plan.fault == "pause at the target":
            if target and pair.run_state(target) == "running" and told(target, "stop"):
                self.paused = target
        elif plan.fault == "quit at the target":
            if target:
                self.guest_killed = True  # it ends some milliseconds later; decide() looks first whether it runs
                told(target, "quit")
        elif plan.fault == "QEMU's own migration":
            if told(source, "migrate", uri="exec:cat >/dev/null"):
                self.moved_away = source
        elif plan.fault.startswith("settle"):
            self._in_a_while(self._settle)

    def _in_a_while(self, what):
        thread = threading.Thread(target=lambda: (time.sleep(self.plan.seed % 40 / 10), what()), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _settle(self):
        """A person looks at both hosts and says what they saw, or the opposite; without --force the opposite only while
        both presyncds are up, for what nobody can contradict is believed."""
        pair = self.pair
        target = pair.qemu_on(pair.there)
        runs_there = target is not None and pair.run_state(target) == "running"
        wrong = "wrong" in self.plan.fault
        force = ["--force"] if "--force" in self.plan.fault else []
        if not runs_there and target is not None and not wrong:
            return  # it may yet be run: nobody can be certain
        if wrong and not force and not all(alive(daemon.process.pid) for daemon in pair.daemons.values()):
            return
        self.forced = self.forced or bool(force)
        with contextlib.suppress(_presync.Refused, OSError):
            pair.ask(pair.here, "settle", NAME, "there" if runs_there != wrong else "here", *force)

    def _actors_end(self):
        """Who paused a guest goes on with it. One that QEMU moved itself must stand still until its operator, who knows
        that it went nowhere, resumes it."""
        if self.moved_away:
            time.sleep(4)  # recovery and the session have looked at it since
            state = self.pair.run_state(self.moved_away)
            if state == "running":
                raise Violation("guests_doubled", f"it was moved away by QEMU's own migration, and runs\n{self.pair.words()}")
        for qemu in (self.paused, self.moved_away):
            if qemu is None:
                continue
            with contextlib.suppress(QmpError, OSError), Qmp(qemu.watch, 5) as qmp:
                if qmp.execute("query-status", 10)["status"] in ("paused", "postmigrate"):
                    qmp.execute("cont", 10)

    def _service_asks(self, source, side):
        """What ExecCondition= of the guest's unit on either host would hear now."""
        for host in self.pair.two.hosts:
            may = self.pair.may_start(host)
            if host == source and side != source and may:
                raise Violation("doubled_unnoticed", f"may-start lets {host} start a guest that runs on {side}")
            if host == side and not may:
                raise Violation("restarts_failed", f"may-start refuses {host}, where the guest runs\n{self.pair.words()}")

    def _service_asks_nobody(self, source):
        """A unit with Restart=always and no ExecCondition=: what comes up where the guest was must be held still and shown."""
        pair = self.pair
        watch = f"{pair.folder}/restarted.watch"
        front = pair.monitor
        monitor = pathlib.Path(front.removesuffix(".front"))
        deadline = time.monotonic() + 10
        while monitor.parent.name == f"{NAME}.d" and monitor.parent.exists() and time.monotonic() < deadline:
            time.sleep(0.05)  # presync started this one, and clears its folder away: no service would be there before
        monitor.parent.mkdir(exist_ok=True)
        process = pair.two.popen(source, [
            TOOLS / "fronted", f"{pair.folder}/fronts", front, "qemu-system-x86_64", "-machine", "q35", "-m", "16",
            "-nodefaults", "-display", "none", "-qmp", f"unix:{monitor},server=on,wait=off",
            "-qmp", f"unix:{watch},server=on,wait=off"])
        try:
            qemu = Qemu(process.pid, source, watch)
            deadline = time.monotonic() + 20
            while pair.run_state(qemu) != "paused" or not self._restart_is_shown(source):
                if time.monotonic() > deadline:
                    raise Violation("doubled_unnoticed", f"a service started the guest again on {source}: it is "
                                    f"{pair.run_state(qemu)}\n{pair.words()}")
                time.sleep(0.1)
        finally:
            hosts.stop(process)
        pair.may_start(source, clear=True)

    def _restart_is_shown(self, side):
        return any("somebody started a QEMU" in matter["known"] for matter in self.pair.open_matters()[side])

    def _ends(self, undo, flap=False):
        def wait():
            until = time.monotonic() + self.plan.lasts_s
            while flap and time.monotonic() < until and not self.over.is_set():
                self.pair.two.link_down()
                time.sleep(0.1)
                self.pair.two.link_up()
                time.sleep(0.15)
            self.over.wait(max(0, until - time.monotonic()))
            undo()

        if self.plan.lasts_s:
            thread = threading.Thread(target=wait, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _signal(self, what, whom):
        pair = self.pair
        side = pair.here if whom.startswith("source") else pair.there
        if whom.endswith("presyncd"):
            pid = pair.daemons[side].process.pid
        else:
            qemu = pair.qemu_on(side)
            if qemu is None:
                return
            pid = qemu.pid
        with contextlib.suppress(ProcessLookupError):
            if what in ("kill", "end"):
                if whom.endswith("QEMU"):
                    self._note_guest_killed(side)
                os.kill(pid, signal.SIGKILL if what == "kill" else signal.SIGTERM)
                if whom.endswith("presyncd"):
                    pair.daemons[side].process.wait()
                return
            os.kill(pid, signal.SIGSTOP)

        def go_on():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        self._ends(go_on)

    def _note_guest_killed(self, side):
        """The source's QEMU is the guest until it was given up; the target's from the order to run on."""
        told = self.plan.where == "running" or (self.plan.where == "run" and not self.plan.first)
        if side == self.pair.here:
            self.guest_killed = True  # or it has moved already; decide() looks for it first
        elif told or self.plan.where == WHERE_LAUNCH:
            self.guest_killed = True

    def _old_one_gone(self, source):
        """The QEMU that the guest left must end."""
        deadline = time.monotonic() + 20
        while (qemu := self.pair.qemu_on(source)) is not None:
            if time.monotonic() > deadline and alive(qemu.pid):
                raise Violation("restarts_failed", f"the old QEMU on {source} does not end\n{self.pair.words()}")
            time.sleep(0.05)
