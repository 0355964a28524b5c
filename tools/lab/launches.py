"""One launch of one guest, by presync or by a mode of stock QEMU: what the experiment compares.

Each launch has a guest of its own, boots it, waits until its workload is under way, lets a random time pass and moves
it from one host to the other.  Both ways get the same guest (memory, workload, agent), the same link and the same
waits.  Times are milliseconds, of the host's clock.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
import threading
import time

from . import agent as _agent
from . import guest as _guest
from . import hosts as _hosts
from . import presync as _presync
from . import qmp as _qmp

PRESYNC = "presync"
# name: (capabilities, parameters) of stock QEMU.  multifd: as many channels as presync has streams.
STOCK = {
    "pre-copy": ({}, {}),
    "multifd": ({"multifd": True}, {"multifd-channels": 4}),
    "multifd-zstd": ({"multifd": True}, {"multifd-channels": 4, "multifd-compression": "zstd"}),
    "xbzrle": ({"xbzrle": True}, {"xbzrle-cache-size": 64 << 20}),
    "auto-converge": ({"auto-converge": True}, {}),
    "post-copy": ({"postcopy-ram": True}, {}),
}
METHODS = (PRESYNC, *STOCK)
# Modes that are no match, with the reason: printed, not hidden.
LEFT_OUT = {
    "rdma": "this link has no RDMA device",
    "compress": "QEMU's old per-page compression threads: deprecated in 8.2, removed in 9.1; multifd-zstd is its heir",
    "background-snapshot": "saves to a file; the guest goes on at the source",
    "cpr": "restarts QEMU on the same host",
}
LOOP_MS = 4000  # of the guest's loop across a move
AFTER_S = 2  # of beats after a move
SAMPLE_S = 0.2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a launch is to be."""

    spec: _guest.GuestSpec
    link_mbit: int
    delay_s: float  # from the workload under way (presync: and in sync) to the order
    promise: str  # presync's --max-launch-time
    loop: bool  # whether the guest counts its own work across the move


def work_begins(reader, workload, seconds=120):
    """Waits until the workload has made some steps."""
    deadline = time.monotonic() + seconds
    while workload != "idle" and reader.command("check")["workload_steps"] < 3:
        if time.monotonic() > deadline:
            raise _hosts.LabError(f"the workload {workload} did not begin")
        time.sleep(0.2)


def speeds(reader, bursts=20, burst_ms=200):
    """Units of the agent's work in a second of the guest's processor, burst by burst."""
    found = (reader.command(f"work {burst_ms}") for _ in range(bursts))
    return [b["units"] / b["cpu_ns"] * 1e9 for b in found]


def slow_level_ends(speed):
    """The speed that divides a machine's two levels, or 0 where there is but one.  A virtual machine whose host runs others
    jumps between two speeds, about 1 : 1.6 apart, every few seconds.  Two means, of the logarithms."""
    logs = sorted(math.log(s) for s in speed)
    low, high = logs[0], logs[-1]
    for _ in range(20):
        middle = (low + high) / 2
        below, above = [v for v in logs if v <= middle], [v for v in logs if v > middle]
        if not above:
            return 0
        low, high = statistics.fmean(below), statistics.fmean(above)
    return math.exp((low + high) / 2) if high - low > math.log(1.2) else 0


def lost(alone, synced):
    """What a guest loses by a sync, from bursts in both states: per cent of the median speed, level by level, weighted by the
    bursts while synced; and the share of bursts on the slow level in each, for a sync that moves the guest there would hide
    otherwise.  A level with fewer than 10 bursts in either state is left out."""
    border = slow_level_ends(alone + synced)
    found = []
    for fast in (False, True):
        one, other = ([s for s in speed if (s > border) == fast] for speed in (alone, synced))
        if min(len(one), len(other)) >= 10:
            found.append({"fast": fast, "bursts_alone": len(one), "bursts_synced": len(other),
                          "speed_alone": statistics.median(one), "speed_synced": statistics.median(other),
                          "lost_percent": 100 * (1 - statistics.median(other) / statistics.median(one))})
    total = sum(level["bursts_synced"] for level in found)
    return {"levels": found,
            "lost_percent": sum(v["lost_percent"] * v["bursts_synced"] for v in found) / total if total else None,
            "slow_percent_alone": 100 * sum(s <= border for s in alone) / len(alone),
            "slow_percent_synced": 100 * sum(s <= border for s in synced) / len(synced)}


