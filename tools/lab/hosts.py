"""Two hosts in one machine: network namespaces "source" and "target" joined by a shaped veth pair.

    with TwoHosts(link_mbit=1000) as hosts:
        server = hosts.popen("target", ["iperf3", "-s", "-1"])
        hosts.run("source", ["iperf3", "-c", hosts.address["target"]])

Needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN).  Everything is gone afterwards: the processes that
were started with popen (killed by their ids), the namespaces, the link.  Children also die with
this process, and namespaces that a killed process left are removed by the next one; a program that
calls leave_on_sigterm() cleans up by itself then, too.
"""

import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import subprocess

_NAME = re.compile(r"presync-(\d+)-\d+-(?:source|target)$")
_PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)
_count = itertools.count()


class LabError(Exception):
    """Something that the lab needs is missing or failed; the text says what and what to do."""


def die_with_parent():
    """For preexec_fn: the kernel kills this child when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def free_port():
    """A TCP port of loopback's that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def leave_on_sigterm():
    """SIGTERM becomes an exception, as Ctrl-C does, so that context managers clean up."""
    def leave(number, _):
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, leave)


def stop(process, seconds=5):
    """Ends one process of ours: SIGTERM, and SIGKILL if it is still there after `seconds`."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def _remove_left_behind():
    """Namespaces whose process no longer exists (it was killed)."""
    for line in _ip("netns", "list").splitlines():
        match = _NAME.match(line.split()[0]) if line.split() else None
        if match and not os.path.exists(f"/proc/{match[1]}"):
            with contextlib.suppress(LabError):
                _ip("netns", "del", match[0])


class TwoHosts:
    """Context manager; see the module's text.  Hosts are named "source" and "target"."""

    hosts = ("source", "target")
    device = "link0"  # the same name on both hosts
    address = {"source": "10.231.0.1", "target": "10.231.0.2"}

    def __init__(self, link_mbit=1000):
        self.link_mbit = link_mbit
        run = next(_count)
        self.namespace = {host: f"presync-{os.getpid()}-{run}-{host}" for host in self.hosts}
        self._processes = []

    def __enter__(self):
        if os.geteuid() != 0:
            raise LabError("network namespaces need root: run this as root")
        _remove_left_behind()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def _make(self):
        for name in self.namespace.values():
            _ip("netns", "add", name)
        source, target = (self.namespace[host] for host in self.hosts)
        _ip("-n", source, "link", "add", self.device, "type", "veth",
            "peer", "name", self.device, "netns", target)
        for host, name in self.namespace.items():
            _ip("-n", name, "addr", "add", f"{self.address[host]}/24", "dev", self.device)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", self.device, "up")
        self.set_rate(self.link_mbit)

    def close(self):
        """Ends what popen started and removes the namespaces.  May be called twice."""
        for process in reversed(self._processes):
            stop(process)
        self._processes.clear()
        for name in self.namespace.values():
            with contextlib.suppress(LabError):  # not made yet, or gone already
                _ip("netns", "del", name)

    def wrap(self, host, argv):
        """`argv` as it runs inside a host."""
        return ["ip", "netns", "exec", self.namespace[host], *map(str, argv)]

    def popen(self, host, argv, **options):
        """subprocess.Popen inside a host.  The process ends with this object at the latest."""
        process = subprocess.Popen(self.wrap(host, argv), preexec_fn=die_with_parent, **options)
        self._processes.append(process)
        return process

    def run(self, host, argv, **options):
        """subprocess.run inside a host, output captured as text; a failure is a LabError."""
        done = subprocess.run(self.wrap(host, argv), capture_output=True, text=True, check=False,
                              **options)
        if done.returncode != 0:
            raise LabError(f"{' '.join(map(str, argv))} on {host} ended with {done.returncode}: "
                           f"{done.stderr.strip()}")
        return done.stdout

    def set_rate(self, mbit):
        """Shapes both directions; None takes the shaping away.

        With 256 KB of burst iperf3 reaches 956 of 1000 Mbit/s.
        """
        self.link_mbit = mbit
        for host in self.hosts:
            if mbit is None:
                with contextlib.suppress(LabError):  # there was none
                    self.run(host, ["tc", "qdisc", "del", "dev", self.device, "root"])
            else:
                self.run(host, ["tc", "qdisc", "replace", "dev", self.device, "root", "tbf", "rate",
                                f"{mbit}mbit", "burst", "256kb", "latency", "20ms"])

    def link_down(self):
        """As if the cable were pulled."""
        _ip("-n", self.namespace["source"], "link", "set", self.device, "down")

    def link_up(self):
        """The cable is back (addresses and shaping were kept)."""
        _ip("-n", self.namespace["source"], "link", "set", self.device, "up")

    def bytes_sent(self, host):
        """Bytes that left a host through the link since it was made, all headers included."""
        return int(self.run(host, ["cat", f"/sys/class/net/{self.device}/statistics/tx_bytes"]))
