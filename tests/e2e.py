#!/usr/bin/python3
"""presync end to end: real QEMUs, real Linux guests, two presyncds between two network namespaces.

    tests/e2e.py [TestCase.test ...] [-v]     needs root; PRESYNC_BUILD names the build folder

Every move is verified byte for byte by presync's own --verify, and by the guest: its checksummed pages,
its counter, its file and its heartbeat. PRESYNC_E2E_MOVES sets how many handovers in a row are made (20).
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import guest, hosts, presync, qmp  # noqa: E402  (after the path is set)

MOVES = int(os.environ.get("PRESYNC_E2E_MOVES", "20"))
HAMMER = "presync.area_mb=24 presync.pages_s=4000"


@functools.lru_cache(maxsize=1)
def qemu10():
    binary, data = guest.qemu10()
    return {"qemu": binary, "data_dirs": data}


class EndToEnd(unittest.TestCase):
    """Makes and checks guests that move."""

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.folder = self.stack.enter_context(presync.run_folder())

    def spec(self, workload="hammer", kernel_args=HAMMER, **options):
        image = guest.image_for(workload)
        return guest.GuestSpec(image=image, data_disk=guest.copy_data_disk(image, self.folder),
                               workload=workload, kernel_args=kernel_args, **options)

    def hosts(self):
        return self.stack.enter_context(hosts.TwoHosts())

    def move(self, spec, two=None, **options):
        return self.stack.enter_context(
            presync.Move(two or self.hosts(), self.folder, spec, **options))

    def check_guest(self, reader):
        answer = reader.command("check")
        bad = {k: v for k, v in answer.items()
               if k.endswith(("_bad", "_errors", "_dropped")) and v}
        self.assertEqual(bad, {}, answer)
        return answer

    def launch(self, move):
        """Launches and checks everything that can be seen from outside and inside."""
        before = self.check_guest(move.reader)
        move.reader.mark()
        report = move.source_daemon.ask("launch", presync.NAME, "--verify", "--wait")
        move.reader.wait_beat("target")
        self.assertEqual(report["pages_differing"], 0)
        self.assertGreater(report["pages_compared"], 0)
        after = self.check_guest(move.reader)
        beats = move.reader.result()
        self.assertTrue(beats.clean(), beats)
        self.assertGreater(after["counter"], before["counter"])
        self.assertGreaterEqual(after["file_records"], before["file_records"])
        self.assertIsNotNone(move.source.process.wait(20), "the source's QEMU must end")
        return report

    def expect_unharmed(self, move):
        """The guest runs on the source as if nothing had happened."""
        beat = move.reader.wait_beat("source", 30)
        self.check_guest(move.reader)
        self.assertGreater(move.reader.wait_beat("source", 30).number, beat.number)

    def refused(self, daemon, *arguments, words=()):
        with self.assertRaises(presync.Refused) as caught:
            daemon.ask(*arguments)
        self.assertNotIn(caught.exception.code, (0,))
        text = str(caught.exception)
        self.assertEqual(len(text.splitlines()), 1, f"one clear line is due: {text}")
        for word in words:
            self.assertIn(word, text)
        return text


class MoveTest(EndToEnd):
    """A guest that writes hard the whole time arrives whole."""

    def moves(self, **options):
        move = self.move(self.spec(**options))
        move.start()
        report = self.launch(move)
        print(f"launch {report['launch_ms']:.0f} ms, stopped {report['downtime_ms']:.0f} ms (verified)")

    def test_qemu7(self):
        self.moves()

    def test_qemu10(self):
        self.moves(**qemu10())

    def test_two_backends(self):
        self.moves(two_backends=True)

    def test_ld_preload(self):
        spec = self.spec()
        two = self.hosts()
        # The same library by the other door; the variable names the socket.
        glue = f"{self.folder}/preloaded.glue"
        source = dataclasses.replace(spec, ld_preload=presync.plugin_path())
        argv = ["env", f"PRESYNC_GLUE_SOCKET={glue}"]
        popen = two.popen

        def start(host, command, **options):
            return popen(host, argv + list(command), **options)

        daemon = self.stack.enter_context(presync.Daemon(two, "source", self.folder))
        running = self.stack.enter_context(guest.Guest(
            source, "source", self.folder, popen=functools.partial(start, "source")))
        reader = self.stack.enter_context(running.reader())
        running.wait_boot(reader)
        findings = json.loads(daemon.run("doctor", "--qmp", running.sockets.qmp[0], "--json",
                                         capture_output=True, text=True).stdout)
        self.assertIn("proved", " ".join(f["detail"] for f in findings if f["what"] == "dirty log"))

    def test_handler_log(self):
        move = self.move(self.spec())
        status = move.start("--dirty-log", "uffd-handler")
        self.assertEqual(status["dirty_log"], "uffd-handler")
        self.launch(move)

    def test_attach(self):
        """The target's presyncd attaches to a QEMU that already waits."""
        two = self.hosts()
        spec = self.spec()
        waiting = self.stack.enter_context(guest.Guest(
            spec, "target", self.folder, popen=functools.partial(two.popen, "target")))
        with waiting.qmp():
            pass  # it answers
        move = self.move(spec, two)
        move.target_daemon.stop()
        move.target_daemon._write_config({presync.NAME: waiting.sockets.qmp[0]}, {})
        move.target_daemon.start()
        move.source_daemon.ask("start", presync.NAME, "--qmp", move.source.sockets.qmp[0], "--to", move.to)
        move.reader.attach("target", waiting.sockets.agent)
        self.launch(move)

    def test_stop_and_start_again(self):
        move = self.move(self.spec())
        for _ in range(2):
            move.start()
            move.wait_synced()
            move.source_daemon.ask("stop", presync.NAME)
            self.expect_unharmed(move)
        move.start()
        self.launch(move)


