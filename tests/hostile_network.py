#!/usr/bin/python3
"""A real presyncd with real certificates, and everybody who should not get in.

    tests/hostile_network.py [TestCase.test ...] [-v]     PRESYNC_BUILD names the build folder

On loopback; needs no privilege. Each case comes many times and must be refused each time, be logged once, and leave nothing
behind: what presyncd holds (descriptors, threads, memory, files, children) is looked at from outside, before and after.
"""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import certificates, hosts, presync, users, wire_peer  # noqa: E402  (after the path is set)
from lab.wire_peer import (  # noqa: E402
    CLOSE_SESSION, CONTROL, DATA, LINK_READY, OUTCOME, Peer, QUERY, Refused, SESSION_OPENED, field, page_frame, preamble)

TIMES = 20
RAM = 32 << 20
ALREADY_EXISTS, PERMISSION_DENIED, RESOURCE_EXHAUSTED = 6, 7, 8  # absl::StatusCode
warnings.simplefilter("ignore", DeprecationWarning)  # ssl: naming an old TLS version


def open_session(session, guest="g1", regions=((b"ram0", RAM),), page_bytes=4096):
    return wire_peer.open_session(session, guest, regions, page_bytes)


class Presyncd:
    """The daemon, on loopback, with what can be seen of it from outside."""

    def __init__(self, folder, tls, extra="", tables=""):
        self.folder = pathlib.Path(folder)
        self.ram = pathlib.Path(tempfile.mkdtemp(prefix="presync-hostile-", dir="/dev/shm"))
        self.port = hosts.free_port()
        self.log_path = self.folder / "log"
        config = self.folder / "presyncd.toml"
        lines = [f'listen = "127.0.0.1:{self.port}"', f'socket = "{self.folder}/sock"',
                 f'state_folder = "{self.folder}/state"', f'run_folder = "{self.folder}/run"',
                 f'ram_folder = "{self.ram}"', extra]
        if tls:
            lines += certificates.settings(tls, "target")
        command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine",
                   "q35,accel=tcg,memory-backend=ram0", "-m", f"{RAM >> 20}M", "-object",
                   f"memory-backend-file,id=ram0,size={RAM},share=on,mem-path={{ram.ram0}}",
                   "-qmp", "unix:{qmp},server=on,wait=off"]
        lines += [tables]
        for guest in ("g1", "g2"):
            lines += [f"[guest.{guest}]", f"command = {json.dumps(command)}"]
        config.write_text("\n".join(lines) + "\n")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen([presync.build_folder() / "tools" / "presyncd", "-c", config],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            preexec_fn=hosts.die_with_parent)
        deadline = time.monotonic() + 60
        while "ready" not in self.log():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"presyncd did not start:\n{self.log()}")
            time.sleep(0.05)

    def close(self):
        hosts.stop(self.process, 30)
        for note in (self.folder / "run" / "guests").glob("*.guest"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(json.loads(note.read_text())["pid"], 9)
        shutil.rmtree(self.ram, ignore_errors=True)

    def log(self):
        return self.log_path.read_text(errors="replace")

    def dial(self):
        stream = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return stream

    def holds(self):
        """What it has now: descriptors, threads, children, files."""
        proc = pathlib.Path(f"/proc/{self.process.pid}")
        children = (proc / "task" / str(self.process.pid) / "children").read_text().split()
        files = sorted(str(path) for folder in (self.ram, self.folder / "state", self.folder / "run")
                       for path in folder.rglob("*") if path.suffix != ".log")
        return {"fds": len(os.listdir(proc / "fd")), "threads": len(os.listdir(proc / "task")),
                "children": len(children), "files": files}

    def resident_mb(self):
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


class Hostile(unittest.TestCase):
    """Refused each time, logged once, nothing left behind, and the good are served as before."""

    rules = '[peer."one"]\n[peer."two"]\n'
    extra = ""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="presync-hostile-")
        cls.addClassCleanup(shutil.rmtree, cls.folder, True)
        cls.tls = pathlib.Path(cls.folder) / "tls"
        certificates.make(cls.tls, *(f"{name},127.0.0.1" for name in ("target", "one", "two", "unlisted")))
        certificates.make(cls.tls / "other", "stranger,127.0.0.1")
        for kind in ("crt", "key"):
            shutil.copy(cls.tls / "other" / f"stranger.{kind}", cls.tls)
        cls.make_expired()
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

    @classmethod
    def make_expired(cls):
        def run(*arguments, **options):
            subprocess.run(["openssl", *arguments], cwd=cls.tls, check=True, capture_output=True, **options)
        shutil.copy(cls.tls / "one.key", cls.tls / "expired.key")
        run("req", "-new", "-key", "expired.key", "-subj", "/CN=one", "-out", "expired.csr")
        run("x509", "-req", "-in", "expired.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-days", "-1", "-out",
            "expired.crt")

    def setUp(self):
        folder = tempfile.mkdtemp(prefix="run-", dir=self.folder)
        self.target = Presyncd(folder, self.tls, self.extra, self.rules)
        self.addCleanup(self.target.close)
        self.serves()  # whatever is made at the first use is made
        self.before = self.settled()
        self.resident_before = self.target.resident_mb()
        self.log_before = len(self.target.log())

    def settled(self):
        """What it holds once nothing is under way any more."""
        held, since = self.target.holds(), time.monotonic()
        while time.monotonic() - since < 1:
            time.sleep(0.1)
            if self.target.holds() != held:
                held, since = self.target.holds(), time.monotonic()
        return held

    def context(self, name=None, version=None):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if name:
            context.load_cert_chain(self.tls / f"{name}.crt", self.tls / f"{name}.key")
        if version:
            context.maximum_version = version
        return context

    def secure(self, name, version=None):
        stream = self.target.dial()
        try:
            return self.context(name, version).wrap_socket(stream)
        except (ssl.SSLError, OSError):
            stream.close()
            raise

    def peer(self, name="one"):
        return Peer(self.secure(name))

    def opened(self, name="one", guest="g1", session=None):
        deadline = time.monotonic() + 20
        while True:
            peer = self.peer(name)
            self.addCleanup(peer.close)
            peer.send(open_session(session or os.urandom(16), guest))
            try:
                peer.expect(SESSION_OPENED)
                return peer
            except Refused as refused:  # the one before may not be gone yet
                if refused.code != ALREADY_EXISTS or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def serves(self):
        """A good peer is greeted."""
        deadline = time.monotonic() + 30
        while True:
            try:
                self.peer().close()
                return
            except (OSError, EOFError):  # a crowd may be before us
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def new_log(self):
        return self.target.log()[self.log_before:]

    def logged_once(self, words, most=1):
        lines = [line for line in self.new_log().splitlines() if words in line]
        self.assertTrue(0 < len(lines) <= most, f"{words!r} stands there {len(lines)} times:\n{self.new_log()[-2000:]}")

    def nothing_left(self, megabytes=16):
        deadline = time.monotonic() + 20
        while self.target.holds() != self.before:
            if time.monotonic() > deadline:
                self.assertEqual(self.target.holds(), self.before)
            time.sleep(0.1)
        self.serves()
        grown = self.target.resident_mb() - self.resident_before
        # AddressSanitizer keeps what was freed for a while (up to 256 MiB), and looks for leaks itself. ThreadSanitizer has up to
        # four bytes of its own for each of the program's.
        if "TSAN_OPTIONS" in os.environ:
            megabytes *= 4
        if "ASAN_OPTIONS" not in os.environ:
            self.assertLess(grown, megabytes, "MiB of memory were left behind")
        print(f"  {self.id().split('.')[-1]}: {grown:+.1f} MiB, {len(self.new_log().splitlines())} lines logged")

    def refused_at_the_door(self, attempt):
        """`attempt` gets no byte of presync's protocol."""
        with self.assertRaises((OSError, EOFError)):  # ssl.SSLError is an OSError
            attempt()


