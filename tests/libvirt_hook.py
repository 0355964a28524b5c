#!/usr/bin/python3
"""libvirt's hook by itself: whom it asks, what it lets through, and whose files it touches.  PRESYNC_BUILD names the build folder."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import unittest

BUILD = pathlib.Path(os.environ.get("PRESYNC_BUILD", pathlib.Path(__file__).resolve().parent.parent / "build" / "release"))
RACES = int(os.environ.get("PRESYNC_HOOK_RACES", "200"))
HOOK = pathlib.Path(__file__).resolve().parent.parent / "tools" / "libvirt" / "presync-hook"
KNOWN = "6d1e3a52-7c0b-4f55-9b0a-0a5e5f1c2d3e"
OTHER = "11111111-2222-3333-4444-555555555555"
QEMU_USER = 64055  # any that is not root


class HookTest(unittest.TestCase):
    """The hook with its paths set to a folder of ours, and a program that notes how it was called in presync's place."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="presync-hook-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.hook = self.folder / "hook"
        text = HOOK.read_text(encoding="ascii")
        for name, value in (("folder=/run/presync/libvirt", f"folder={self.folder}"), ("notes=/run/presync-hook", f"notes={self.folder}/notes"),
                            ("presync=presync", f"presync={self.folder}/presync")):
            self.assertEqual(text.count(f"\n{name}\n"), 1)
            text = text.replace(f"\n{name}\n", f"\n{value}\n")
        self.hook.write_text(text.replace("/etc/presync/", f"{self.folder}/"), encoding="ascii")
        self.calls = self.folder / "calls"
        self.presync(0)

    def presync(self, code):
        program = self.folder / "presync"
        program.write_text(f'#!/bin/sh\necho "$@" >>{self.calls}\ncat >>{self.calls}\necho no words >&2\nexit {code}\n', encoding="ascii")
        program.chmod(0o755)

    def mirror(self, uuid):
        (self.folder / f"{uuid}.mirrored").touch()

    def call(self, operation, sub="begin", uuid=KNOWN):
        xml = f"<domain type='kvm' id='3'>\n  <name>web1</name>\n  <uuid>{uuid}</uuid>\n</domain>\n"
        done = subprocess.run(["sh", self.hook, "web1", operation, sub, "-"], input=xml, capture_output=True, text=True, check=False)
        self.assertEqual(done.stdout, "", "libvirt takes what is printed for the domain's XML")
        return done

    def test_guests_that_are_not_mirrored_are_nobodys_business(self):
        for code in (0, 1, 3):
            self.presync(code)
            for operation in ("prepare", "migrate", "started", "stopped", "release", "restore", "reconnect"):
                self.assertEqual(self.call(operation).returncode, 0)
        self.mirror(OTHER)
        for operation in ("prepare", "migrate", "started", "stopped", "release"):
            self.assertEqual(self.call(operation).returncode, 0)
        self.assertFalse(self.calls.exists())

    def test_a_guest_that_moved_away_is_not_started_again(self):
        for code, allowed in ((0, True), (1, False), (3, True), (127, True)):
            self.presync(code)
            done = self.call("start")
            self.assertEqual(done.returncode == 0, allowed, code)
            self.assertEqual(self.calls.read_text(encoding="ascii").splitlines()[-1], "may-start web1")
        self.presync(1)
        self.assertIn("no words", self.call("start").stderr)
        # But libvirt may bring it back: then it comes from where it runs. Once.
        self.assertEqual(self.call("migrate").returncode, 0)
        self.assertEqual(self.call("start").returncode, 0)
        self.assertEqual(self.call("start").returncode, 1)
        (self.folder / "presync").unlink()
        self.assertEqual(self.call("start").returncode, 0, "a host without presync starts what it likes")

    def test_what_others_put_into_the_folder_changes_nothing(self):
        """QEMU's user may write there: no link of his is followed, and no mark of his lets a guest start that has left."""
        secret = self.folder / "secret"
        secret.write_text("root's", encoding="ascii")
        mark = self.folder / f"{KNOWN}.arriving"
        mark.symlink_to(secret)
        self.assertEqual(self.call("migrate").returncode, 0)
        self.assertEqual(secret.read_text(encoding="ascii"), "root's")
        self.presync(1)
        self.assertEqual(self.call("start").returncode, 0, "libvirt brings it")
        self.assertEqual(self.call("start").returncode, 1, "it does not")

    @unittest.skipUnless(os.geteuid() == 0, "only root can be several users")
    def test_a_monitor_is_closed_to_others_of_its_user(self):
        """By the rights of its owner: a link in its place changes nothing of root's."""
        self.folder.chmod(0o755)
        monitor = self.folder / f"libvirt-{KNOWN}.qmp"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(monitor))
            os.chown(monitor, QEMU_USER, QEMU_USER)
            self.assertEqual(self.call("started").returncode, 0)
            self.assertEqual(monitor.stat().st_mode & 0o777, 0)
            secret = self.folder / "secret"
            with socket.socket(socket.AF_UNIX) as other:
                other.bind(str(secret))
                before = secret.stat().st_mode
                monitor.unlink()
                monitor.symlink_to(secret)
                os.chown(monitor, QEMU_USER, QEMU_USER, follow_symlinks=False)
                self.assertEqual(self.call("started").returncode, 0)
                self.assertEqual(secret.stat().st_mode, before)

    def test_a_mirrored_guest_is_asked_about_with_its_xml(self):
        self.mirror(KNOWN)
        for operation, sub in (("migrate", "begin"), ("start", "begin"), ("started", "begin"), ("stopped", "end"), ("release", "end")):
            self.calls.unlink(missing_ok=True)
            self.assertEqual(self.call(operation, sub).returncode, 0)
            text = self.calls.read_text(encoding="ascii")
            self.assertTrue(text.startswith(f"libvirt hook web1 {operation}\n"), text)
            self.assertIn(f"<uuid>{KNOWN}</uuid>", text)
        self.calls.unlink()
        self.assertEqual(self.call("prepare").returncode, 0)
        self.assertFalse(self.calls.exists())

    def test_presyncds_no_is_libvirts(self):
        self.mirror(KNOWN)
        self.presync(1)
        for operation, code in (("migrate", 1), ("start", 1), ("started", 1)):
            done = self.call(operation)
            self.assertEqual(done.returncode, code, operation)
            self.assertIn("no words", done.stderr)
        for operation in ("stopped", "release"):
            self.assertEqual(self.call(operation, "end").returncode, 0, "the end of a guest can't be refused")

    def test_without_presyncd_a_start_goes_on_and_a_migration_does_not(self):
        self.mirror(KNOWN)
        self.presync(3)
        done = self.call("migrate")
        self.assertEqual(done.returncode, 1)
        self.assertIn("does not run", done.stderr)
        for operation in ("start", "started"):
            self.assertEqual(self.call(operation).returncode, 0, operation)

    def test_configuration(self):
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / f"{KNOWN}.mirrored").touch()
        (self.folder / "libvirt-hook.conf").write_text(f"folder={elsewhere}\n", encoding="ascii")
        self.assertEqual(self.call("migrate").returncode, 0)
        self.assertTrue(self.calls.exists())