class RecordTest(EndToEnd):
    """`presync record`: beside a sync, and by itself; the guest and its sync never notice."""

    def scans(self, file):
        """[{pages written}] of a trace."""
        data = subprocess.run(["zstd", "-dcq", file], stdout=subprocess.PIPE, check=True).stdout
        magic, page, interval_us, pages = struct.unpack_from("<8sIIQ", data)
        self.assertEqual((magic, page, interval_us), (b"PSTRACE1", 4096, 50000))
        scans, at = [], 24
        while at < len(data):
            count, = struct.unpack_from("<I", data, at)
            numbers = struct.unpack_from(f"<{2 * count}I", data, at + 4)
            scans.append({page for i in range(count) for page in range(numbers[2 * i], numbers[2 * i] + numbers[2 * i + 1])})
            at += 4 + 8 * count
        self.assertTrue(all(page < pages for scan in scans for page in scan))
        return scans

    def check_trace(self, answer, file):
        scans = self.scans(file)
        self.assertEqual((len(scans), answer["scans"]), (60, 60))
        self.assertEqual(sum(map(len, scans)), answer["pages_written"])
        # The agent rewrites 4000 pages a second, nine in ten in the hot 96.
        written = set().union(*scans)
        self.assertGreater(len(written), 500)
        hot = [page for page in written if sum(page in scan for scan in scans) > 30]
        self.assertGreater(len(hot), 80)

    def test_beside_a_sync_and_by_itself(self):
        move = self.move(self.spec())
        source, monitor = move.source_daemon, move.source.sockets.qmp[0]
        file = f"{self.folder}/t.pstrace.zst"
        record = ("record", presync.NAME, "--out", file, "--seconds", "3", "--interval", "50ms")
        self.refused(source, *record, words=["not kept in sync", "--qmp"])
        self.check_trace(source.ask(*record, "--qmp", monitor), file)
        move.start()
        move.wait_synced()
        self.refused(source, *record, "--qmp", monitor, words=["already", "without --qmp"])
        self.check_trace(source.ask(*record), file)
        self.refused(source, "record", presync.NAME, "--out", "/nowhere/t", words=["/nowhere/t"])
        self.launch(move)


