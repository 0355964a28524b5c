"""Sockets inside a network namespace, for a process that stays outside."""

import ctypes
import os
import threading

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace):
    """The calling thread uses the network of `namespace` (a name of `ip netns`) from now on."""
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"enter the network namespace {namespace}")
    finally:
        os.close(fd)


def within(namespace, function):
    """What `function()` returns, run in a thread of its own inside `namespace`."""
    result = []

    def run():
        enter(namespace)
        result.append(function())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if not result:
        raise OSError(f"a call inside the network namespace {namespace} failed: see above")
    return result[0]
