#!/usr/bin/python3
"""Who may talk to the plug-in of a QEMU that shares its user with others, as all of libvirt's do.

    tests/glue_access.py [-v]     PRESYNC_BUILD names the build folder; needs root, to be several users
"""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import hosts, presync, users  # noqa: E402  (after the path is set)

QEMUS, PRESYNC = 64055, 64056  # as libvirt-qemu and presync; neither need exist


@unittest.skipUnless(os.geteuid() == 0, "only root can be several users")
class PluginTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="presync-glue-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.folder.chmod(0o755)
        self.plugin = self.folder / "presync_glue.so"
        shutil.copy(presync.plugin_path(), self.plugin)  # QEMU's user need not get into the build folder

    def start(self, owner):
        """A QEMU of QEMUS with its socket in a folder of `owner`'s and the group QEMUS, as the packages make it."""
        sockets = self.folder / f"of-{owner}"
        sockets.mkdir()
        os.chown(sockets, owner, QEMUS)
        sockets.chmod(0o770)
        path = sockets / "glue"
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-S", "-plugin",
             f"{self.plugin},socket={path}"], user=QEMUS, group=QEMUS, extra_groups=[], cwd="/", stdin=subprocess.DEVNULL)
        self.addCleanup(hosts.stop, process, 20)
        deadline = time.monotonic() + 60
        while not path.exists():
            self.assertIsNone(process.poll())
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.02)
        return path

    def is_greeted(self, path, user):
        def listen():
            stream = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stream.settimeout(30)
            stream.connect(str(path))
            return stream.recv(256)

        status = users.try_as(user, listen)
        self.assertIn(status, (0, 1))
        return status == 0

    def test_another_qemu_of_the_same_user(self):
        path = self.start(PRESYNC)
        self.assertFalse(self.is_greeted(path, QEMUS))
        self.assertFalse(self.is_greeted(path, PRESYNC), "its mode keeps out whoever has no right to pass by modes")
        self.assertTrue(self.is_greeted(path, 0))

    def test_a_folder_of_its_own(self):
        """QEMU and presyncd of one user: a person's, or as presyncd starts them."""
        for owner in (QEMUS, 0):
            self.assertTrue(self.is_greeted(self.start(owner), QEMUS))


if __name__ == "__main__":
    unittest.main()