class ManyMovesTest(EndToEnd):
    """One guest, to and fro, many times in a row."""

    def test_to_and_fro(self):
        two = self.hosts()
        spec = dataclasses.replace(self.spec(), plugin=f"{presync.plugin_path()},socket={{glue}}")
        agent = {side: f"{self.folder}/{side}.agent" for side in two.hosts}
        daemons = {}
        for side in two.hosts:
            sockets = guest.Sockets(ram=["{ram.ram0}"], qmp=["{qmp}"], agent=agent[side],
                                    serial=f"{self.folder}/{side}.serial")
            command = guest.qemu_argv(spec, "target", sockets)
            daemons[side] = self.stack.enter_context(
                presync.Daemon(two, side, self.folder, {presync.NAME: command}))
        first = dataclasses.replace(
            spec, plugin=f"{presync.plugin_path()},socket={self.folder}/first.glue")
        source = self.stack.enter_context(guest.Guest(
            first, "source", self.folder, popen=functools.partial(two.popen, "source")))
        reader = self.stack.enter_context(source.reader())
        source.wait_boot(reader)
        here, there = two.hosts
        monitor = source.sockets.qmp[0]
        launches = []
        for number in range(MOVES):
            daemons[here].ask("start", presync.NAME, "--qmp", monitor,
                              "--to", f"{two.address[there]}:{presync.PORT}")
            reader.attach(there, agent[there])
            before = self.check_guest(reader)
            reader.mark()
            report = daemons[here].ask("launch", presync.NAME, "--wait",
                                       *(["--verify"] if number % 4 == 0 else []))
            reader.wait_beat(there)
            after = self.check_guest(reader)
            self.assertTrue(reader.result().clean(), (number, reader.result()))
            self.assertGreater(after["counter"], before["counter"])
            launches.append(report)
            monitor = f"{daemons[there].folder}/run/guests/{presync.NAME}.qmp"
            here, there = there, here
        times = sorted(report["launch_ms"] for report in launches)
        stops = sorted(report["downtime_ms"] for report in launches)
        print(f"{MOVES} handovers: launch median {times[len(times) // 2]:.0f} ms, worst"
              f" {times[-1]:.0f}; stopped median {stops[len(stops) // 2]:.0f} ms, worst {stops[-1]:.0f}")


class KillTest(EndToEnd):
    """Whatever dies before the source gave up: the guest goes on, and a new start works."""

    def synced(self):
        move = self.move(self.spec())
        move.start()
        move.wait_synced()
        return move

    def launch_after_reconnect(self, move):
        deadline = time.monotonic() + 60
        while move.status()["state"] != "syncing" or move.status()["reconnects"] == 0:
            self.assertLess(time.monotonic(), deadline, move.status())
            time.sleep(0.1)
        move.reader.attach("target", move.target_agent)
        self.launch(move)

    def test_source_presyncd(self):
        move = self.synced()
        move.source_daemon.kill()
        self.expect_unharmed(move)
        move.source_daemon.start()
        move.start()
        self.launch(move)

    def test_target_presyncd(self):
        move = self.synced()
        move.target_daemon.kill()
        self.expect_unharmed(move)
        move.target_daemon.start()
        self.launch_after_reconnect(move)

    def test_target_qemu(self):
        move = self.synced()
        os.kill(move.target_daemon.guest_pids()[presync.NAME], signal.SIGKILL)
        self.expect_unharmed(move)
        self.launch_after_reconnect(move)

    def test_link_down_for_a_while(self):
        move = self.synced()
        move.two.link_down()
        time.sleep(3)
        self.expect_unharmed(move)
        move.two.link_up()
        move.wait_synced()
        self.launch(move)

    def test_source_qemu(self):
        move = self.synced()
        move.source.process.kill()
        deadline = time.monotonic() + 30
        while move.status()["state"] != "failed":
            self.assertLess(time.monotonic(), deadline, move.status())
            time.sleep(0.1)


