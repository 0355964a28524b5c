#!/usr/bin/python3
"""presync beside stock QEMU, on the same guests and the same link: see benchmarks/experiment."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from lab import experiment_page, guest, hosts, launches, neighbour, presync, traces  # noqa: E402

WORKLOADS = ("text", "audio", "movie")
PARTS = ("launches", "slowdown", "neighbour", "replay")
SET_POINTS = (500, 1000, 2000, 4000)


def say(text=""):
    print(text, flush=True)


def machine():
    """Where this ran."""
    commit = subprocess.run(["git", "-C", pathlib.Path(__file__).parent, "describe", "--always", "--dirty"],
                            capture_output=True, text=True, check=False).stdout.strip()
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    return {"date": datetime.date.today().isoformat(), "commit": commit, "cores": os.cpu_count(),
            "kernel": platform.release(), "qemu": qemu.split()[3], "accelerator": "kvm" if guest.kvm_usable() else "tcg"}


def show(row):
    """One line for one launch."""
    head = f"  {row['workload']:6} {row['method']:13} #{row['launch']}"
    if "error" in row:
        say(f"{head}  no result: {row['error']}")
        return
    lost = "" if row.get("loop_lost_ms") is None else f", loop lost {row['loop_lost_ms']:.0f} ms"
    left = f", {row['residual_pages']} pages left" if "residual_pages" in row else ""
    say(f"{head}  launch {row['launch_ms']:5.0f} ms, over after {row['done_ms']:5.0f}, stopped {row['downtime_ms']:4.0f},"
        f" longest gap {row['gap_ms']:4.0f}, {row['bytes_after'] / 1e6:6.1f} MB after it{left}{lost}; {row['guest']}")


def run_launches(options, rows, keep):
    """All launches, added to `rows`; `keep` is called after each, so that an interrupted run has something to show."""
    for workload in options.workload:
        image = guest.image_for(workload)
        for method in options.method:
            before = sum(row["workload"] == workload and row["method"] == method for row in rows)
            for number in range(before, before + options.launches + options.loops):
                spec = guest.GuestSpec(image=image, data_disk="", workload=workload)
                # Each method of one workload gets the same moments.
                moment = random.Random(f"{options.seed}-{workload}-{number}").uniform(2, 15)
                plan = launches.Plan(spec=spec, link_mbit=options.link, delay_s=moment, promise=options.max_launch_time,
                                     loop=number >= before + options.launches)
                row = {"workload": workload, "method": method, "launch": number + 1, "loop": plan.loop,
                       "delay_s": round(moment, 2), **launches.launch(method, plan)}
                rows.append(row)
                show(row)
                keep()
                if "error" in row and number == 0 and method != launches.PRESYNC:
                    break  # it can't work here; the reason is in the row


def middle(rows, key):
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def worst(rows, key):
    return max((row[key] for row in rows if row.get(key) is not None), default=None)


def run_slowdown(options):
    """{workload: what a sync costs its guest}."""
    found = {}
    for workload in options.workload:
        spec = guest.GuestSpec(image=guest.image_for(workload), data_disk="", workload=workload)
        plan = launches.Plan(spec=spec, link_mbit=options.link, delay_s=0, promise=options.max_launch_time, loop=False)
        found[workload] = cost = launches.attempt(launches.slowdown, plan)
        if "error" in cost:
            say(f"  {workload}: what a sync costs is not known: {cost['error']}")
            continue
        if cost["lost_percent"] is None:
            say(f"  {workload}: the machine's speed was too uneven to tell what a sync costs")
            continue
        say(f"  {workload}: the guest loses {cost['lost_percent']:.1f} % of its speed while synced (at most 2:"
            f" {'reached' if cost['lost_percent'] <= 2 else 'MISSED'}; {launches.level_text(cost)}); longest stall in 3 s"
            f" {cost['stall_alone_ms_median']:.0f} ms alone, {cost['stall_synced_ms_median']:.0f} ms synced (medians)")
    return found


def summarize(rows):
    """One line for each workload and method: medians and worst, of the launches without the loop."""
    lines = []
    for workload, method in dict.fromkeys((row["workload"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["workload"], row["method"]) == (workload, method)]
        good = [row for row in mine if "error" not in row]
        pure = [row for row in good if not row["loop"]]
        lines.append({
            "workload": workload, "method": method, "launches": len(pure),
            "failed": len(mine) - len(good), "harmed": sum(row["guest"] != "unharmed" for row in good),
            "error": next((row["error"] for row in mine if "error" in row), None),
            **{f"{key}_median": middle(pure, key) for key in (
                "launch_ms", "done_ms", "downtime_ms", "gap_ms", "bytes_first_pass", "bytes_before", "bytes_after",
                "residual_pages", "set_point_pages", "stall_synced_ms", "synced_s")},
            **{f"{key}_worst": worst(pure, key) for key in ("launch_ms", "done_ms", "downtime_ms", "gap_ms",
                                                            "residual_pages")},
            "loop_lost_ms_median": middle(good, "loop_lost_ms")})
    return lines


def goals(summary):
    """What presync is held to, workload by workload: (text, reached)."""
    found = []
    for ours in (s for s in summary if s["method"] == launches.PRESYNC and s["launches"]):
        stock = {s["method"]: s for s in summary
                 if s["workload"] == ours["workload"] and s["method"] != launches.PRESYNC and s["launches"]}
        name, launch, down = ours["workload"], ours["launch_ms_median"], ours["downtime_ms_median"]
        found.append((f"{name}: launch {launch:.0f} ms (at most 100)", launch <= 100))
        found.append((f"{name}: downtime {down:.0f} ms (at most 50)", down <= 50))
        if "pre-copy" in stock:
            total = stock["pre-copy"]["done_ms_median"]
            found.append((f"{name}: {total / launch:.1f} times as fast as pre-copy (at least 15)", total / launch >= 15))
            other = stock["pre-copy"]["downtime_ms_median"]
            found.append((f"{name}: downtime {down:.0f} ms beside pre-copy's {other:.0f}", down <= other))
        if stock:
            best = min(stock.values(), key=lambda s: s["done_ms_median"])
            ratio = best["done_ms_median"] / launch
            found.append((f"{name}: {ratio:.1f} times as fast as the best stock mode, {best['method']} (at least 10)",
                          ratio >= 10))
    return found


def replay(options):
    """`presync replay` over the repository's traces, or the reason why not."""
    program = presync.build_folder() / "tools" / "presync"
    files = sorted(traces.FOLDER.glob("*.pstrace.zst"))
    if "replay" not in subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout:
        return {"error": "this build of presync has no 'replay'"}
    done = subprocess.run([program, "replay", "--trace", *files, "--policy", "all", "--set-point",
                           ",".join(map(str, SET_POINTS)), "--json"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": f"presync replay: {done.stderr.strip()}"}
    return {"rows": json.loads(done.stdout)}


def print_table(summary):
    say(f"\n  {'workload':9}{'method':15}{'launch ms':>18}{'over ms':>14}{'stopped ms':>14}{'gap ms':>12}"
        f"{'MB before':>11}{'MB after':>10}   (median / worst)")

    def pair(line, key, form="{:.0f}"):
        if line[f"{key}_median"] is None:
            return "-"
        return f"{form.format(line[f'{key}_median'])} / {form.format(line[f'{key}_worst'])}"

    for line in summary:
        if not line["launches"]:
            say(f"  {line['workload']:9}{line['method']:15} no result: {line['error']}")
            continue
        say(f"  {line['workload']:9}{line['method']:15}{pair(line, 'launch_ms'):>18}{pair(line, 'done_ms'):>14}"
            f"{pair(line, 'downtime_ms'):>14}{pair(line, 'gap_ms'):>12}{line['bytes_before_median'] / 1e6:>11.1f}"
            f"{line['bytes_after_median'] / 1e6:>10.1f}"
            + (f"   {line['failed']} failed" if line["failed"] else "")
            + (f"   {line['harmed']} HARMED" if line["harmed"] else ""))


def main():
    parser = argparse.ArgumentParser(prog="benchmarks/experiment", description=__doc__)
    parser.add_argument("--workload", action="append", choices=traces.WORKLOADS, help="default: text, audio, movie")
    parser.add_argument("--method", action="append", choices=launches.METHODS, help="default: all")
    parser.add_argument("--launches", type=int, default=5, help="for each workload and method (default 5)")
    parser.add_argument("--loops", type=int, default=1,
                        help="further launches in which the guest counts its own work (default 1)")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--link", type=int, default=1000, help="Mbit/s (default 1000)")
    parser.add_argument("--max-launch-time", default="100ms", help="presync's promise (default 100ms)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6),
                        help="of the moments (default: another each time)")
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("experiment.json"), metavar="FILE")
    parser.add_argument("--append", action="store_true", help="add to the results that --json holds: an experiment in slices")
    parser.add_argument("--page", type=pathlib.Path, metavar="FILE", help="default: beside --json, as .html")
    parser.add_argument("--page-from", type=pathlib.Path, metavar="FILE",
                        help="run nothing: make the page of results that are there, and print their table")
    parser.add_argument("--picture", type=pathlib.Path, metavar="FILE", help="the main picture as SVG, too")
    options = parser.parse_args()
    options.workload = options.workload or list(WORKLOADS)
    options.method = options.method or list(launches.METHODS)
    options.part = options.part or list(PARTS)
    if options.page_from:
        page = options.page or options.page_from.with_suffix(".html")
        result = json.loads(options.page_from.read_text())
        result["summary"] = summarize(result["rows"])
        result["goals"] = goals(result["summary"])
        page.write_text(experiment_page.render(result))
        draw(options, result)
        print_table(result["summary"])
        say("\n" + markdown(result["summary"]))
        return 0
    return run(options)


def markdown(summary):
    """The main table: medians and worst, a line for each workload and method."""
    lines = ["| guest | method | from the order to done, ms | stood still, ms | longest gap, ms | MB before / after the order |",
             "|---|---|---|---|---|---|"]

    def pair(line, key, word=""):
        if line[f"{key}_median"] is None:
            return "not measured"
        return f"{line[f'{key}_median']:.0f} ({word}{line[f'{key}_worst']:.0f})"

    for line in (s for s in summary if s["launches"]):
        lines.append(f"| {line['workload']} | {line['method']} | {pair(line, 'done_ms', 'worst ')}"
                     f" | {pair(line, 'downtime_ms')} | {pair(line, 'gap_ms')}"
                     f" | {line['bytes_before_median'] / 1e6:.0f} / {line['bytes_after_median'] / 1e6:.0f} |")
    return "\n".join(lines)


def draw(options, result):
    if options.picture:
        options.picture.write_text(experiment_page.picture(result))


def run(options):
    result = {**machine(), "seed": options.seed, "link_mbit": options.link, "promise": options.max_launch_time,
              "left_out": launches.LEFT_OUT, "rows": []}
    if options.append and options.json.exists():
        result = {**json.loads(options.json.read_text()), **machine()}
    page = options.page or options.json.with_suffix(".html")

    def keep():
        result["summary"] = summarize(result["rows"])
        result["goals"] = goals(result["summary"])
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        page.write_text(experiment_page.render(result))

    say(f"\nTwo hosts joined by a {options.link} Mbit/s link, guests of 256 MB ({result['accelerator']}), seed"
        f" {options.seed}. presync runs without TLS (--insecure), as stock QEMU does. Not in the comparison:")
    for mode, why in launches.LEFT_OUT.items():
        say(f"  {mode:20} {why}")
    if "launches" in options.part:
        run_launches(options, result["rows"], keep)
        draw(options, result)
        print_table(result["summary"])
        say()
        for text, reached in result["goals"]:
            say(f"  {'reached' if reached else 'MISSED '}  {text}")
    if "slowdown" in options.part:
        say()
        result["slowdown"] = run_slowdown(options)
        keep()
    if "neighbour" in options.part:
        found = result["neighbour"] = neighbour.run(options.link)
        keep()
        say(f"\n  Neighbour: an iperf3 flow has {found['flow_alone_mbit']:.0f} Mbit/s alone,"
            f" {found['flow_beside_mbit']:.0f} beside a sync ({100 * found['kept']:.1f} %, at least 90:"
            f" {'reached' if found['holds'] else 'MISSED'}); the sync has {found['sync_beside_mbit']:.0f} beside it,"
            f" {found['sync_after_mbit']:.0f} when it has ended")
    if "replay" in options.part:
        result["replay"] = replay(options)
        keep()
        if "error" in result["replay"]:
            say(f"\n  No policies compared: {result['replay']['error']}")
    say(f"\n  {options.json} and {page}")
    harmed = sum(line["harmed"] for line in result.get("summary", []) if line["method"] == launches.PRESYNC)
    return 1 if harmed else 0


if __name__ == "__main__":
    hosts.leave_on_sigterm()
    try:
        sys.exit(main())
    except hosts.LabError as error:
        sys.exit(f"benchmarks/experiment: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmarks/experiment: interrupted; what was measured is in the files")
