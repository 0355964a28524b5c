#!/usr/bin/python3
"""Records write traces of the test guest's workloads: see tools/record-traces."""

import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from lab import agent, guest, hosts, presync  # noqa: E402  (after the path is set)

WORKLOADS = ("idle", "text", "audio", "movie", "sqlite", "redis", "compile", "web", "java", "ruby", "archive", "phases")
FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "benchmarks" / "traces"
INDEX = "recorded.json"
NICE = -10  # so that other work on this machine does not slow the guest
LOOK_EVERY_S = 10
WARM_UP_S = 15  # after the workload's first steps
_index_lock = threading.Lock()
_leaving = threading.Event()  # this program was told to end


class Stands(Exception):
    """A workload made no progress."""


def say(text):
    print(f"record-traces: {text}", flush=True)


def pause(seconds):
    """Sleeps, unless this program ends."""
    if _leaving.wait(seconds):
        raise hosts.LabError("interrupted")


def steps(reader):
    return reader.command("check")["workload_steps"]


def wait_for_work(reader, workload, seconds=180):
    """Until the workload is well under way by its own account."""
    deadline = time.monotonic() + seconds
    while workload != "idle" and steps(reader) < 3:
        if time.monotonic() > deadline:
            raise Stands(f"{workload} did not begin within {seconds} s")
        pause(1)
    pause(WARM_UP_S)


def watch(reader, process):
    """The workload's own count of steps while `process` records: how much it grew, and in how many of the looks it
    had."""
    grown, moved, looks, last = 0, 0, 0, steps(reader)
    while process.poll() is None:
        pause(LOOK_EVERY_S)
        now = steps(reader)
        # A phase that begins counts from 0 again.
        grown += now - last if now >= last else now
        moved += now != last
        looks += 1
        last = now
    return {"steps": grown, "looks": looks, "looks_with_progress": moved}


def record(workload, options, image):
    """Records one workload; returns what is worth keeping of it."""
    out = options.out / f"{workload}.pstrace.zst"
    part = options.out / f".{workload}.part.zst"
    with presync.run_folder() as folder:
        spec = guest.GuestSpec(
            image=image, data_disk=guest.copy_data_disk(image, folder), workload=workload, beat_ms=1000,
            memory_mb=options.memory, kernel_args=f"presync.evidence=0 presync.seed={options.seed}",
            plugin=f"{presync.plugin_path()},socket={folder}/source.glue")
        with guest.Guest(spec, "source", folder) as source, source.reader() as reader:
            source.wait_boot(reader, 120)
            try:
                wait_for_work(reader, workload)
                say(f"{workload}: recording for {options.seconds} s")
                argv = [presync.build_folder() / "tools" / "presync", "record", workload, "--qmp",
                        source.sockets.qmp[0], "--out", part, "--seconds", options.seconds, "--interval",
                        options.interval, "--json"]
                process = subprocess.Popen([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                           text=True, preexec_fn=hosts.die_with_parent)
                progress = watch(reader, process)
                said, errors = process.communicate()
                if process.returncode != 0:
                    raise hosts.LabError(f"presync record {workload}: {errors.strip()}")
                if workload != "idle" and progress["looks_with_progress"] == 0:
                    raise Stands(f"{workload} made no step in {options.seconds} s")
                part.rename(out)
            except (Stands, agent.AgentError) as error:
                raise hosts.LabError(f"{error}\n{source.last_words()}") from error
            finally:
                part.unlink(missing_ok=True)
    answer = json.loads(said)
    return {"scans": answer["scans"], "interval_us": answer["interval_us"], "pages_written": answer["pages_written"],
            "missed_scans": answer["missed_scans"], "bytes": out.stat().st_size, "seed": options.seed,
            "memory_mb": options.memory, "date": datetime.date.today().isoformat(), **progress}


def versions(image):
    """What ran: QEMU, the guest's kernel."""
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    return {"qemu": qemu.split()[3], "kernel": (image / "kernel-version").read_text().strip(),
            "accelerator": "kvm" if guest.kvm_usable() else "tcg", "cores": os.cpu_count()}


def note(folder, workload, values):
    """Puts one workload's figures into the folder's index."""
    with _index_lock:
        index = folder / INDEX
        all_values = json.loads(index.read_text()) if index.exists() else {}
        all_values[workload] = values
        index.write_text(json.dumps(dict(sorted(all_values.items())), indent=1) + "\n")


def finish(workload, job, options, image):
    """Says and notes what became of one recording; returns whether there is one."""
    try:
        values = job.result()
    except hosts.LabError as error:
        say(f"{workload}: {error}")
        return False
    note(options.out, workload, {**values, **versions(image)})
    say(f"{workload}: {values['scans']} scans, {values['pages_written']} pages written, {values['bytes']} bytes, "
        f"{values['steps']} steps of its own, {values['missed_scans']} scans missed")
    return True


def main():
    parser = argparse.ArgumentParser(prog="tools/record-traces", description=__doc__)
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"workloads: {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="folder (default: benchmarks/traces)")
    parser.add_argument("--seed", type=int, default=1, help="other random numbers and parameters (default 1)")
    parser.add_argument("--seconds", type=int, default=300, help="of each recording (default 300)")
    parser.add_argument("--interval", default="100ms", help="between two scans (default 100ms)")
    parser.add_argument("--memory", type=int, default=256, help="of the guest, MiB (default 256)")
    parser.add_argument("--at-a-time", type=int, default=2, help="guests that run beside each other (default 2)")
    options = parser.parse_args()
    unknown = set(options.name) - set(WORKLOADS)
    if unknown:
        parser.error(f"no such workload: {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    if os.geteuid() != 0:
        raise hosts.LabError("recording looks into QEMU's memory: run this as root")
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    image = guest.image("all")
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(options.at_a_time) as pool:
        jobs = {pool.submit(record, name, options, image): name for name in options.name or WORKLOADS}
        try:
            for job in concurrent.futures.as_completed(jobs):
                failed += not finish(jobs[job], job, options, image)
        except BaseException:
            _leaving.set()
            pool.shutdown(cancel_futures=True)
            raise
    return 1 if failed else 0


if __name__ == "__main__":
    hosts.leave_on_sigterm()
    try:
        sys.exit(main())
    except hosts.LabError as error:
        sys.exit(f"tools/record-traces: {error}")
    except KeyboardInterrupt:
        sys.exit("tools/record-traces: interrupted")