class Strangers(Hostile):
    """They do not get beyond the handshake."""

    def test_no_certificate(self):
        for _ in range(TIMES):
            self.refused_at_the_door(lambda: self.peer(None))
        self.logged_once("it shows no certificate")
        self.nothing_left()

    def test_wrong_authority(self):
        for _ in range(TIMES):
            self.refused_at_the_door(lambda: self.peer("stranger"))
        self.logged_once("its certificate is not believed")
        self.nothing_left()

    def test_expired(self):
        for _ in range(TIMES):
            self.refused_at_the_door(lambda: self.peer("expired"))
        self.logged_once("certificate has expired")
        self.nothing_left()

    def test_plain(self):
        for _ in range(TIMES):
            self.refused_at_the_door(lambda: Peer(self.target.dial()))
        self.logged_once("does not speak TLS")
        self.nothing_left()

    def test_old_version(self):
        for _ in range(TIMES):
            self.refused_at_the_door(lambda: Peer(self.secure("one", ssl.TLSVersion.TLSv1_2)))
        self.logged_once("TLS: ")
        self.nothing_left()

    def test_garbage(self):
        for size in (1, 31, 32, 5000):
            for _ in range(TIMES):
                for first in (b"\x16", b"P", b"\0"):
                    stream = self.target.dial()
                    with contextlib.suppress(OSError):
                        stream.sendall(first + os.urandom(size - 1))
                        stream.shutdown(socket.SHUT_WR)
                        self.assertEqual(stream.recv(100).replace(b"\x15", b"")[:1] in (b"", b"\x03"), True)
                    stream.close()
        self.assertLess(len(self.new_log().splitlines()), 20, self.new_log())
        self.nothing_left()


