"""The process of a QEMU that was taken over: it has mapped the guest's memory, serves the monitor and the plug-in, and
passes on what a real QEMU and the real plug-in (preloaded into it) say, until it begins to lie. Run by lying_qemu.py.

    lying_process.py SEED monitor|plugin|restless MEMORY MONITOR REAL_MONITOR GLUE REAL_GLUE OTHERS_PATH...
    lying_process.py --name MEMORY MONITOR REAL_MONITOR [OWN [-S]]     all is true, but MEMORY is another guest's
"""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import random
import socket
import struct
import sys
import tempfile
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)
SYS_USERFAULTFD = 323
UFFDIO_API, UFFDIO_REGISTER, UFFD_API = 0xC018AA3F, 0xC020AA00, 0xAA
WRITE_PROTECT_FEATURES_AND_REMOVE = 1 << 0 | 1 << 12 | 1 << 3  # PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM, EVENT_REMOVE
REPLY = struct.Struct("<IHHIiIIQQQII")  # struct presync_glue_reply
ODD = (None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, -1e308, "", "x" * 100000, "\x1b[31m\r\n", [], {}, [[]], {"a": {}},
       "running", "inmigrate", "completed", "pc.ram", "/")


class Liar:
    def __init__(self, seed, others):
        self.dice = random.Random(seed)
        self.others = others
        self.restless = False
        self.patience = self.dice.choice((0, 0, 3, 10, 30, 60, 90))  # answers that are true at first
        self.eagerness = self.dice.choice((0.02, 0.1, 0.5))

    def lies_now(self):
        self.patience -= 1
        return self.patience < 0 and self.dice.random() < self.eagerness

    # The monitor ------------------------------------------------------------------------------------------------------

    def odd(self):
        if self.dice.random() < 0.3:
            return self.dice.choice(self.others)
        return self.dice.choice(ODD)

    def change(self, value):
        """`value` with something in it changed."""
        if isinstance(value, dict) and value and self.dice.random() < 0.9:
            key = self.dice.choice(list(value))
            value = dict(value)
            chance = self.dice.random()
            if chance < 0.15:
                del value[key]
            else:
                value[key] = self.change(value[key])
            return value
        if isinstance(value, list) and value and self.dice.random() < 0.9:
            value = list(value)
            at, chance = self.dice.randrange(len(value)), self.dice.random()
            if chance < 0.1:
                del value[at]
            elif chance < 0.2:
                value += [value[at]] * self.dice.choice((1, 3, 2000))
            else:
                value[at] = self.change(value[at])
            return value
        if isinstance(value, int) and self.dice.random() < 0.5:
            return self.dice.choice((0, 1, value - 1, value + 1, value * 2, -value, os.getppid()))
        return self.odd()

    def lie_in(self, answer):
        """The bytes to send in place of `answer`; None: hang up."""
        how = self.dice.randrange(20)
        line = json.dumps(answer).encode() + b"\r\n"
        if how < 10:
            return json.dumps({**answer, **({"return": self.change(answer["return"])} if "return" in answer else
                                            self.change(answer))}).encode() + b"\r\n"
        if how == 10:
            return json.dumps({"id": answer.get("id"), "error": {"class": self.odd(), "desc": self.odd()}}).encode() + b"\n"
        if how == 11:
            return b'{"return": ' + b"[" * 100000 + b"\n" + line
        if how == 12:
            return b"x" * self.dice.choice((100000, 9 << 20))  # and no end of a line
        if how == 13:
            return line[:len(line) // 2]
        if how == 14:
            event = json.dumps({"event": self.dice.choice(("STOP", "RESUME", "MIGRATION", "DEVICE_DELETED", "SHUTDOWN")),
                                "data": {"path": "/machine/peripheral/x", "status": self.odd()},
                                "timestamp": {"seconds": self.odd(), "microseconds": self.odd()}}).encode()
            return (event + b"\n") * 20000 + line
        if how == 15:
            return bytes(self.dice.randrange(256) for _ in range(200)) + b"\n" + line
        if how == 16:
            return json.dumps({**answer, "id": self.odd()}).encode() + b"\n"
        if how == 17:
            return line * 50
        return b"" if how == 18 else None

    def serve_monitor(self, path, real):
        for client in accept(path, socket.SOCK_STREAM):
            with client, socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(real)
                threading.Thread(target=pass_on, args=(client, qemu), daemon=True).start()
                with contextlib.suppress(OSError, ValueError):
                    self.talk(client, qemu)
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def talk(self, client, qemu):
        for line in qemu.makefile("rb"):
            answer = json.loads(line)
            own_vcpus(answer)
            words = json.dumps(answer).encode() + b"\r\n"
            if self.lies_now():
                words = self.lie_in(answer)
            if words is None:
                return
            if self.patience < 0 and self.dice.random() < 0.05:
                for byte in words[:100]:
                    client.sendall(bytes([byte]))
                    time.sleep(0.01)
                words = words[100:]
            client.sendall(words)

    # The plug-in ------------------------------------------------------------------------------------------------------

    def serve_plugin(self, path, real):
        for client in accept(path, socket.SOCK_SEQPACKET):
            with client, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as plugin:
                plugin.connect(real)
                with contextlib.suppress(OSError):
                    self.answer_all(client, plugin)

    def answer_all(self, client, plugin):
        while True:
            reply, fds, _, _ = socket.recv_fds(plugin, 256, 8)
            if not reply:
                return
            if self.restless and fds:
                close_all(fds)
                fds = [restless_userfaultfd()]
            elif self.lies_now():
                reply, fds = self.lie_in_packet(reply, fds)
            if reply is None:
                close_all(fds)
                return
            socket.send_fds(client, [reply], fds)
            close_all(fds)
            request, sent, _, _ = socket.recv_fds(client, 256, 8)
            if not request:
                close_all(sent)
                return
            socket.send_fds(plugin, [request], sent)
            close_all(sent)

    def lie_in_packet(self, reply, fds):
        how = self.dice.randrange(10)
        if how < 3:
            fields = list(REPLY.unpack(reply))
            at = self.dice.randrange(len(fields))
            bits = (32, 16, 16, 32, 31, 32, 32, 64, 64, 64, 32, 32)[at]
            fields[at] = self.dice.choice((0, 1, 2, (1 << bits) - 1, self.dice.getrandbits(bits), os.getppid() % (1 << bits)))
            return REPLY.pack(*fields), fds
        if how == 3:
            return self.dice.choice((reply[:-1], reply + b"x", b"", b"x", reply * 4)), fds
        if how == 4:
            time.sleep(self.dice.choice((0.1, 2)))
            return None, fds
        # Other descriptors, as many as were announced, or more, or fewer.
        count = max(0, len(fds) + self.dice.choice((0, 0, 0, -1, 1, 6)))
        close_all(fds)
        fds = [self.descriptor() for _ in range(count)]
        if self.dice.random() < 0.7:
            fields = list(REPLY.unpack(reply))
            fields[-1] = count
            reply = REPLY.pack(*fields)
        return reply, fds

    def descriptor(self):
        how = self.dice.randrange(8)
        if how == 0:
            return os.open("/dev/null", os.O_RDWR)
        if how == 1:
            ends = os.pipe()
            os.close(ends[1])
            return ends[0]
        if how == 2:
            fd = os.memfd_create("liar")
            os.truncate(fd, self.dice.choice((0, 4096, 1 << 20, 1 << 40)))
            return fd
        if how == 3:
            fd = os.memfd_create("liar", os.MFD_ALLOW_SEALING)
            os.truncate(fd, 1 << 20)
            os.pwrite(fd, struct.pack("<QII", 64 << 20, self.dice.choice((0, 1)), self.dice.choice((0, 5, 2**31))), 0)
            fcntl.fcntl(fd, 1033, 2 | 4)  # F_ADD_SEALS: SHRINK, GROW
            return fd
        if how == 4:
            return socket.socket(socket.AF_UNIX).detach()
        if how == 5:
            return os.open(tempfile.gettempdir(), os.O_RDONLY)
        return restless_userfaultfd()


def restless_userfaultfd():
    """One with an event that nobody reads: the kernel says "again" to whoever protects a page with it."""
    fd = LIBC.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | 1)
    if fd < 0:
        return os.open("/dev/null", os.O_RDWR)
    memory = mmap.mmap(-1, 8 * 4096)  # shared
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(fd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, WRITE_PROTECT_FEATURES_AND_REMOVE, 0))
    fcntl.ioctl(fd, UFFDIO_REGISTER, struct.pack("<QQQQ", address, 8 * 4096, 2, 0))
    threading.Thread(target=LIBC.madvise, args=(ctypes.c_void_p(address), ctypes.c_size_t(4096), 9), daemon=True).start()
    time.sleep(0.01)
    KEPT.append((memory, os.dup(fd)))
    return fd


