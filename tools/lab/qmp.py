"""A small client of QEMU's monitor protocol, and a migration as stock QEMU does it.

Not thread-safe.  Every wait has a deadline.
"""

import dataclasses
import json
import socket
import time


class QmpError(Exception):
    """QEMU refused a command, closed the monitor, or did not answer in time."""


class Qmp:
    """One connection to a monitor socket; a context manager."""

    def __init__(self, path, seconds=10):
        """Connects, retrying until `seconds` have passed (QEMU may still be starting)."""
        self.path = path
        self._buffer = b""
        self._events = []
        self._last_times = {}
        deadline = time.monotonic() + seconds
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(path)
                break
            except OSError as error:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise QmpError(f"connecting to the monitor {path}: {error}") from error
                time.sleep(0.02)
        self._receive(deadline)  # the greeting
        self.execute("qmp_capabilities")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Closes the connection; QEMU goes on."""
        self._socket.close()

    def execute(self, command, seconds=30, **arguments):
        """Runs a command and returns its result.  `_` in argument names stands for `-`, except in
        names that QEMU writes with `_`: give those in a dictionary `raw`."""
        raw = arguments.pop("raw", None)
        body = raw or {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command}
        if body:
            request["arguments"] = body
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"{command} on {self.path}: {error} (did QEMU end?)") from error
        deadline = time.monotonic() + seconds
        while True:
            message = self._receive(deadline, command)
            if "event" in message:
                self._keep(message)
            elif "error" in message:
                raise QmpError(f"{command} on {self.path}: {message['error']['desc']}")
            elif "return" in message:
                return message["return"]

    def wait_event(self, *names, seconds=30):
        """Returns the first event with one of these names, also one that came earlier and was not
        yet taken.  Other events stay."""
        deadline = time.monotonic() + seconds
        while True:
            for event in self._events:
                if event["event"] in names:
                    self._events.remove(event)
                    return event
            message = self._receive(deadline, f"event {' or '.join(names)}")
            if "event" in message:
                self._keep(message)

    def last_time_of(self, name):
        """When QEMU last emitted this event, seconds of the host's clock; of the events that have been read by now,
        taken or not.  KeyError if it never did."""
        return self._last_times[name]

    def _keep(self, event):
        self._events.append(event)
        at = event["timestamp"]
        self._last_times[event["event"]] = at["seconds"] + at["microseconds"] / 1e6

    def _receive(self, deadline, what="greeting"):
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise QmpError(f"{what} on {self.path}: no answer in time")
            self._socket.settimeout(left)
            try:
                got = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise QmpError(f"{what} on {self.path}: {error}") from error
            if not got:
                raise QmpError(f"{what} on {self.path}: QEMU closed the monitor (did it end?)")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


@dataclasses.dataclass
class StockResult:
    """What a stock migration took.  Times in milliseconds."""

    wall_ms: float  # the command `migrate` to the target running, by the host's clock
    total_ms: int  # QEMU's own account of the same, which starts and ends a little differently
    stopped_ms: float  # the source's event STOP to the target's RESUME, both stamped by QEMU
    downtime_ms: int  # QEMU's own: ends when the source has written its state, before the target has loaded it
    ram_bytes: int  # RAM that QEMU sent
    pages_a_second: int  # dirtied, by QEMU's last estimate
    rounds: int


class _Settings:
    """Sets capabilities and parameters on both sides."""

    def __init__(self, capabilities, parameters):
        self.capabilities = [{"capability": name, "state": bool(state)}
                             for name, state in (capabilities or {}).items()]
        self.parameters = parameters or {}

    def apply(self, qmp):
        if self.capabilities:
            qmp.execute("migrate-set-capabilities", capabilities=self.capabilities)
        if self.parameters:
            qmp.execute("migrate-set-parameters", raw=self.parameters)


def stock_migrate(source, target, uri, capabilities=None, parameters=None, seconds=120):
    """Migrates as stock QEMU does, from the monitor `source` to the monitor `target`.

    uri           where the target listens, "tcp:10.231.0.2:4444"
    capabilities  {"postcopy-ram": True, "multifd": True, ...}, set on both sides.  With
                  postcopy-ram the switch to it is ordered as soon as the first round is under way.
    parameters    {"multifd-channels": 4, ...}, set on both sides.  max-bandwidth is 10 Gbyte/s
                  unless given: QEMU's default (128 MiB/s) is near a 1 Gbit/s link's rate.

    The target must have been started with `-incoming defer`; with `-S` it is told to go on when it
    has arrived.  Raises QmpError when QEMU says that it failed; the source runs on then.
    """
    settings = _Settings(capabilities, {"max-bandwidth": 10**10, **(parameters or {})})
    events = _Settings({"events": True}, None)
    for qmp in (source, target):
        events.apply(qmp)
        settings.apply(qmp)
    target.execute("migrate-incoming", raw={"uri": uri})
    begin = time.monotonic()
    source.execute("migrate", raw={"uri": uri})
    try:
        if (capabilities or {}).get("postcopy-ram"):
            _wait_status(source, seconds, "active")
            source.execute("migrate-start-postcopy")
        wall_ms = (_wait_running(target, seconds) - begin) * 1000
        _wait_status(source, seconds, "completed")
    except QmpError as error:
        _explain(source, error, time.monotonic() - begin)
    info = source.execute("query-migrate")
    stopped_ms = (target.last_time_of("RESUME") - source.last_time_of("STOP")) * 1000
    return StockResult(wall_ms=wall_ms, total_ms=info["total-time"], stopped_ms=stopped_ms, downtime_ms=info["downtime"],
                       ram_bytes=info["ram"]["transferred"],
                       pages_a_second=info["ram"]["dirty-pages-rate"],
                       rounds=info["ram"]["dirty-sync-count"])


def _explain(source, error, seconds):
    """Raises QmpError with what the source says; cancels a migration that is still under way."""
    info = source.execute("query-migrate")
    if info.get("status") != "active":
        raise QmpError(f"migration is '{info.get('status')}': "
                       f"{info.get('error-desc', error)}") from error
    source.execute("migrate_cancel")
    ram = info["ram"]
    raise QmpError(f"migration was not over after {seconds:.0f} s and was cancelled: round "
                   f"{ram['dirty-sync-count']}, {ram['remaining'] / 1e6:.0f} MB left "
                   "(does the guest write faster than the link carries?)") from error


def _wait_status(source, seconds, wanted):
    deadline = time.monotonic() + seconds
    while True:
        event = source.wait_event("MIGRATION", seconds=max(0, deadline - time.monotonic()))
        status = event["data"]["status"]
        if status == wanted:
            return
        if status in ("failed", "cancelled", "completed"):
            reason = source.execute("query-migrate").get("error-desc", "no reason given")
            raise QmpError(f"migration is '{status}', not '{wanted}': {reason}")


def _wait_running(target, seconds):
    """Waits until the target's guest runs and returns when that was (time.monotonic())."""
    deadline = time.monotonic() + seconds
    while True:
        status = target.execute("query-status")
        if status["status"] == "running":
            return time.monotonic()
        # Arrived, and started with -S, so that it waits for an order.
        if status["status"] in ("paused", "prelaunch"):
            target.execute("cont")
            return time.monotonic()
        # Events, not a clock, wake us: RESUME, STOP or a step of the migration.
        left = max(0, deadline - time.monotonic())
        target.wait_event("MIGRATION", "RESUME", "STOP", seconds=left)