class Known(Hostile):
    """Their certificates are good; what they want is not."""

    rules = f'[peer."one"]\nmax_guests = 1\nmax_memory = "{RAM >> 20}M"\n[peer."two"]\nguests = ["g2"]\n'

    def refused(self, code, words, attempt):
        with self.assertRaises(Refused) as caught:
            attempt()
        self.assertEqual(caught.exception.code, code, caught.exception)
        self.assertIn(words, str(caught.exception))

    def test_not_on_the_list(self):
        for _ in range(TIMES):
            self.refused(PERMISSION_DENIED, '[peer."unlisted"]', lambda: self.opened("unlisted"))
        self.logged_once("may not keep guests")
        self.nothing_left()

    def test_words_that_a_terminal_would_obey(self):
        """They are logged on one line and escaped."""
        text = "presync\n2026-11-30 12:00:00.000 error: fake\x1b[2J\x9b31m\u202e"
        for _ in range(TIMES):
            stream = self.secure("one")
            stream.sendall(preamble(CONTROL) + wire_peer.frame(field(wire_peer.HELLO, field(1, 99) + field(2, 99) + field(3, text))))
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while stream.recv(4096):  # its answer, and its end
                    pass
            stream.close()
        log = self.new_log()
        self.assertIn("fake\\x1b[2J\\u009b31m\\u202e", log)
        for bad in ("\x1b", "\x9b", "\u202e", "\n2026-11-30 12:00"):
            self.assertNotIn(bad, log)
        self.nothing_left()

    def test_over_its_memory(self):
        def attempt():
            peer = self.peer()
            self.addCleanup(peer.close)
            peer.send(open_session(os.urandom(16), regions=((b"ram0", RAM + 4096),)))
            peer.expect(SESSION_OPENED)
        for _ in range(TIMES):
            self.refused(RESOURCE_EXHAUSTED, "max_memory", attempt)
        self.logged_once("max_memory")
        self.nothing_left()

    def test_over_its_guests_and_not_its_guest(self):
        first = self.opened()
        for _ in range(TIMES):
            first.lives()
            self.refused(RESOURCE_EXHAUSTED, "max_guests", lambda: self.opened("one", "g2"))
            self.refused(PERMISSION_DENIED, "may not come from two", lambda: self.opened("two", "g1"))
        self.logged_once("max_guests")
        self.logged_once("may not come from two")
        first.lives()
        first.send(field(CLOSE_SESSION, b""))
        self.nothing_left()

    def test_tokens_and_sessions_of_others(self):
        session = os.urandom(16)
        first = self.opened(session=session)
        token = first.link()

        def data(name, stream=0):
            connection = self.secure(name)
            connection.sendall(preamble(DATA, stream, token))
            return connection

        for _ in range(TIMES // 2):  # a stranger's hand, and a stream that was not asked for
            first.lives()
            for bad in (data("two"), data("one", 1)):
                with contextlib.suppress(OSError):
                    self.assertEqual(bad.recv(1), b"")
                bad.close()
        good = data("one")
        first.expect(LINK_READY)
        for _ in range(TIMES):  # replayed
            first.lives()
            again = data("one")
            with contextlib.suppress(OSError):
                self.assertEqual(again.recv(1), b"")
            again.close()
        self.logged_once("is not expected from this peer")
        # The session's id in another's mouth neither takes it over nor ends it.
        for _ in range(TIMES):
            first.lives()
            self.refused(PERMISSION_DENIED, "another peer", lambda: self.opened("two", "g2", session))
            asks = self.peer("two")
            asks.send(field(QUERY, field(1, session) + field(2, "g1")))
            self.assertNotIn(1, asks.expect(OUTCOME), "UNKNOWN, which is 0, is due")
            asks.close()
        first.lives()
        # The link itself works, and pages of it go where they belong only.
        good.sendall(page_frame(1, 0, 1, 4096) + b"x" * 4096 + struct.pack("<IIIIQ", 5, 0, 0, 0, 1))
        self.assertEqual(struct.unpack("<IIIIQ", good.recv(24))[4], 1)
        good.close()
        first.send(field(CLOSE_SESSION, b""))
        self.nothing_left()

    def test_pages_outside_the_guest(self):
        pages = RAM // 4096
        for number, bad in enumerate((page_frame(1, pages, 1, 4096), page_frame(1, 2**32 - 1, 1, 4096),
                                      page_frame(2, pages - 1, 2, 0), page_frame(1, 0, 1, 2**32 - 1),
                                      page_frame(3, 0, 1, 5000), page_frame(9, 0, 1, 4096))):
            peer = self.opened()
            token = peer.link()
            stream = self.secure("one")
            stream.sendall(preamble(DATA, 0, token))
            peer.expect(LINK_READY)
            stream.sendall(bad)
            with contextlib.suppress(OSError):
                self.assertEqual(stream.recv(1), b"", number)
            with self.assertRaises((Refused, EOFError, OSError), msg=number):
                while True:
                    peer.lives()
                    time.sleep(0.02)
            stream.close()
            peer.close()
            self.opened().send(field(CLOSE_SESSION, b""))  # and nothing of it is kept
            time.sleep(0.1)
            for path in self.target.ram.rglob("*"):
                self.assertLessEqual(path.stat().st_size, RAM)
        self.nothing_left()

    def test_lengths_beyond_all_bounds(self):
        big = self.target.resident_mb()
        bodies = [open_session(os.urandom(16), guest="g" * 4000),
                  open_session(os.urandom(16), regions=((b"ram0", 2**63),)),
                  open_session(os.urandom(16), regions=((b"ram0", 4096),) * 300),
                  open_session(os.urandom(16), regions=((b"../../etc/x", 4096),)),
                  open_session(os.urandom(16), guest="../g1"),
                  open_session(os.urandom(3)), open_session(os.urandom(16), page_bytes=1 << 30)]
        for _ in range(3):
            for body in bodies:
                peer = self.peer()
                peer.send(body)
                with self.assertRaises(Refused):
                    peer.expect(SESSION_OPENED)
                peer.close()
            peer = self.peer()  # a name that is no UTF-8
            peer.send(open_session(os.urandom(16), guest=b"\xff\xfe"))
            with self.assertRaises((Refused, EOFError, OSError)):
                peer.expect(SESSION_OPENED)
            peer.close()
            for length in (0xFFFFFFFF, 0x80000000, (1 << 20) + 1):
                peer = self.peer()
                peer.stream.sendall(struct.pack("<I", length) + b"x" * 100)
                with self.assertRaises((Refused, EOFError, OSError)):
                    peer.expect(SESSION_OPENED)
                peer.close()
        self.assertLess(self.target.resident_mb() - big, 16)
        self.assertLess(len(self.new_log().splitlines()), 15, self.new_log())
        self.assertNotIn("protobuf", self.new_log())  # which would say it each time
        self.nothing_left()


class Crowds(Hostile):
    """Many at a time, slow ones, and those who say nothing."""

    def gone(self, streams, seconds):
        """All are closed by the other side within that time."""
        deadline = time.monotonic() + seconds
        for stream in streams:
            stream.settimeout(max(0.01, deadline - time.monotonic()))
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while stream.recv(4096):
                    pass
            stream.close()

    def test_slow_loris(self):
        streams = []
        for _ in range(8):
            streams.append(self.target.dial())  # says nothing
            streams.append(self.target.dial())
            streams[-1].sendall(b"\x16\x03\x01")  # begins a handshake
            stream = self.secure("one")  # is known, and says half of what it is for
            stream.sendall(preamble(CONTROL)[:20])
            streams.append(stream)
            stream = self.secure("one")  # says half a Hello
            stream.sendall(preamble(CONTROL) + struct.pack("<I", 100) + b"x")
            streams.append(stream)
        began = time.monotonic()
        trickle = self.secure("one")
        with contextlib.suppress(OSError):  # a byte now and then does not buy time
            for byte in preamble(CONTROL):
                trickle.sendall(bytes([byte]))
                time.sleep(0.4)
                if time.monotonic() - began > 12:
                    self.fail("somebody who trickles is listened to for ever")
        trickle.close()
        self.gone(streams, 10)
        self.logged_once("did not say what it is for")
        self.nothing_left()

    def test_ten_thousand_connections(self):
        streams, refused, most_fds = [], 0, 0
        for number in range(10000):
            stream = socket.socket()
            stream.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                try:
                    stream.connect(("127.0.0.1", self.target.port))
                except OSError as error:
                    if isinstance(error, BlockingIOError):
                        raise
                    refused += 1
            streams.append(stream)
            if number % 500 == 499:
                most_fds = max(most_fds, self.target.holds()["fds"])
            if len(streams) >= 4000:  # of ours at a time
                streams.pop(0).close()
        self.serves()
        most_fds = max(most_fds, self.target.holds()["fds"])
        # Two for each of 128 who said nothing yet, and of 33 who were dropped for others a moment ago.
        self.assertLessEqual(most_fds, self.before["fds"] + 330)
        for stream in streams:
            stream.close()
        self.assertLess(len(self.new_log().splitlines()), 20, self.new_log()[-3000:])
        self.logged_once("too many new connections at a time")
        self.nothing_left(megabytes=32)
        print(f"  at most {most_fds} descriptors, {most_fds - self.before['fds']} more than before")


class Silent(Hostile):
    """Who says nothing from many addresses does not keep those out who say who they are."""

    def hold(self, address, streams):
        """One more silent connection from there."""
        stream = socket.socket()
        stream.setblocking(False)
        stream.bind((address, 0))
        with contextlib.suppress(BlockingIOError, ConnectionError):
            stream.connect(("127.0.0.1", self.target.port))
        streams.append(stream)
        if len(streams) > 60:  # of the address: the oldest are closed long since
            streams.pop(0).close()

    def crowd(self, addresses, ended):
        held = {address: [] for address in addresses}
        while not ended.wait(0.004):
            for address, streams in held.items():
                self.hold(address, streams)
        for streams in held.values():
            for stream in streams:
                stream.close()

    def comes_in(self, address):
        stream = socket.create_connection(("127.0.0.1", self.target.port), 30, source_address=(address, 0))
        Peer(self.context("one").wrap_socket(stream)).close()

    def test_five_addresses(self):
        ended = threading.Event()
        crowd = threading.Thread(target=self.crowd, args=([f"127.0.0.{number}" for number in range(2, 7)], ended))
        crowd.start()
        try:
            deadline = time.monotonic() + 60
            while "too many new connections" not in self.new_log():  # all places are theirs
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.05)
            for number in range(40):
                self.comes_in(f"127.0.0.{100 + number % 20}")  # of the same network, seen never before
        finally:
            ended.set()
            crowd.join()
        self.assertLess(len(self.new_log().splitlines()), 10, self.new_log())
        self.nothing_left()