class BadInputTest(EndToEnd):
    """One clear line, a non-zero exit, and a source guest that runs on untouched."""

    def test_wrong_sockets_and_names(self):
        move = self.move(self.spec())
        source = move.source_daemon
        start = functools.partial(self.refused, source, "start")
        monitor = move.source.sockets.qmp[0]
        start("x", "--qmp", "/nowhere.sock", "--to", move.to, words=["/nowhere.sock"])
        with tempfile.NamedTemporaryFile() as plain:
            start("x", "--qmp", plain.name, "--to", move.to)
        start("x", "--qmp", move.source.sockets.agent, "--to", move.to)
        start("x", "--qmp", monitor, "--to", move.to, words=["not configured"])
        start(presync.NAME, "--qmp", monitor, "--to", "10.231.0.2:9", words=["refused"])
        start(presync.NAME, "--qmp", monitor, "--to", move.to, "--max-launch-time", "5ms",
              words=["can't be kept", "least that can be promised"])
        start(presync.NAME, "--qmp", monitor, "--to", move.to, "--max-launch-time", "soon")
        start(presync.NAME, "--qmp", monitor, "--to", move.to, "--transport", "rdma", words=["RDMA"])
        self.refused(source, "launch", presync.NAME, words=["presync start"])
        self.refused(source, "stop", presync.NAME)
        self.refused(source, "status", "nobody")
        session = move.start()["session"]
        again = source.ask("start", presync.NAME, "--qmp", monitor, "--to", move.to)
        self.assertEqual(again["session"], session, "what is asked for is there already")
        start(presync.NAME, "--qmp", monitor, "--to", move.to, "--transport", "tcp", words=["already", "other options"])
        self.launch(move)

    def test_a_file_in_the_way(self):
        move = self.move(self.spec())
        in_the_way = move.target_daemon.ram / f"{presync.NAME}.ram0.ram"
        in_the_way.write_bytes(b"precious")
        self.refused(move.source_daemon, "start", presync.NAME, "--qmp", move.source.sockets.qmp[0],
                     "--to", move.to, words=["in the way"])
        self.assertEqual(in_the_way.read_bytes(), b"precious")
        in_the_way.unlink()
        move.start()
        self.launch(move)

    def test_sizes_that_differ(self):
        spec = self.spec()
        move = self.move(spec, target_spec=dataclasses.replace(spec, memory_mb=128))
        self.refused(move.source_daemon, "start", presync.NAME, "--qmp", move.source.sockets.qmp[0],
                     "--to", move.to)
        self.assertEqual(list(move.target_daemon.ram.glob("*")), [], "nothing may be left behind")
        self.expect_unharmed(move)

    def test_ram_that_is_not_shared(self):
        two = self.hosts()
        daemon = self.stack.enter_context(presync.Daemon(two, "source", self.folder))
        monitor = f"{self.folder}/plain.qmp"
        two.popen("source", ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-m", "64", "-S",
                             "-qmp", f"unix:{monitor},server=on,wait=off"],
                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with qmp.Qmp(monitor):
            pass
        text = self.refused(daemon, "start", "x", "--qmp", monitor, "--to", "10.231.0.2:7350")
        self.assertIn("share=on", text)

    def test_no_plugin(self):
        two = self.hosts()
        daemon = self.stack.enter_context(presync.Daemon(two, "source", self.folder))
        source = self.stack.enter_context(guest.Guest(
            self.spec(), "source", self.folder, popen=functools.partial(two.popen, "source")))
        with source.qmp():
            pass
        self.refused(daemon, "start", "x", "--qmp", source.sockets.qmp[0], "--to", "10.231.0.2:7350",
                     words=["-plugin", "LD_PRELOAD"])


if __name__ == "__main__":
    unittest.main()
