#!/usr/bin/python3
"""libvirt's hook by itself: whom it asks, and what it lets through.  Needs nothing."""

import os
import pathlib
import subprocess
import tempfile
import unittest

HOOK = pathlib.Path(__file__).resolve().parent.parent / "tools" / "libvirt" / "presync-hook"
KNOWN = "6d1e3a52-7c0b-4f55-9b0a-0a5e5f1c2d3e"
OTHER = "11111111-2222-3333-4444-555555555555"


class HookTest(unittest.TestCase):
    """The hook with its paths set to a folder of ours, and a program that notes how it was called in presync's place."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="presync-hook-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.hook = self.folder / "hook"
        text = HOOK.read_text(encoding="ascii")
        for name, value in (("folder=/run/presync/libvirt", f"folder={self.folder}"), ("presync=presync", f"presync={self.folder}/presync")):
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


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    unittest.main()