def level_text(cost):
    """What `lost` found, level by level, in words."""
    each = ", ".join(f"{'fast' if v['fast'] else 'slow'} level {v['lost_percent']:.1f} % by {v['bursts_alone']} and"
                     f" {v['bursts_synced']} bursts" for v in cost["levels"])
    return (f"{each}; on the machine's slow level {cost['slow_percent_alone']:.0f} % of the bursts alone,"
            f" {cost['slow_percent_synced']:.0f} % synced")


def slowdown(plan, folder, rounds=8, watch_s=3, settle_s=8):
    """What the sync costs a guest that is not launched: its speed and its longest stall, alone and in sync in turns,
    so that what else this machine does falls on both.  In sync means: when the back-off, of at most 31 scans, knows the
    guest.  Each turn begins a new sync, which knows nothing."""
    turns = []
    with _hosts.TwoHosts(plan.link_mbit) as two, _presync.Move(two, folder, plan.spec, insecure=True) as move:
        work_begins(move.reader, plan.spec.workload)

        def look():
            move.reader.mark()
            time.sleep(watch_s)
            return move.reader.result().gap_ms, speeds(move.reader)

        for _ in range(rounds):
            time.sleep(settle_s / 4)
            stall_alone, alone = look()
            move.start("--max-launch-time", plan.promise)
            move.wait_synced()
            time.sleep(settle_s)
            stall_synced, synced = look()
            move.source_daemon.ask("stop", _presync.NAME)
            turns.append({"stall_alone_ms": stall_alone, "speeds_alone": alone,
                          "stall_synced_ms": stall_synced, "speeds_synced": synced})
    return {"turns": turns, **lost([s for t in turns for s in t["speeds_alone"]], [s for t in turns for s in t["speeds_synced"]]),
            "stall_alone_ms_median": statistics.median(t["stall_alone_ms"] for t in turns),
            "stall_synced_ms_median": statistics.median(t["stall_synced_ms"] for t in turns)}


class Loop:
    """The guest's loop across a move: how much of its work it lost, against its own speed just before."""

    def __init__(self, reader, wanted):
        self._reader = reader
        self._answer = None
        self._thread = None
        if wanted:
            before = reader.command("work 1000")
            self._units_a_ms = before["units"] / before["wall_ns"] * 1e6
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
            time.sleep(1)

    def _run(self):
        with contextlib.suppress(_agent.AgentError):
            self._answer = self._reader.command(f"work {LOOP_MS}", seconds=LOOP_MS / 1000 + 30)

    def result(self):
        """None if it was not wanted or never answered.  The guest's clock stands still while it is stopped, so the
        downtime is not in wall_ns: what is lost beyond it shows here."""
        if self._thread is None:
            return None
        self._thread.join()
        if self._answer is None:
            return None
        wall_ms = self._answer["wall_ns"] / 1e6
        return max(0.0, wall_ms - self._answer["units"] / self._units_a_ms)


def after_move(reader, row, loop):
    """Beats, loop and the guest's own check once it runs on the target."""
    reader.wait_beat("target", 30)
    time.sleep(AFTER_S)
    row["loop_lost_ms"] = loop.result()
    beats = reader.result()
    row["gap_ms"], row["beats_lost"], row["beats_doubled"] = beats.gap_ms, beats.lost, beats.doubled
    check = reader.command("check")
    bad = {k: v for k, v in check.items() if k.endswith(("_bad", "_errors", "_dropped")) and v}
    row["guest"] = "unharmed" if not bad and beats.clean() else f"HARMED: {bad or beats}"


