"""The neighbour test: does a sync leave an iperf3 flow on the same link what it had alone?

Three stretches: the flow alone, the flow and the sync, the sync alone.  The guest writes much more than the link
carries, so the sync always wants more than it gets.
"""

import json
import statistics
import subprocess
import threading
import time

from . import guest as _guest
from . import hosts as _hosts
from . import presync as _presync

FLOW_S = 0.5  # iperf3's interval
SAMPLE_S = 0.25
SETTLE_S = 2  # at the edges of a stretch, not counted
MIN_KEPT = 0.9  # of what the flow has alone


class Flow:
    """One iperf3 flow from source to target, and its rate in each interval."""

    def __init__(self, two, seconds):
        self._server = two.popen("target", ["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        self.began = time.monotonic()
        self._client = two.popen("source", ["iperf3", "-c", two.address["target"], "-t", str(seconds), "-i",
                                            str(FLOW_S), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 text=True)

    def rates(self):
        """[(seconds since the flow began, Mbit/s)], once it is over."""
        said, errors = self._client.communicate()
        self._server.wait(10)
        answer = json.loads(said)
        if "error" in answer:
            raise _hosts.LabError(f"iperf3: {answer['error']} {errors}")
        return [((i["sum"]["start"] + i["sum"]["end"]) / 2, i["sum"]["bits_per_second"] / 1e6)
                for i in answer["intervals"]]


class SyncMeter:
    """Samples what the sync has put on the wire."""

    def __init__(self, move, began):
        self.samples = []  # (seconds, Mbit/s on the wire, Mbit/s allowed by the pacer)
        self._move, self._began, self._ends = move, began, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        last_bytes, last = None, 0
        while not self._ends.wait(SAMPLE_S):
            status, now = self._move.status(), time.monotonic()
            if last_bytes is not None:
                self.samples.append((now - self._began, (status["wire_bytes"] - last_bytes) * 8 / (now - last) / 1e6,
                                     status["allowed_bytes_per_s"] * 8 / 1e6))
            last_bytes, last = status["wire_bytes"], now

    def end(self):
        self._ends.set()
        self._thread.join()


def mean_between(samples, begin, end):
    """Mean of the second column, None if there is nothing."""
    values = [s[1] for s in samples if begin <= s[0] < end]
    return statistics.mean(values) if values else None


def run(link_mbit, alone_s=8, both_s=20, after_s=12):
    """The test's figures and its curves."""
    image = _guest.image("text")
    with _presync.run_folder() as folder:
        spec = _guest.GuestSpec(image=image, data_disk=_guest.copy_data_disk(image, folder), workload="hammer",
                                memory_mb=512, kernel_args="presync.area_mb=200")
        with _hosts.TwoHosts(link_mbit) as two, _presync.Move(two, folder, spec, insecure=True) as move:
            time.sleep(3)
            flow = Flow(two, alone_s + both_s)
            time.sleep(alone_s)
            started = time.monotonic() - flow.began
            move.start("--max-launch-time", "100ms")
            meter = SyncMeter(move, flow.began)
            rates = flow.rates()
            ended = alone_s + both_s
            time.sleep(max(0, ended + after_s - (time.monotonic() - flow.began)))
            meter.end()
    alone = mean_between(rates, SETTLE_S, started)
    beside = mean_between(rates, started + SETTLE_S, ended)
    sync_beside = mean_between(meter.samples, started + SETTLE_S, ended)
    sync_after = mean_between(meter.samples, ended + SETTLE_S, ended + after_s)
    worst = min((rate for at, rate in rates if at > started), default=None)
    return {"link_mbit": link_mbit, "flow_alone_mbit": alone, "flow_beside_mbit": beside, "flow_worst_mbit": worst,
            "kept": beside / alone, "holds": beside / alone >= MIN_KEPT, "sync_beside_mbit": sync_beside,
            "sync_after_mbit": sync_after, "speeds_up": sync_after > 2 * sync_beside, "sync_began_s": started,
            "flow_ended_s": ended, "flow": rates, "sync": meter.samples}