KEPT = []


def close_all(fds):
    for fd in fds:
        os.close(fd)


def accept(path, kind):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(path)
    listener.listen(8)
    while True:
        yield listener.accept()[0]


def pass_on(client, qemu):
    """What presyncd says, with its descriptors."""
    with contextlib.suppress(OSError):
        while True:
            words, fds, _, _ = socket.recv_fds(client, 65536, 4)
            if not words:
                break
            socket.send_fds(qemu, [words], fds)
            close_all(fds)
    with contextlib.suppress(OSError):
        qemu.shutdown(socket.SHUT_RDWR)


def name_memory(memory, monitor, real, own="", *_):
    """A monitor that calls `memory` the guest's, and this process its vCPU. This has `own` mapped, if that is given: a
    file as large. Further arguments are for whoever looks at the command line."""
    if own:
        with open(own, "w+b") as file:
            file.truncate(64 << 20)
            KEPT.append(mmap.mmap(file.fileno(), 0))
    for client in accept(monitor, socket.SOCK_STREAM):
        with client, socket.socket(socket.AF_UNIX) as qemu, contextlib.suppress(OSError):
            qemu.connect(real)
            threading.Thread(target=pass_on, args=(client, qemu), daemon=True).start()
            for line in qemu.makefile("rb"):
                answer = json.loads(line)
                if str(answer.get("return")).startswith("/dev/shm/"):
                    answer["return"] = memory
                own_vcpus(answer)
                client.sendall(json.dumps(answer).encode() + b"\r\n")


def own_vcpus(answer):
    """This process's thread is all vCPUs."""
    for each in answer["return"] if isinstance(answer.get("return"), list) else ():
        if isinstance(each, dict) and "thread-id" in each:
            each["thread-id"] = os.getpid()


def main(seed, what, memory, monitor, real_monitor, glue, real_glue, *others):
    with open(memory, "r+b") as file:
        KEPT.append(mmap.mmap(file.fileno(), 0))
    true, false = Liar(seed, others), Liar(seed, others)
    true.patience = 1 << 60
    true.restless = what == "restless"
    talker, helper = (false, true) if what == "monitor" else (true, true if true.restless else false)
    threading.Thread(target=helper.serve_plugin, args=(glue, real_glue), daemon=True).start()
    talker.serve_monitor(monitor, real_monitor)


if __name__ == "__main__":
    if sys.argv[1] == "--name":
        name_memory(*sys.argv[2:])
    else:
        main(int(sys.argv[1]), *sys.argv[2:])
