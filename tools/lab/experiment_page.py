"""The experiment's results as one HTML page that needs no network."""

import html
import math

from . import charts
from .launches import METHODS, PRESYNC, level_text

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:920px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em} h2{font-size:1.2em;margin-top:2em} svg{width:100%;height:auto;background:#fff}
svg text{font-size:11px;fill:#444} .grid{stroke:#ddd} .goal{stroke:#c00;stroke-dasharray:5 3} text.goal{fill:#c00;stroke:none}
.mark{stroke:#888;stroke-dasharray:3 3} text.mark{stroke:none;fill:#666} .dot{fill:#fff;stroke:#222} text.none{fill:#999}
table{border-collapse:collapse;width:100%;font-size:13px} td,th{padding:3px 8px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left} .legend span{margin-right:1.2em;font-size:13px}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.4em} .yes{color:#0b6e4f} .no{color:#c00;font-weight:bold}
"""
PICTURE_STYLE = ("text{font:11px system-ui,sans-serif;fill:#444}.grid{stroke:#ddd}.goal{stroke:#c00;stroke-dasharray:5 3}"
                 "text.goal{fill:#c00;stroke:none}.dot{fill:#fff;stroke:#222}text.none{fill:#999}")
LEAST_OPTIMUM_PAGES = 500  # below it a ratio says nothing
COLUMNS = (("launch ms", "launch_ms", 1), ("over after ms", "done_ms", 1), ("stopped ms", "downtime_ms", 1),
           ("longest gap ms", "gap_ms", 1), ("left at launch, pages", "residual_pages", 1),
           ("MB before", "bytes_before", 1e-6), ("MB after", "bytes_after", 1e-6), ("loop lost ms", "loop_lost_ms", 1))


def _pair(line, key, scale):
    median, worst = line.get(f"{key}_median"), line.get(f"{key}_worst")
    if median is None:
        return "-"
    digits = 1 if scale != 1 else 0
    return f"{median * scale:.{digits}f}" + (f" / {worst * scale:.{digits}f}" if worst is not None else "")


def _table(summary):
    rows = ["<tr><th>workload<th>method<th>launches" + "".join(f"<th>{name}" for name, _, _ in COLUMNS)]
    for line in summary:
        head = f"<tr><td>{line['workload']}<td>{line['method']}"
        if not line["launches"]:
            rows.append(f"{head}<td colspan={len(COLUMNS) + 1}>no result: {html.escape(line['error'] or '')}")
            continue
        ends = f"<td>{line['launches']}" + (f", {line['failed']} failed" if line["failed"] else "") + (
            f", <b class=no>{line['harmed']} harmed</b>" if line["harmed"] else "")
        rows.append(head + ends + "".join(f"<td>{_pair(line, key, scale)}" for _, key, scale in COLUMNS))
    return f"<table>{''.join(rows)}</table>"


def _chart(draw, result, key, goal, **more):
    """Workloads by methods: medians of `key` in ms, and each launch."""
    summary, rows = result["summary"], result["rows"]
    workloads = list(dict.fromkeys(line["workload"] for line in summary))
    methods = [m for m in METHODS if any(line["method"] == m for line in summary)]
    lines = {(line["workload"], line["method"]): line for line in summary}
    return draw(workloads, methods, lambda w, m: lines.get((w, m), {}).get(f"{key}_median"), "ms",
                points=lambda w, m: [r[key] for r in rows if r["workload"] == w and r["method"] == m and not r["loop"]
                                     and r.get(key) is not None],
                log=True, line=goal, **more)


def picture(result):
    """The main picture, an SVG image: from the order to a guest that needs the old host no more."""
    return _chart(charts.picture, result, "done_ms", (100, "100 ms"), style=PICTURE_STYLE)


def _launches(result):
    summary = result["summary"]

    goals = "".join(f"<li class={'yes' if ok else 'no'}>{html.escape(text)}" for text, ok in result.get("goals", []))
    return ("<h2>From the order to a guest that needs the old host no more</h2>"
            "<p>Bars: median; dots: each launch. A logarithmic axis. For post-copy this is when its last page has "
            "arrived; the guest runs on the target earlier, and waits for its pages.</p>"
            + _chart(charts.bars, result, "done_ms", (100, "100 ms"))
            + "<h2>How long the guest stood still</h2><p>From QEMU's event STOP at the source until it runs on the target "
            "(QEMU's own &quot;downtime&quot; ends when the source has written its state, before the target has loaded it). "
            "The table has the longest time without a heartbeat, every 10 ms, as the guest's owner sees it.</p>"
            + _chart(charts.bars, result, "downtime_ms", (50, "50 ms"))
            + f"<h2>Figures</h2><p>Median / worst.</p>{_table(summary)}<h2>What presync is held to</h2><ul>{goals}</ul>")


def _timelines(result):
    parts = ["<h2>Residual and rate over time</h2><p>One sync of each workload, from its start to the launch.</p>"]
    seen = set()
    for row in result["rows"]:
        if row["method"] != PRESYNC or "timeline" not in row or row["workload"] in seen:
            continue
        seen.add(row["workload"])
        line = row["timeline"]
        synced = [s for s in line if s["state"] == "syncing"]
        wire = [(b["t"], (b["wire_bytes"] - a["wire_bytes"]) * 8 / (b["t"] - a["t"]) / 1e6)
                for a, b in zip(line, line[1:]) if b["t"] > a["t"]]
        parts.append(f"<h3>{row['workload']}</h3>")
        parts.append(charts.curves({"residual": [(s["t"], s["residual_pages"]) for s in synced],
                                    "set-point": [(s["t"], s["set_point_pages"]) for s in synced]},
                                   "pages, once in sync"))
        parts.append(charts.curves({"on the wire": wire,
                                    "guest writes": [(s["t"], s["dirty_pages_per_s"] * 4096 * 8 / 1e6) for s in line]},
                                   "Mbit/s"))
    return "".join(parts) if seen else ""


def _slowdown(found):
    rows = "".join(
        f"<tr><td>{workload}<td>" + (
            html.escape(cost["error"]) if "error" in cost else "not told<td><td>" if cost["lost_percent"] is None else
            f"{cost['lost_percent']:.1f} % ({level_text(cost)})<td>{cost['stall_alone_ms_median']:.0f}"
            f"<td>{cost['stall_synced_ms_median']:.0f}")
        for workload, cost in found.items())
    return ("<h2>What a sync costs the guest</h2><p>Its speed (work in a second of its processor) and its longest stall in "
            "3 s, alone and in sync in turns; medians. The machine has two speeds of its own: each is compared with itself.</p>"
            "<table><tr><th>workload<th>speed lost<th>stall alone, ms"
            f"<th>stall synced, ms{rows}</table>")


def _neighbour(found):
    verdict = "<b class=yes>holds</b>" if found["holds"] else "<b class=no>missed</b>"
    return (f"<h2>Beside a neighbour</h2><p>An iperf3 flow has {found['flow_alone_mbit']:.0f} Mbit/s alone and "
            f"{found['flow_beside_mbit']:.0f} beside a sync that wants more than the link carries: it keeps "
            f"{100 * found['kept']:.1f} % (at least 90 %: {verdict}). The sync has {found['sync_beside_mbit']:.0f} Mbit/s "
            f"beside it and {found['sync_after_mbit']:.0f} when the flow has ended.</p>"
            + charts.curves({"iperf3": found["flow"], "sync": [(s[0], s[1]) for s in found["sync"]],
                             "allowed by the pacer": [(s[0], min(s[2], 1.1 * found["link_mbit"])) for s in found["sync"]]},
                            "Mbit/s",
                            marks=[(found["sync_began_s"], "sync begins"), (found["flow_ended_s"], "flow ends")]))


def _replay(replay):
    if "error" in replay:
        return f"<h2>Bytes by policy</h2><p>Not measured: {html.escape(replay['error'])}.</p>"
    parts = ["<h2>Bytes by policy</h2><p>presync replay over the traces in the repository: pages sent, as a multiple of "
             f"what the offline optimum sends at the same set-point. Where that is below {LEAST_OPTIMUM_PAGES} pages in 5 "
             "minutes there is no bar.</p>"]
    rows = replay["rows"]
    for set_point in sorted({r["set_point_pages"] for r in rows}):
        mine = {(r["trace"], r["policy"]): r for r in rows if r["set_point_pages"] == set_point}
        names = [n for n in sorted({t for t, _ in mine})
                 if mine.get((n, "optimum"), {}).get("pages_sent", 0) >= LEAST_OPTIMUM_PAGES]
        policies = [p for p in ("learned", "ewma", "oldest") if any(p == q for _, q in mine)]
        parts.append(f"<h3>Set-point {set_point} pages</h3>" + charts.bars(
            names, policies, lambda t, p: mine.get((t, p), {}).get("optimum_ratio"), "x the optimum", line=(1.3, "1.3")))
    return "".join(parts) + _replay_table(rows)


def _replay_table(rows):
    """Geometric mean of the ratio to the optimum, by policy and set-point, and all bytes as a part of once-a-second's."""
    counted = {(r["trace"], r["set_point_pages"]) for r in rows
               if r["policy"] == "optimum" and r["pages_sent"] >= LEAST_OPTIMUM_PAGES}
    set_points = sorted({r["set_point_pages"] for r in rows})
    lines = ["<tr><th>policy" + "".join(f"<th>{n} pages" for n in set_points) + "<th>all"]
    for policy in dict.fromkeys(r["policy"] for r in rows):
        cells = []
        for chosen in [[n] for n in set_points] + [set_points]:
            logs = [math.log(r["optimum_ratio"]) for r in rows
                    if r["policy"] == policy and r["set_point_pages"] in chosen and r.get("optimum_ratio")
                    and (r["trace"], r["set_point_pages"]) in counted]
            cells.append(f"<td>{math.exp(sum(logs) / len(logs)):.2f}" if logs else "<td>-")
        lines.append(f"<tr><td>{html.escape(policy)}{''.join(cells)}")
    return ("<h3>Geometric means of the ratio</h3><p>Over the traces that have a bar.</p>"
            f"<table>{''.join(lines)}</table>")


def render(result):
    """The page."""
    where = (f"{result['date']}, commit {result['commit']}, {result['cores']} cores, Linux {result['kernel']}, QEMU "
             f"{result['qemu']} ({result['accelerator']}), {result['link_mbit']} Mbit/s between two network namespaces, "
             f"promise {result['promise']}, seed {result['seed']}")
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>presync beside stock QEMU</title><style>{STYLE}"
             f"</style><h1>presync beside stock QEMU</h1><p>{html.escape(where)}</p>"]
    if result.get("summary"):
        parts.append(_launches(result))
        parts.append(_timelines(result))
    if "slowdown" in result:
        parts.append(_slowdown(result["slowdown"]))
    if "neighbour" in result:
        parts.append(_neighbour(result["neighbour"]))
    if "replay" in result:
        parts.append(_replay(result["replay"]))
    left_out = "".join(f"<li>{name}: {html.escape(why)}" for name, why in result["left_out"].items())
    parts.append(f"<h2>Not in the comparison</h2><ul>{left_out}</ul>")
    return "\n".join(parts) + "\n"
