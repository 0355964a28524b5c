#!/usr/bin/python3
"""Tries the lab itself: boots a guest, checks it, moves it as stock QEMU does, checks it again.

    tools/lab/selftest.py [-v]          needs root (network namespaces) and some 60 s under TCG
    PRESYNC_LAB_QEMU10=1 ...            the same with QEMU 10
"""

import functools
import os
import pathlib
import sys
import tempfile
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from lab import charts, experiment, experiment_page, guest, hosts, qmp  # noqa: E402  (after the path is set)
from lab.agent import Beat, BeatReader, judge  # noqa: E402


class JudgeTest(unittest.TestCase):
    """The arithmetic on beats."""

    def beats(self, *numbers_and_ms):
        return [Beat(n, n * 10**7, ms / 1000, "source" if n < 3 else "target")
                for n, ms in numbers_and_ms]

    def test_clean_move(self):
        move = judge(self.beats((1, 10), (2, 20), (3, 70), (4, 80)))
        self.assertTrue(move.clean())
        self.assertAlmostEqual(move.gap_ms, 50)
        self.assertAlmostEqual(move.switch_ms, 50)
        self.assertEqual((move.gap_from, move.gap_to), ("source", "target"))

    def test_lost_and_doubled(self):
        move = judge(self.beats((1, 10), (2, 20), (2, 30), (5, 40)))
        self.assertEqual((move.lost, move.doubled, move.backwards), (2, 1, 0))
        self.assertEqual(judge(self.beats((2, 10), (1, 20))).backwards, 1)

    def test_stall_is_not_the_switch(self):
        move = judge(self.beats((1, 10), (2, 110), (3, 140)))
        self.assertAlmostEqual(move.gap_ms, 100)
        self.assertAlmostEqual(move.switch_ms, 30)

    def test_line_cut_by_the_move(self):
        reader = BeatReader()
        self.addCleanup(reader.close)
        reader._rest.update(source=b"", target=b"")
        reader._take("source", b"B 1 10\nB 2 2", 0.1)
        reader._take("target", b"0\nB 3 30\n", 0.2)
        self.assertEqual([(b.number, b.guest_ns) for b in reader.beats()],
                         [(1, 10), (2, 20), (3, 30)])
        self.assertEqual(reader.problems(), [])


class ExperimentTest(unittest.TestCase):
    """What the experiment makes of its rows."""

    def row(self, method, launch, ms, **more):
        return {"workload": "text", "method": method, "launch": launch, "loop": False, "launch_ms": ms, "done_ms": ms,
                "downtime_ms": ms / 2, "gap_ms": ms, "bytes_before": 10**7, "bytes_after": 10**6, "guest": "unharmed",
                **more}

    def result(self):
        rows = [self.row("presync", n, ms) for n, ms in ((1, 80), (2, 90), (3, 200))]
        rows += [self.row("pre-copy", 1, 1800, guest="HARMED: beats"), {**self.row("pre-copy", 2, 1500), "loop": True},
                 {"workload": "text", "method": "post-copy", "launch": 1, "loop": False, "error": "<refused>"}]
        summary = experiment.summarize(rows)
        return {"rows": rows, "summary": summary, "goals": experiment.goals(summary), "left_out": {"rdma": "no device"},
                "seed": 1, "link_mbit": 1000, "promise": "100ms", **experiment.machine()}

    def test_medians_leave_out_loops_and_failures(self):
        presync_line, stock, failed = self.result()["summary"]
        self.assertEqual((presync_line["launch_ms_median"], presync_line["launch_ms_worst"]), (90, 200))
        self.assertEqual((stock["launches"], stock["done_ms_median"], stock["harmed"]), (1, 1800, 1))
        self.assertEqual((failed["launches"], failed["failed"], failed["error"]), (0, 1, "<refused>"))

    def test_goals_are_missed_aloud(self):
        goals = dict(self.result()["goals"])
        self.assertTrue(goals["text: launch 90 ms (at most 100)"])
        self.assertTrue(goals["text: downtime 45 ms (at most 50)"])
        self.assertTrue(goals["text: 20.0 times as fast as pre-copy (at least 15)"])
        rows = [self.row("presync", 1, 150), self.row("pre-copy", 1, 1500)]
        self.assertEqual([ok for _, ok in experiment.goals(experiment.summarize(rows))][:3], [False, False, False])

    def test_page_needs_no_network_and_hides_no_failure(self):
        page = experiment_page.render(self.result())
        for word in ("http", "src=", "<script", "<refused>"):
            self.assertNotIn(word, page)
        for word in ("&lt;refused&gt;", "1 harmed", "no device", "<svg"):
            self.assertIn(word, page)

    def test_charts_stand_empty_and_single_measurements(self):
        self.assertIn("No measurements", charts.curves({"a": []}, "ms"))
        self.assertIn("none", charts.bars(["g"], ["s"], lambda g, s: None, "ms"))
        self.assertIn("<polyline", charts.curves({"a": [(0, 0)]}, "ms"))