def sample(move, seconds, samples, began):
    """Appends presync's status to `samples`, every 0.2 s."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = move.status()
        samples.append({"t": round(time.monotonic() - began, 2),
                        **{k: status[k] for k in ("state", "residual_pages", "set_point_pages", "rate_bytes_per_s",
                                                  "dirty_pages_per_s", "predicted_launch_ms", "wire_bytes")}})
        time.sleep(SAMPLE_S)


def by_presync(plan, folder):
    """Keeps a guest in sync and launches it."""
    with _hosts.TwoHosts(plan.link_mbit) as two, _presync.Move(two, folder, plan.spec, insecure=True) as move:
        reader = move.reader
        work_begins(reader, plan.spec.workload)
        row = {}
        sent, began, samples = two.bytes_sent("source"), time.monotonic(), []
        move.start("--max-launch-time", plan.promise)
        while move.status()["state"] != "syncing" and time.monotonic() - began < 120:
            sample(move, SAMPLE_S, samples, began)
        move.wait_synced()
        row["first_pass_s"], row["bytes_first_pass"] = time.monotonic() - began, two.bytes_sent("source") - sent
        reader.mark()
        sample(move, max(plan.delay_s, 2), samples, began)
        row["stall_synced_ms"] = reader.result().gap_ms
        loop = Loop(reader, plan.loop)
        row["bytes_before"] = two.bytes_sent("source") - sent
        row["synced_s"] = time.monotonic() - began - row["first_pass_s"]
        reader.mark()
        report = move.source_daemon.ask("launch", _presync.NAME)
        after_move(reader, row, loop)
        row["bytes_after"] = two.bytes_sent("source") - sent - row["bytes_before"]
        row.update(launch_ms=report["launch_ms"], done_ms=report["launch_ms"], downtime_ms=report["downtime_ms"],
                   residual_pages=report["residual_pages"], residual_pages_at_stop=report["residual_pages_at_stop"],
                   set_point_pages=samples[-1]["set_point_pages"], rounds=report["rounds"], steps=report["steps"],
                   timeline=samples)
        return row


def by_stock(plan, folder, mode):
    """The same by QEMU alone.  Raises QmpError when this mode refuses or fails."""
    capabilities, parameters = STOCK[mode]
    with contextlib.ExitStack() as stack:
        two = stack.enter_context(_hosts.TwoHosts(plan.link_mbit))
        start = functools.partial(_guest.Guest, plan.spec, folder=folder)
        source = stack.enter_context(start("source", popen=functools.partial(two.popen, "source")))
        reader = stack.enter_context(source.reader())
        source.wait_boot(reader)
        work_begins(reader, plan.spec.workload)
        target = stack.enter_context(start("target", popen=functools.partial(two.popen, "target"), paused=False))
        reader.attach("target", target.sockets.agent)
        time.sleep(max(plan.delay_s, 2))
        loop = Loop(reader, plan.loop)
        sent = two.bytes_sent("source")
        reader.mark()
        with source.qmp() as one, target.qmp() as other:
            stock = _qmp.stock_migrate(one, other, f"tcp:{two.address['target']}:4444", capabilities, parameters)
        row = {"bytes_before": 0, "launch_ms": stock.wall_ms, "done_ms": max(stock.wall_ms, stock.total_ms),
               "downtime_ms": stock.stopped_ms, "qemus_downtime_ms": stock.downtime_ms, "rounds": stock.rounds}
        after_move(reader, row, loop)
        row["bytes_after"] = two.bytes_sent("source") - sent
        return row


def attempt(what, plan):
    """`what(plan, folder)` with a data disk of its own; what it returns, or {"error": why there is nothing}."""
    with _presync.run_folder() as folder:
        spec = dataclasses.replace(plan.spec, data_disk=_guest.copy_data_disk(plan.spec.image, folder))
        plan = dataclasses.replace(plan, spec=spec)
        try:
            return what(plan, folder)
        except (_hosts.LabError, _qmp.QmpError, _presync.Refused, _agent.AgentError) as error:
            return {"error": str(error).splitlines()[0]}


def launch(method, plan):
    """One launch; a row of figures, or of an error."""
    return attempt(by_presync if method == PRESYNC else functools.partial(by_stock, mode=method), plan)
