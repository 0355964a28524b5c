#!/usr/bin/python3
"""A real QEMU guest moved over RDMA, between two presyncds of one machine that has soft-RoCE.

    qemu_move.py BUILD      inside tools/rdma-vm (see one_machine); prints one line if all is well

The guest is bare_guest.S: it writes into its memory all the time, and counts.  presync compares all memory
(--verify) before it may run on the other side, and its count goes on there.
"""

import os
import pathlib
import struct
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
BUILD = pathlib.Path(sys.argv[1]).resolve()
os.environ["PRESYNC_BUILD"] = str(BUILD)
sys.dont_write_bytecode = True
from lab import hosts, presync  # noqa: E402  (after the path is set)

MEMORY_MB = 32
LAPS_AT = 2 << 20  # where the guest counts


class OneMachine:
    """Stands in for hosts.TwoHosts: both hosts are this machine, at different addresses."""

    hosts = ("source", "target")
    address = {"source": "127.0.0.1", "target": "10.77.1.1"}

    def __init__(self):
        self._processes = []

    def popen(self, _, argv, **options):
        process = subprocess.Popen(list(map(str, argv)), preexec_fn=hosts.die_with_parent, **options)
        self._processes.append(process)
        return process

    def close(self):
        for process in reversed(self._processes):
            hosts.stop(process)


def qemu(ram, glue, qmp, *more):
    return ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-M", "pc", "-accel", "tcg",
            "-m", f"{MEMORY_MB}M", "-machine", "memory-backend=ram0",
            "-object", f"memory-backend-file,id=ram0,size={MEMORY_MB}M,share=on,mem-path={ram}",
            "-kernel", str(BUILD / "tests/rdma/bare_guest.elf"), "-qmp", f"unix:{qmp},server=on,wait=off",
            "-plugin", f"{presync.plugin_path()},socket={glue}", *more]


def laps(ram):
    with open(ram, "rb") as file:
        file.seek(LAPS_AT)
        return struct.unpack("<I", file.read(4))[0]


def wait_for_laps(ram, more_than, seconds=120):
    end = time.monotonic() + seconds
    while (now := laps(ram)) <= more_than:
        if time.monotonic() > end:
            raise SystemExit(f"the guest does not run: {now} laps in {ram}, more than {more_than} were due")
        time.sleep(0.05)
    return now


def move(machine, folder):
    source_ram = pathlib.Path(f"/dev/shm/presync-qemu-move-{os.getpid()}.ram")
    waiting = qemu("{ram.ram0}", "{glue}", "{qmp}", "-incoming", "defer", "-S")
    with presync.Daemon(machine, "target", folder, {presync.NAME: waiting}) as target, \
            presync.Daemon(machine, "source", folder, {}) as source:
        with open(f"{folder}/source.qemu.log", "w", encoding="utf-8") as log:
            guest = machine.popen("source", qemu(source_ram, f"{folder}/glue", f"{folder}/qmp"), stdout=log, stderr=log)
        try:
            while not source_ram.exists() or source_ram.stat().st_size == 0:
                if guest.poll() is not None:
                    raise SystemExit(pathlib.Path(f"{folder}/source.qemu.log").read_text(encoding="utf-8"))
                time.sleep(0.05)
            wait_for_laps(source_ram, 0)
            source.ask("start", presync.NAME, "--qmp", f"{folder}/qmp", "--to", f"10.77.1.1:{presync.PORT}",
                       "--transport", "rdma", "--wait")
            status = source.ask("status", presync.NAME)["guests"][0]
            report = source.ask("launch", presync.NAME, "--verify", "--wait")
            there = wait_for_laps(next(target.ram.rglob("*ram0*")), laps(source_ram))
        except presync.Refused as refused:
            raise SystemExit(f"{refused}\n--- source\n{source.words()}\n--- target\n{target.words()}") from refused
        finally:
            source_ram.unlink(missing_ok=True)
    assert status["link"] == "rdma", status
    assert report["pages_differing"] == 0 < report["pages_compared"], report
    assert guest.wait(20) is not None
    print(f"moved over {status['link']}, dirty log {status['dirty_log']}: {report['pages_compared']} pages compared, "
          f"launch {report['launch_ms']:.0f} ms, stopped {report['downtime_ms']:.0f} ms, lap {there}")
    # What the other tests of one_machine print at their end.
    print("[  PASSED  ] 1 test.")


def main():
    machine = OneMachine()
    try:
        with presync.run_folder() as folder:
            move(machine, folder)
    finally:
        machine.close()


if __name__ == "__main__":
    main()
