#!/usr/bin/python3
"""What operators look at: metrics, alert rules, dashboard, the page of presync report.

    tests/operators.py [TestCase.test ...] [-v]     PRESYNC_BUILD names the build folder; ReportTest needs root
    PRESYNC_KEEP=FOLDER                             keeps the page and its screenshot there
"""

import json
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402  (after the path is set)
from lab import guest, hosts, presync  # noqa: E402

MONITORING = ROOT / "tools" / "monitoring"
METRIC = re.compile(r"\bpresync_[a-z_]+\b")
WELL_KNOWN = ("", "_bucket", "_count", "_sum")


def families(text):
    """The names that a scrape declares."""
    return set(re.findall(r"^# TYPE (\S+)", text, re.M))


def samples(text):
    """{name and labels: value} of a scrape."""
    return {key: float(value) for key, value in re.findall(r"^(presync_\S+(?:\{.*\})?) (\S+)$", text, re.M)}


class MetricsTest(unittest.TestCase):
    """A presyncd without guests, on loopback."""

    def start(self, metrics, expect_running=True):
        folder = tempfile.TemporaryDirectory(prefix="presync-metrics-")
        self.addCleanup(folder.cleanup)
        config = pathlib.Path(folder.name) / "presyncd.toml"
        config.write_text(f'listen = "127.0.0.1:{hosts.free_port()}"\nsocket = "{folder.name}/s"\nstate_folder = "{folder.name}/state"\n'
                          f'run_folder = "{folder.name}/run"\nram_folder = "/dev/shm/presync-metrics-{os.getpid()}"\n{metrics}\n')
        self.addCleanup(shutil.rmtree, f"/dev/shm/presync-metrics-{os.getpid()}", ignore_errors=True)
        log = open(f"{folder.name}/log", "w+", encoding="utf-8")
        self.addCleanup(log.close)
        process = subprocess.Popen([presync.program("presyncd"), "-c", config], stdout=log, stderr=log)
        self.addCleanup(hosts.stop, process, 30)
        deadline = time.monotonic() + 60
        while process.poll() is None and "ready" not in (words := pathlib.Path(log.name).read_text(encoding="utf-8")):
            self.assertLess(time.monotonic(), deadline, words)
            time.sleep(0.05)
        self.assertEqual(process.poll() is None, expect_running)
        return process, folder.name, pathlib.Path(log.name).read_text(encoding="utf-8")

    def scrape(self, port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return answer.read().decode()

    def test_scrape_and_what_uses_it(self):
        port = hosts.free_port()
        _, folder, _ = self.start(f'metrics_listen = "127.0.0.1:{port}"')
        refused = subprocess.run([presync.program("presync"), "--socket", f"{folder}/s", "launch", "nobody"],
                                 capture_output=True, text=True, check=False)
        self.assertEqual(refused.returncode, 1)
        text = self.scrape(port)
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        complaints = [line for line in done.stderr.splitlines() if line.startswith("presync_")]
        self.assertEqual(complaints, [])
        values = samples(text)
        self.assertEqual(values['presync_guests{direction="outgoing"}'], 0)
        self.assertEqual(values['presync_launch_seconds_bucket{le="+Inf"}'], 0)
        self.assertEqual(values['presync_command_errors_total{command="launch",code="NOT_FOUND"}'], 1)
        known = {name + suffix for name in families(text) for suffix in WELL_KNOWN}
        for source in (MONITORING / "presync.rules.yml", MONITORING / "presync-dashboard.json"):
            words = re.sub(r'"uid": "presync"', "", source.read_text(encoding="utf-8"))
            used = set(METRIC.findall(words))
            self.assertGreater(len(used), 5)
            self.assertEqual(used - known, set(), f"{source.name} uses metrics that presyncd does not have")
        documented = set(METRIC.findall((ROOT / "docs" / "operations.md").read_text(encoding="utf-8")))
        own = {name for name in families(text) if name.startswith("presync_")}
        self.assertEqual(own - documented, set(), "docs/operations.md lacks metrics")

    def test_off_unless_configured(self):
        _, folder, log = self.start("")
        self.assertNotIn("metrics at", log)
        self.assertIn("metrics_listen", (ROOT / "tools" / "presyncd" / "presyncd.toml.example").read_text(encoding="utf-8"))

    def test_a_port_in_use_is_said(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            process, _, log = self.start(f'metrics_listen = "{address}"', expect_running=False)
            self.assertEqual(process.returncode, 1)
            self.assertIn(f"metrics: can't listen at {address}", log)


class MonitoringTest(unittest.TestCase):
    """The example rules and the dashboard, by Prometheus' own tool."""

    def promtool(self, *arguments, cwd=None):
        done = subprocess.run(["promtool", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_rules(self):
        self.promtool("check", "rules", MONITORING / "presync.rules.yml")
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(MONITORING / "presync.rules.yml", folder)
            shutil.copy(ROOT / "tests" / "monitoring" / "rules_test.yml", folder)
            self.promtool("test", "rules", "rules_test.yml", cwd=folder)

    def test_every_alert_is_explained(self):
        rules = (MONITORING / "presync.rules.yml").read_text(encoding="utf-8")
        alerts = re.findall(r"- alert: (\w+)", rules)
        self.assertGreater(len(alerts), 5)
        told = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
        self.assertEqual([alert for alert in alerts if alert not in told], [])

    def test_dashboard(self):
        dashboard = json.loads((MONITORING / "presync-dashboard.json").read_text(encoding="utf-8"))
        expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        self.assertGreater(len(expressions), 10)
        rules = [{"record": f"dashboard:panel{i}", "expr": re.sub(r"\$\w+", ".*", e)} for i, e in enumerate(expressions)]
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "rules.yml"
            path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
            self.promtool("check", "rules", path)
        for panel in dashboard["panels"]:
            self.assertTrue(panel["title"])
            self.assertLessEqual(panel["gridPos"]["x"] + panel["gridPos"]["w"], 24)


class BrowserTest(unittest.TestCase):
    """The browser that looks at pages here sees what is wrong with one."""

    def test_an_error_is_seen(self):
        with tempfile.TemporaryDirectory() as folder:
            page = pathlib.Path(folder) / "bad.html"
            page.write_text("<!doctype html><title>x</title><p>words<script>console.error('seen')</script>", encoding="utf-8")
            dom, console = browser.look(page, f"{folder}/bad.png")
            self.assertIn("words", dom)
            self.assertTrue(any("seen" in line for line in console), console)


class ReportTest(unittest.TestCase):
    """A guest that is moved between two hosts: its metrics, its page."""

    def scrape(self, two):
        program = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:7352/metrics', timeout=30).read().decode())"
        return two.run("source", [sys.executable, "-c", program])

    def test_move(self):
        image = guest.image_for("hammer")
        with presync.run_folder() as folder, hosts.TwoHosts() as two:
            spec = guest.GuestSpec(image=image, data_disk=guest.copy_data_disk(image, folder), workload="hammer",
                                   kernel_args="presync.area_mb=24 presync.pages_s=1000")
            with presync.Move(two, folder, spec, settings={"metrics_listen": "127.0.0.1:7352"}) as move:
                move.start("--max-launch-time", "400ms")
                move.wait_synced()
                time.sleep(12)  # so that the curves have something to show
                values = samples(self.scrape(two))
                name = f'guest="{presync.NAME}"'
                self.assertEqual(values[f'presync_guest_state{{{name},state="syncing"}}'], 1)
                self.assertEqual(values[f'presync_guest_state{{{name},state="moved"}}'], 0)
                self.assertEqual(values[f'presync_guest_link{{{name},link="tcp"}}'], 1)
                self.assertAlmostEqual(values[f"presync_guest_promised_launch_seconds{{{name}}}"], 0.4)
                self.assertGreater(values[f"presync_guest_wire_bytes_total{{{name}}}"], 1e6)
                self.assertGreater(values[f"presync_guest_write_faults_total{{{name}}}"], 0)
                self.assertEqual(values[f"presync_guest_link_falls_total{{{name}}}"], 0)
                before = self.page(move, folder, "before.html")
                self.assertIn("None yet", before)
                report = move.source_daemon.ask("launch", presync.NAME)
                values = samples(self.scrape(two))
                self.assertEqual(values['presync_launches_total{result="moved"}'], 1)
                self.assertEqual(values["presync_launch_seconds_count"], 1)
                self.assertAlmostEqual(values["presync_launch_seconds_sum"], report["launch_ms"] / 1000, places=4)
                self.look(self.page(move, folder, "after.html"), pathlib.Path(folder) / "after.html", report)
                with self.assertRaises(presync.Refused):
                    move.source_daemon.ask("report", "nobody")
                self.assertEqual(move.source_daemon.run("report", presync.NAME, capture_output=True).returncode, 2)

    def page(self, move, folder, name):
        move.source_daemon.ask("report", presync.NAME, "--out", f"{folder}/{name}")
        return (pathlib.Path(folder) / name).read_text(encoding="utf-8")

    def look(self, html, page, report):
        for word in ("http:", "https:", "<script", "src="):
            self.assertNotIn(word, html)
        png = page.with_suffix(".png")
        dom, console = browser.look(page, png)
        self.assertEqual(console, [])
        self.assertEqual(dom.count("<svg"), 4, "forecast, residual, rates and the launch's steps")
        self.assertGreaterEqual(dom.count("<polyline"), 5)
        self.assertEqual(dom.count("class=\"bar\""), len(report["steps"]))
        self.assertIn(f"{report['launch_ms']:.1f} ms", dom)
        self.assertIn("<td>moved", dom)
        data = png.read_bytes()
        self.assertEqual(struct.unpack(">II", data[16:24]), (1000, 1900))
        self.assertGreater(len(data), 40_000, "an empty page is smaller")
        if keep := os.environ.get("PRESYNC_KEEP"):
            shutil.copy(page, keep)
            shutil.copy(png, keep)


if __name__ == "__main__":
    hosts.leave_on_sigterm()
    unittest.main()