NOBODY = 65534


class Plain(unittest.TestCase):
    """Without certificates: what every status says. That other hosts are refused then is in e2e.py, which has some."""

    def opens(self, target):
        """Whether a user without rights can open a session."""
        def open_one():
            peer = Peer(socket.create_connection(("127.0.0.1", target.port), timeout=30))
            peer.send(open_session(os.urandom(16)))
            peer.expect(SESSION_OPENED)
            return True

        status = users.try_as(NOBODY, open_one)
        self.assertIn(status, (0, 1))
        return status == 0

    def target(self, extra):
        folder = tempfile.mkdtemp(prefix="presync-hostile-")
        self.addCleanup(shutil.rmtree, folder, True)
        target = Presyncd(folder, None, extra)
        self.addCleanup(target.close)
        return target

    @unittest.skipUnless(os.geteuid() == 0, "only root can be another user")
    def test_a_user_of_the_host(self):
        target = self.target("")
        before = target.holds()
        for _ in range(3):
            self.assertFalse(self.opens(target))
        self.assertEqual(target.holds()["children"], before["children"])
        self.assertEqual(target.holds()["files"], before["files"])
        self.assertEqual(target.log().count("trust_this_host = true"), 1, target.log())
        self.assertTrue(self.opens(self.target("trust_this_host = true")))

    def status(self, *options):
        target = self.target(*options)
        base = [presync.build_folder() / "tools" / "presync", "--socket", f"{target.folder}/sock", "status"]
        text = subprocess.run(base, capture_output=True, text=True, check=True).stdout
        return text, json.loads(subprocess.run(base + ["--json"], capture_output=True, text=True, check=True).stdout)

    def test_insecure_is_said_every_time(self):
        text, answer = self.status("insecure = true")
        self.assertIn("INSECURE", text)
        self.assertEqual(answer["security"]["mode"], "insecure")
        self.assertIn("INSECURE", answer["security"]["warning"])

    def test_this_host_only(self):
        text, answer = self.status("trust_this_host = true")
        self.assertIn("trust_this_host", text)
        self.assertEqual(answer["security"]["mode"], "this-host-only")

    def test_nobody(self):
        text, answer = self.status("")
        self.assertNotIn("INSECURE", text)
        self.assertEqual(answer["security"], {"mode": "no-peers", "require_encryption": False, "warning": ""})


if __name__ == "__main__":
    unittest.main()