class HostsTest(unittest.TestCase):
    """Two hosts: they reach each other, not through a pulled cable, and leave nothing behind."""

    def test_link(self):
        with hosts.TwoHosts() as two:
            ping = ["busybox", "ping", "-c", "1", "-W", "1", two.address["target"]]
            before = two.bytes_sent("source")
            two.run("source", ping)
            self.assertGreater(two.bytes_sent("source"), before)
            two.link_down()
            with self.assertRaises(hosts.LabError):
                two.run("source", ping)
            two.link_up()
            two.set_rate(100)
            sleeper = two.popen("target", ["sleep", "1000"])
        self.assertIsNotNone(sleeper.poll())
        for name in two.namespace.values():
            self.assertFalse(os.path.exists(f"/run/netns/{name}"))


class MoveTest(unittest.TestCase):
    """One guest, one stock migration over the shaped link."""

    def check(self, reader):
        answer = reader.command("check")
        for name in ("pages_bad", "file_bad", "file_errors", "counter_bad", "beats_dropped"):
            self.assertEqual(answer[name], 0, f"{name} in {answer}")
        return answer

    def test_stock_precopy(self):
        folder = guest.image("text")
        options = {}
        if os.environ.get("PRESYNC_LAB_QEMU10"):
            options["qemu"], options["data_dirs"] = guest.qemu10()
        with tempfile.TemporaryDirectory(prefix="presync-lab-") as run, hosts.TwoHosts() as two:
            spec = guest.GuestSpec(image=folder, data_disk=guest.copy_data_disk(folder, run),
                                   **options)
            start = functools.partial(guest.Guest, spec, folder=run)
            begin = time.monotonic()
            with start("source", popen=functools.partial(two.popen, "source")) as source, \
                    source.reader() as reader:
                beat = source.wait_boot(reader)
                print(f"boot to the first beat: {beat.host - begin:.1f} s")
                with start("target", popen=functools.partial(two.popen, "target"),
                           paused=False) as target:
                    self.move(two, source, target, reader)

    def move(self, two, source, target, reader):
        reader.attach("target", target.sockets.agent)
        # The editor is under way when its account of keys grows.
        before = self.check(reader)
        while before["workload_steps"] < 10:
            reader.wait_beat()
            before = self.check(reader)
        sent = two.bytes_sent("source")
        reader.mark()
        with source.qmp() as one, target.qmp() as other:
            stock = qmp.stock_migrate(one, other, f"tcp:{two.address['target']}:4444")
        reader.wait_beat("target")
        move = reader.result()
        wire = two.bytes_sent("source") - sent
        print(f"stock pre-copy: {stock.wall_ms:.0f} ms (QEMU says {stock.total_ms}), stopped "
              f"{stock.stopped_ms:.0f} ms (QEMU says {stock.downtime_ms}), {move.switch_ms:.0f} ms by the beats "
              f"(longest gap {move.gap_ms:.0f} ms, {move.gap_from} to {move.gap_to}), "
              f"{stock.ram_bytes / 1e6:.0f} MB of RAM in {stock.rounds} rounds, "
              f"{wire / 1e6:.0f} MB on the wire")
        self.assertTrue(move.clean(), move)
        self.assertEqual(reader.problems(), [])
        after = self.check(reader)
        self.assertGreater(after["counter"], before["counter"])
        self.assertGreater(after["file_records"], before["file_records"])
        while after["workload_steps"] <= before["workload_steps"]:
            reader.wait_beat()
            after = self.check(reader)


if __name__ == "__main__":
    hosts.leave_on_sigterm()
    unittest.main()
