"""The fault campaign with real processes: many runs over one Pair, and what came of them."""

import contextlib
import random
import sys
import time

from . import guest as _guest
from . import presync as _presync
from .faults import FAULTS, Run, draw
from .pair import Pair, Violation
from .slow_disk import SlowDisk, disk_arguments

COUNTS = ("guests_lost", "guests_doubled", "pages_differing", "restarts_failed", "doubled_by_force", "doubled_unnoticed")
# On a busy machine the kernel's own test of its timer fails before the guest has got any time.
AGENT = "presync.area_mb=12 presync.pages_s=1500 no_timer_check"


def small_guest(folder, memory_mb=128, disk=None):
    """The smallest guest that checks itself; with a slow disk it reads that as well, and compares every byte."""
    workload = "reads" if disk else "hammer"
    image = _guest.image_for(workload)
    arguments, device = disk_arguments(disk.path) if disk else ((), "")
    return _guest.GuestSpec(image=image, data_disk=_guest.copy_data_disk(image, folder), workload=workload,
                            kernel_args=f"{AGENT} presync.reads=direct:{device}" if disk else AGENT,
                            memory_mb=memory_mb, extra=tuple(arguments))


def run_seed(seed, number):
    """The seed of run `number` of the campaign `seed`: --run replays it alone."""
    return random.Random(f"{seed}/{number}")


class Campaign:
    """Keeps one pair alive between runs; a fresh one after a violation."""

    def __init__(self, runs, seed, faults=None, only=None, say=print):
        self.numbers = [only] if only is not None else range(runs)
        self.seed = seed
        self.faults = faults or list(FAULTS)
        self.say = say
        self.result = {"runs": 0, "seed": seed, "real": True, "by_fault": {}, **{name: 0 for name in COUNTS},
                       "violations": []}
        self._stack = contextlib.ExitStack()
        self._pair = None

    def __call__(self):
        began = time.monotonic()
        try:
            for number in self.numbers:
                self._one(number)
        except KeyboardInterrupt:
            self.say("interrupted: what was run so far counts")
        finally:
            self._stack.close()
        self.result["seconds"] = round(time.monotonic() - began, 1)
        self._look_for_faults_that_never_came()
        return self.result

    def _look_for_faults_that_never_came(self):
        """A campaign whose faults do not strike would be well whatever presync does."""
        for fault, row in self.result["by_fault"].items():
            if row["runs"] >= 3 and row["struck"] == 0:
                text = f"{fault}: {row['runs']} runs, and it never struck: the campaign itself is broken"
                self.result["violations"].append({"run": None, "plan": fault, "what": text})
                self.say(text)

    def _fresh_pair(self):
        self._stack.close()
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(_presync.run_folder())
        disk = self._stack.enter_context(SlowDisk(folder))
        self._pair = self._stack.enter_context(Pair(folder, small_guest(folder, disk=disk), insecure=True, disk=disk))

    def _one(self, number):
        plan = draw(run_seed(self.seed, number), number, self.faults)
        row = self.result["by_fault"].setdefault(plan.fault, {"runs": 0, "struck": 0})
        began = time.monotonic()
        run = None
        try:
            if self._pair is None:
                self._fresh_pair()
            run = Run(self._pair, plan, awaits_sync=False)
            outcome = run()
            if outcome == "guest killed":
                self._pair.boot(self._pair.here)
        except Violation as violation:
            outcome = violation.kind
            self.result[violation.kind] += 1
            if outcome == "doubled_by_force":  # counted, and no fault of presync's
                self.say(f"run {number}: {plan}: {outcome}")
                self._count(number, plan, row, run, outcome, began)
                self._pair = None
                return
            self.result["violations"].append({"run": number, "plan": str(plan), "what": str(violation)[:4000]})
            self.say(f"run {number}: {plan}: {violation}")
            self.say(f"replay: tests/fault_campaign --real --seed {self.seed} --run {number}")
            self._pair = None
        self._count(number, plan, row, run, outcome, began)

    def _count(self, number, plan, row, run, outcome, began):
        self.result["runs"] += 1
        row["runs"] += 1
        struck = bool(run and (run.struck.is_set() or plan.fault == "none"))
        row["struck"] += struck
        row["decided by hand"] = row.get("decided by hand", 0) + bool(run and run.decided_by_hand)
        row[outcome] = row.get(outcome, 0) + 1
        by_step = row.setdefault("at", {})
        by_step[plan.where] = by_step.get(plan.where, 0) + struck
        self.say(f"run {number:4d}: {outcome:12s} {time.monotonic() - began:5.1f} s  {plan}")
        sys.stdout.flush()
