"""Proxies that stand between two parts of presync and break what passes: for the fault campaign.

WireProxy   between two presyncds (TCP, inside the source's namespace). It reads the control frames
            (docs/protocol.md) that pass, so that a fault can come exactly at a step, and can damage them.
QmpFront    between presyncd and a QEMU's monitor.

Both pass everything on untouched until they are told otherwise.
"""

import array
import contextlib
import json
import random
import select
import socket
import struct
import threading
import time

from . import netns

PREAMBLE_BYTES = 32
STEPS = {1: "hello", 2: "open-session", 3: "session-opened", 4: "link-ready", 5: "refused", 6: "ping", 7: "pong",
         8: "begin-handover", 9: "handover-ready", 10: "state-chunk", 11: "hash-request", 12: "hash-reply",
         13: "load", 14: "loaded", 15: "run", 16: "running", 17: "abort-handover", 18: "query-outcome",
         19: "outcome", 20: "close-session", 21: "open-link", 22: "link-offer", 23: "link-refused",
         24: "close-link", 25: "link-closed"}


def step_of(body):
    """The name of the message in a control frame's body: its first field's number, which protobuf
    writes as a varint."""
    key = shift = 0
    for byte in body[:5]:
        key |= (byte & 0x7f) << shift
        shift += 7
        if byte < 0x80:
            break
    return STEPS.get(key >> 3, "unknown")


def reset(connection):
    """Ends a TCP connection with RST."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        connection.close()


class WireProxy:
    """Listens on 127.0.0.1 in the namespace `namespace` and passes on to `to` from there.  A context manager.

    `on_frame(step, forward)` is called, in the thread that carries the frame, before each control frame
    goes on; `forward()` sends it.  What it returns goes on instead of the frame: None for the frame
    itself (unless forward() was called), else bytes, which may be empty.
    """

    def __init__(self, namespace, to):
        self._namespace = namespace
        self._to = to
        self.on_frame = None
        self._lock = threading.Lock()
        self._pairs = []
        self._listener = netns.within(namespace, self._listen)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @staticmethod
    def _listen():
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        return listener

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset_all()

    def reset_all(self):
        """Resets every connection that passes, on both sides."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for connection in pair:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                reset(connection)

    def _accept(self):
        netns.enter(self._namespace)
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket()
            server.settimeout(5)
            try:
                server.connect(self._to)
            except OSError:
                reset(client)
                server.close()
                continue
            server.settimeout(None)
            for connection in (client, server):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((client, server))
            threading.Thread(target=self._carry_first, args=(client, server), daemon=True).start()

    def _carry_first(self, client, server):
        preamble = _read_exactly(client, PREAMBLE_BYTES)
        control = preamble is not None and preamble[8:12] == b"\x01\0\0\0"
        if preamble is not None:
            with contextlib.suppress(OSError):
                server.sendall(preamble)
        back = threading.Thread(target=self._carry, args=(server, client, control), daemon=True)
        back.start()
        self._carry(client, server, control)
        back.join()
        with self._lock:
            if (client, server) in self._pairs:
                self._pairs.remove((client, server))
        for connection in (client, server):
            connection.close()

    def _carry(self, source, sink, control):
        try:
            while True:
                if not control:
                    data = source.recv(1 << 18)
                    if not data:
                        break
                    sink.sendall(data)
                    continue
                head = _read_exactly(source, 4)
                body = _read_exactly(source, struct.unpack("<I", head)[0]) if head else None
                if body is None:
                    break
                self._pass(head + body, step_of(body), sink)
        except (OSError, MemoryError):
            pass
        for connection, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
            with contextlib.suppress(OSError):
                connection.shutdown(how)

    def _pass(self, frame, step, sink):
        sent = []

        def forward():
            sent.append(True)
            sink.sendall(frame)

        hook = self.on_frame
        instead = hook(step, forward, frame) if hook else None
        if instead is not None:
            sink.sendall(instead)
        elif not sent:
            sink.sendall(frame)


def damage(kind, frame, seed):
    """A frame as a broken network would deliver it: "truncate", "duplicate" or "corrupt"."""
    rng = random.Random(seed)
    if kind == "truncate":
        return frame[:rng.randrange(1, len(frame))]
    if kind == "duplicate":
        return frame + frame
    broken = bytearray(frame)
    # The length too: a peer must survive that.
    for _ in range(rng.randrange(1, 4)):
        broken[rng.randrange(min(len(broken), 64))] ^= 1 << rng.randrange(8)
    return bytes(broken)


class QmpFront:
    """Passes one monitor on. `listener` was made listening by the QEMU's own process (tools/lab/fronted),
    so that whoever connects sees that process as its peer, as presyncd wants to.

    Faults, by setting `fault` to (kind, command): from the next `command` (None: any) on
      "stall"   nothing passes while it is set
      "error"   QEMU is not asked: the command is answered by an error, once
      "close"   the connection is closed, once
    """

    def __init__(self, listener, backend):
        self.listener = listener
        self.backend = backend
        self.fault = None
        self._ended = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._ended = True
        self.fault = None
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self.backend)
            except OSError:
                client.close()
                server.close()
                continue
            threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client, server):
        try:
            while not self._ended:
                ready, _, _ = select.select([client, server], [], [], 0.5)
                for connection in ready:
                    data, fds = _receive_with_fds(connection)
                    if not data:
                        return
                    sink = server if connection is client else client
                    if connection is client and not self._may_pass(data, client):
                        _close_fds(fds)
                        continue
                    while self.fault is not None and self.fault[0] == "stalled":
                        time.sleep(0.02)
                    _send_with_fds(sink, data, fds)
        except OSError:
            pass
        finally:
            client.close()
            server.close()

    def _may_pass(self, data, client):
        fault = self.fault
        if fault is None or fault[0] == "stalled":
            return True
        kind, command = fault
        if command is not None and f'"{command}"'.encode() not in data:
            return True
        if kind == "stall":
            self.fault = ("stalled", command)
            return True
        self.fault = None
        if kind == "close":
            raise OSError("closed, as scripted")
        number = {}
        with contextlib.suppress(ValueError):
            request = json.loads(data)
            number = {"id": request["id"]} if "id" in request else {}
        answer = {"error": {"class": "GenericError", "desc": "an error, as scripted"}, **number}
        client.sendall(json.dumps(answer).encode() + b"\r\n")
        return False


def _read_exactly(connection, count):
    data = bytearray()
    while len(data) < count:
        try:
            got = connection.recv(count - len(data))
        except OSError:
            return None
        if not got:
            return None
        data += got
    return bytes(data)


def _receive_with_fds(connection):
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_LEN(8 * fds.itemsize))
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[:len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


def _close_fds(fds):
    for fd in fds:
        with contextlib.suppress(OSError):
            socket.close(fd)


def _send_with_fds(connection, data, fds):
    if fds:
        socket.send_fds(connection, [data], fds)
        _close_fds(fds)
    else:
        connection.sendall(data)
