#!/usr/bin/python3
"""The main job, shown: see tools/demo."""

import argparse
import contextlib
import functools
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from lab import guest, hosts, presync, qmp  # noqa: E402  (after the path is set)

WORKLOADS = ("text", "idle", "hammer", "audio", "movie", "redis", "sqlite")


def say(text=""):
    print(text, flush=True)


def megabytes(count):
    return f"{count / 1e6:.1f} MB"


def show_sync(move, seconds):
    """One line a second while the guest works and is kept in sync."""
    for _ in range(seconds):
        status = move.status()
        launch = status["predicted_launch_ms"]
        say(f"  {status['state']:10}  launch now = {launch or float('nan'):5.0f} ms,"
            f" {megabytes(status['residual_pages'] * 4096):>8} left,"
            f" {megabytes(status['rate_bytes_per_s']):>8}/s on the wire,"
            f" guest writes {status['dirty_pages_per_s']:6.0f} pages/s")
        time.sleep(1)


def work_begins(reader, seconds=60):
    """Waits until the workload has done something."""
    deadline = time.monotonic() + seconds
    while reader.command("check").get("workload_steps", 1) < 3 and time.monotonic() < deadline:
        reader.wait_beat()


def verdict(check):
    bad = {k: v for k, v in check.items() if k.endswith(("_bad", "_errors", "_dropped")) and v}
    return "all well" if not bad else f"WRONG: {bad}"


def run_presync(options, spec, folder):
    with hosts.TwoHosts(options.link) as two, presync.Move(two, folder, spec, insecure=True) as move:
        say(f"The guest is up on host one ({move.two.address['source']}). Keeping it in sync with"
            f" {move.to}, without TLS (--insecure), as stock QEMU moves it below:")
        sent_at_start = two.bytes_sent("source")
        move.start("--max-launch-time", options.max_launch_time)
        move.wait_synced()
        work_begins(move.reader)
        show_sync(move, options.seconds)
        sent_at_launch = two.bytes_sent("source")
        move.reader.mark()
        say("Launch:")
        arguments = ["launch", presync.NAME] + (["--verify"] if options.verify else [])
        report = move.source_daemon.ask(*arguments)
        move.reader.wait_beat("target")
        sent_after = two.bytes_sent("source")
        for _ in range(50):
            move.reader.wait_beat("target")
        beats = move.reader.result()
        check = move.reader.command("check")
        say("  " + ", ".join(f"{s['step']} {s['ms']:.0f}" for s in report["steps"]) + " (ms)")
        say(f"  the guest's own check of its memory and files on host two: {verdict(check)}")
        return {
            "launch_ms": report["launch_ms"], "downtime_ms": report["downtime_ms"],
            "bytes_before_launch": sent_at_launch - sent_at_start,
            "bytes_after_launch": sent_after - sent_at_launch,
            "residual_pages": report["residual_pages"],
            "pages_compared": report["pages_compared"],
            "pages_differing": report["pages_differing"],
            "heartbeats_lost": beats.lost, "heartbeats_doubled": beats.doubled,
            "longest_gap_ms": beats.gap_ms, "guest_check": verdict(check),
            "rounds": report["rounds"], "steps": report["steps"],
        }


def run_stock(options, spec, folder):
    with contextlib.ExitStack() as stack:
        two = stack.enter_context(hosts.TwoHosts(options.link))
        start = functools.partial(guest.Guest, spec, folder=folder)
        source = stack.enter_context(start("source", popen=functools.partial(two.popen, "source")))
        reader = stack.enter_context(source.reader())
        source.wait_boot(reader)
        work_begins(reader)
        time.sleep(min(options.seconds, 5))
        target = stack.enter_context(start("target", popen=functools.partial(two.popen, "target"),
                                           paused=False))
        reader.attach("target", target.sockets.agent)
        sent = two.bytes_sent("source")
        reader.mark()
        with source.qmp() as one, target.qmp() as other:
            stock = qmp.stock_migrate(one, other, f"tcp:{two.address['target']}:4444")
        reader.wait_beat("target")
        wire = two.bytes_sent("source") - sent
        for _ in range(50):
            reader.wait_beat("target")
        beats = reader.result()
        return {"launch_ms": stock.wall_ms, "downtime_ms": stock.stopped_ms,
                "bytes_before_launch": 0, "bytes_after_launch": wire,
                "heartbeats_lost": beats.lost, "longest_gap_ms": beats.gap_ms}


def table(result):
    ours, stock = result["presync"], result["stock"]
    rows = [("launch to running", "launch_ms", "ms"), ("guest stopped (downtime)", "downtime_ms", "ms"),
            ("longest gap between heartbeats", "longest_gap_ms", "ms"),
            ("heartbeats lost", "heartbeats_lost", ""), ("sent before the launch", "bytes_before_launch", "MB"),
            ("sent after the launch", "bytes_after_launch", "MB")]
    say(f"\n  {'':32}{'presync':>14}{'stock pre-copy':>18}")
    for name, key, unit in rows:
        cells = []
        for side in (ours, stock):
            value = side[key] / 1e6 if unit == "MB" else side[key]
            cells.append(f"{value:.1f} {unit}" if unit else f"{value}")
        say(f"  {name:32}{cells[0]:>14}{cells[1]:>18}")
    say(f"  {'residual at the launch':32}{ours['residual_pages'] * 4096 / 1e6:>11.1f} MB")
    if ours["pages_compared"]:
        say(f"  {'pages compared / differing':32}{ours['pages_compared']:>9} / {ours['pages_differing']}")
    say(f"\n  Launched {stock['launch_ms'] / ours['launch_ms']:.1f} times as fast as stock QEMU over the"
        f" same {result['link_mbit_s']} Mbit/s link.")


def main():
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="text")
    parser.add_argument("--link", type=int, default=1000, help="Mbit/s (default 1000)")
    parser.add_argument("--seconds", type=int, default=10, help="how long to keep in sync (default 10)")
    parser.add_argument("--max-launch-time", default="100ms")
    parser.add_argument("--no-verify", dest="verify", action="store_false",
                        help="don't compare all memory by hashes at the handover")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    image = guest.image_for(options.workload)
    result = {"workload": options.workload, "accelerator": "kvm" if guest.kvm_usable() else "tcg",
              "link_mbit_s": options.link}
    say(f"\nTwo hosts joined by a {options.link} Mbit/s link; a 256 MB guest ({result['accelerator']})"
        f" with the workload '{options.workload}'.")
    for side, run in (("presync", run_presync), ("stock", run_stock)):
        if side == "stock":
            say("\nThe same guest, moved by stock QEMU's pre-copy over the same link:")
        with presync.run_folder() as folder:
            spec = guest.GuestSpec(image=image, data_disk=guest.copy_data_disk(image, folder),
                                   workload=options.workload)
            result[side] = run(options, spec, folder)
            if side == "stock":
                say(f"  done in {result[side]['launch_ms']:.0f} ms")
    table(result)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    ours = result["presync"]
    unharmed = (ours["pages_differing"] == 0 and ours["heartbeats_lost"] == 0
                and ours["heartbeats_doubled"] == 0 and ours["guest_check"] == "all well")
    if not unharmed:
        say(f"  NOT UNHARMED: {ours}")
    return 0 if unharmed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (hosts.LabError, qmp.QmpError, presync.Refused, guest.AgentError) as error:
        sys.exit(f"tools/demo: {error}")
    except KeyboardInterrupt:
        sys.exit("tools/demo: interrupted; everything was cleaned up")