# As that user: puts a symbolic link to `secret` wherever `to` appears, for as long as it is let.
SWAPPER = """
import ctypes, os, sys
to, secret, user = sys.argv[1].encode(), sys.argv[2].encode(), int(sys.argv[3])
os.setgid(user), os.setuid(user)
rename, link = ctypes.CDLL(None).renameat2, os.symlink
while os.getppid() != 1:
    if rename(-100, to + b".x", -100, to, 2) == 0:  # RENAME_EXCHANGE, which fails while `to` is not there
        continue
    try:
        link(secret, to + b".x")
    except OSError:
        pass
"""


@unittest.skipUnless(os.geteuid() == 0, "the hook is root's, and so is this test")
class LinkTest(unittest.TestCase):
    """The mirrored memory becomes the domain's, by root, in folders that QEMU's user has in hand: he can't turn that on another file."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="presync-hook-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.folder.chmod(0o755)
        self.domains = self.folder / "libvirt" / "qemu"
        self.domains.mkdir(parents=True)
        os.chown(self.domains, QEMU_USER, QEMU_USER)  # as libvirt does
        self.domain = self.domains / "7-web1"
        self.secret = self.folder / "secret"
        self.secret.write_text("root's", encoding="ascii")
        self.secret.chmod(0o600)
        self.memory = self.folder / "presync" / "web1.ram"
        self.memory.parent.mkdir(0o700)
        self.make()
        server = socket.socket(socket.AF_UNIX)
        self.addCleanup(server.close)
        server.bind(str(self.folder / "socket"))
        server.listen(8)
        threading.Thread(target=self.serve, args=(server,), daemon=True).start()

    def make(self):
        """The files as libvirt and presyncd make them, and what presyncd answers."""
        if self.domain.exists():  # away first: somebody may go on putting names into it
            self.domain.rename(self.folder / "old")
            shutil.rmtree(self.folder / "old")
        self.memory.unlink(missing_ok=True)
        self.domain.mkdir(0o700)
        os.chown(self.domain, QEMU_USER, QEMU_USER)
        self.memory.write_text("memory", encoding="ascii")
        self.open = self.memory.open("rb")  # as presyncd has it: so the inode is nobody else's
        self.addCleanup(self.open.close)
        there = self.memory.stat()
        self.answer = {"ok": True, "known": True, "folder": str(self.domains), "files":
                       [{"path": str(self.memory), "name": "ram0", "device": there.st_dev, "inode": there.st_ino}]}

    def serve(self, server):
        while True:
            try:
                client = server.accept()[0]
            except OSError:
                return
            with client, client.makefile("rw") as stream:
                stream.readline()
                stream.write(json.dumps(self.answer) + "\n")
                stream.flush()

    def hook(self):
        xml = f"<domain type='kvm' id='7'>\n  <name>web1</name>\n  <uuid>{KNOWN}</uuid>\n</domain>\n"
        return subprocess.run([BUILD / "tools" / "presync", "--socket", self.folder / "socket", "libvirt", "hook", "web1", "start"],
                              input=xml, capture_output=True, text=True, check=False)

    def refused(self, words):
        done = self.hook()
        self.assertNotEqual(done.returncode, 0)
        self.assertIn(words, done.stderr)
        self.untouched(self.secret)

    def untouched(self, path):
        there = path.stat()
        self.assertEqual((there.st_uid, there.st_mode & 0o777, there.st_nlink), (0, 0o600, 1), path)

    def test_the_memory_is_the_domains(self):
        done = self.hook()
        self.assertEqual(done.returncode, 0, done.stderr)
        there = (self.domain / "ram0").lstat()
        self.assertEqual((there.st_ino, there.st_uid, there.st_gid, there.st_mode & 0o7777),
                         (self.memory.stat().st_ino, QEMU_USER, QEMU_USER, 0o600))

    def test_links_in_the_way(self):
        (self.domain / "ram0").symlink_to(self.secret)
        self.refused("File exists")
        self.make()
        self.memory.unlink()
        self.memory.symlink_to(self.secret)
        self.refused("is a symbolic link")
        self.make()
        shutil.rmtree(self.domain)
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir()
        self.domain.symlink_to(elsewhere)
        self.refused("symbolic link")
        self.assertEqual(list(elsewhere.iterdir()), [])
        self.domain.unlink()
        self.make()
        self.memory.parent.rename(self.folder / "away")
        self.memory.parent.symlink_to(elsewhere)
        os.link(self.secret, elsewhere / self.memory.name)
        done = self.hook()
        self.assertIn("is not the file that presyncd mirrors into", done.stderr)
        self.assertEqual(self.secret.stat().st_uid, 0)

    def test_another_file_or_folder(self):
        self.memory.unlink()
        self.memory.write_text("another", encoding="ascii")
        self.memory.chmod(0o600)
        self.refused("is not the file that presyncd mirrors into")
        self.untouched(self.memory)
        self.make()
        (self.domains / "7-web").mkdir()
        self.refused("two folders")
        (self.domains / "7-web").rmdir()
        (self.domains / "7-other").mkdir()  # not this domain's name
        self.assertEqual(self.hook().returncode, 0)
        self.make()
        for folder in (self.domains, self.domain):
            mode = folder.stat().st_mode & 0o777
            folder.chmod(0o777)
            self.refused("can be written by others than its owner")
            folder.chmod(mode)

    def test_a_race(self):
        """Hundreds of tries while somebody swaps the name: as it was, the hook lost within some hundreds."""
        swapper = subprocess.Popen([sys.executable, "-c", SWAPPER, str(self.domain / "ram0"), str(self.secret), str(QEMU_USER)])
        self.addCleanup(swapper.wait)
        self.addCleanup(swapper.kill)
        for _ in range(RACES):
            self.make()
            self.hook()
            self.untouched(self.secret)
        self.assertIsNone(swapper.poll())


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    unittest.main()
