"""Talks to the agent in the guest and measures a move with it (protocol: tools/guest/agent.c).

The agent beats on a virtio-serial port.  A move is seen by reading the port's socket of *both*
QEMUs: beats stop coming from the one and go on from the other, and the host's clock, read when each
line arrives, says how long the guest was away.
"""

import dataclasses
import json
import selectors
import socket
import threading
import time

_MS = 1e3


class AgentError(Exception):
    """The agent did not answer in time, or said that something is wrong."""


@dataclasses.dataclass(frozen=True)
class Beat:
    """One beat.  `guest_ns` is the guest's CLOCK_MONOTONIC, `host` this machine's, in seconds."""

    number: int
    guest_ns: int
    host: float
    side: str


@dataclasses.dataclass(frozen=True)
class Move:
    """What the beats between two moments say."""

    beats: int
    lost: int  # numbers that never came
    doubled: int  # numbers that came more than once: two guests ran, or one ran twice
    backwards: int  # a beat with a lower number, or guest time, than one that came before it
    switch_ms: float | None  # last beat of one side to first of the next: the downtime as the
    # guest has it, plus up to one beat period.  None: all beats came from one side
    gap_ms: float  # the longest time without a beat, be it the switch or a stall on one side
    gap_from: str  # the sides before and after that gap
    gap_to: str
    first_on_target: float | None  # host time of the first beat from the side "target"

    def clean(self):
        """Nothing lost, doubled or out of order."""
        return self.lost == self.doubled == self.backwards == 0


def judge(beats):
    """Move for a list of beats in the order of their arrival.  Fewer than two beats: AgentError."""
    if len(beats) < 2:
        raise AgentError(f"{len(beats)} beats are too few to judge a move by")
    numbers = {beat.number for beat in beats}
    pairs = list(zip(beats, beats[1:]))
    before, after = max(pairs, key=lambda pair: pair[1].host - pair[0].host)
    return Move(
        beats=len(beats),
        lost=max(numbers) - min(numbers) + 1 - len(numbers),
        doubled=len(beats) - len(numbers),
        backwards=sum(b.number < a.number or b.guest_ns < a.guest_ns for a, b in pairs),
        switch_ms=max(((b.host - a.host) * _MS for a, b in pairs if a.side != b.side),
                      default=None),
        gap_ms=(after.host - before.host) * _MS,
        gap_from=before.side,
        gap_to=after.side,
        first_on_target=next((beat.host for beat in beats if beat.side == "target"), None),
    )


class BeatReader:
    """Reads the agent's sockets in a thread of its own.  A context manager; thread-safe."""

    def __init__(self, **paths):
        """`paths`: side="/path/of/socket".  Sides are "source" and "target"; see attach."""
        self._changed = threading.Condition()
        self._beats = []
        self._marked = 0
        self._answers = []
        self._problems = []
        self._sockets = {}
        self._rest = {}  # side: bytes of a line that is not complete yet
        self._side = None  # where the last line came from
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._running = True
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)
        self._thread.start()
        try:
            for side, path in paths.items():
                self.attach(side, path)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the thread and the connections."""
        self._running = False
        self._wake.send(b"x")
        self._thread.join()
        for connection in (self._wake, self._woken, *self._sockets.values()):
            connection.close()
        self._selector.close()

    def attach(self, side, path, seconds=10):
        """Connects to the socket of one QEMU, retrying while it starts."""
        deadline = time.monotonic() + seconds
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(path)
                break
            except OSError as error:
                connection.close()
                if time.monotonic() > deadline:
                    raise AgentError(f"connecting to the agent's socket {path}: {error}") from error
                time.sleep(0.02)
        with self._changed:
            self._sockets[side] = connection
            self._rest[side] = b""
        self._selector.register(connection, selectors.EVENT_READ, side)
        self._wake.send(b"x")

    # ---- what a test asks ----

    def wait_beat(self, side=None, seconds=60):
        """Waits for the next beat (from `side`, if given) and returns it."""
        def find():
            return next((b for b in self._beats[start:] if side in (None, b.side)), None)

        with self._changed:
            start = len(self._beats)
            self._wait(find, seconds, f"a beat from {side or 'the guest'}")
            return find()

    def mark(self):
        """The next result() is about what comes from here on (and the last beat before)."""
        with self._changed:
            self._marked = max(0, len(self._beats) - 1)

    def result(self):
        """Move since mark(), or since the start."""
        with self._changed:
            return judge(self._beats[self._marked:])

    def beats(self):
        """A copy of all beats so far."""
        with self._changed:
            return list(self._beats)

    def problems(self):
        """Lines that should not have come: E, L, and what is not of the protocol."""
        with self._changed:
            return list(self._problems)

    def command(self, text, seconds=60):
        """Sends a command to where the guest runs now (the last beat's side) and returns the
        answer's values."""
        wanted = {"check": "C", "work": "W"}[text.split()[0]]
        with self._changed:
            if self._side is None:
                raise AgentError(f"'{text}': no line came from the agent yet")
            self._answers.clear()
            self._problems = [line for line in self._problems if not line.startswith("E ")]
            self._sockets[self._side].sendall(text.encode() + b"\n")

            def found():
                return (any(kind == wanted for kind, _ in self._answers)
                        or any(line.startswith("E ") for line in self._problems))

            self._wait(found, seconds, f"the answer to '{text}'")
            for kind, values in self._answers:
                if kind == wanted:
                    return values
            raise AgentError(f"'{text}': the agent says {self._problems}")

    def _wait(self, condition, seconds, what):
        if not self._changed.wait_for(condition, seconds):
            raise AgentError(f"waited {seconds} s in vain for {what}; lines out of place: "
                             f"{self._problems[-3:]}")

    # ---- the thread ----

    def _run(self):
        while self._running:
            for key, _ in self._selector.select():
                try:
                    got = key.fileobj.recv(65536)
                except OSError:
                    got = b""
                host = time.monotonic()
                if key.data is None:
                    continue  # woken up: look at what changed
                if not got:  # this QEMU has ended
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()
                    continue
                with self._changed:
                    self._take(key.data, got, host)
                    self._changed.notify_all()

    def _take(self, side, got, host):
        *lines, self._rest[side] = (self._rest[side] + got).split(b"\n")
        for line in lines:
            if side != self._side and not _whole(line):
                # The move fell into this line: its beginning came out of the other QEMU.
                for other in self._rest:
                    if other != side and _whole(self._rest[other] + line):
                        line, self._rest[other] = self._rest[other] + line, b""
            self._side = side
            self._parse(side, line.decode(errors="replace"), host)

    def _parse(self, side, line, host):
        kind, _, rest = line.partition(" ")
        try:
            if kind == "B":
                number, guest_ns = map(int, rest.split())
                self._beats.append(Beat(number, guest_ns, host, side))
            elif kind in ("C", "W"):
                self._answers.append((kind, json.loads(rest)))
            elif kind != "H":
                self._problems.append(line)
        except ValueError:
            self._problems.append(line)


def _whole(line):
    """Whether a line can be one of the protocol's, not the end of one."""
    if line.startswith(b"B "):
        return len(line.split()) == 3
    return line.startswith((b"C {", b"W {", b"H {", b"L ", b"E "))
