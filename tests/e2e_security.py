#!/usr/bin/python3
"""Who may do what, with real guests between two network namespaces. As e2e.py, of which the moves with certificates are.

    tests/e2e_security.py [TestCase.test ...] [-v]     needs root; PRESYNC_BUILD names the build folder
"""

import os
import pathlib
import shutil
import subprocess
import time
import unittest

from e2e import EndToEnd, presync

OWN_USER = 64123  # nobody's; as presync.sysusers has systemd make one
CAPABILITIES = "-all,+sys_ptrace,+dac_override"  # what presyncd needs where QEMUs are not apart: qemu_user = "own"


class SecurityTest(EndToEnd):
    """Certificates, none, and presyncd without root's rights."""

    def start(self, move, **options):
        return self.refused(move.source_daemon, "start", presync.NAME, "--qmp", move.source.sockets.qmp[0],
                            "--to", move.to, **options)

    def nothing_came(self, move):
        self.assertEqual(list(move.target_daemon.ram.glob("*")), [], "nothing may be left behind")
        self.expect_unharmed(move)

    def test_insecure_moves_and_says_so(self):
        move = self.move(self.spec(), insecure=True)
        for daemon in (move.source_daemon, move.target_daemon):
            self.assertIn("INSECURE", daemon.run("status", capture_output=True, text=True).stdout)
            self.assertEqual(daemon.ask("status")["security"]["mode"], "insecure")
        move.start()
        self.launch(move)

    def test_without_certificates_other_hosts_are_not_talked_to(self):
        move = self.move(self.spec())
        target, source = move.target_daemon, move.source_daemon

        def without(daemon):
            daemon.stop()
            lines = daemon.config.read_text().splitlines()
            daemon.config.write_text("\n".join(line for line in lines if line.split(" ")[0] not in (
                "certificate", "key", "ca") and not line.startswith("[peer.")) + "\n")
            daemon.start()

        without(source)
        self.start(move, words=["another host", "certificate, key and ca", "insecure"])
        # The target by itself: a source that would, meets one that won't.
        without(target)
        source.stop()
        source.config.write_text("insecure = true\n" + source.config.read_text())
        source.start()
        for _ in range(3):
            self.start(move, words=["certificates", "log"])
        self.assertEqual(target.words(50).count("it is another host"), 1)
        self.nothing_came(move)

    def test_not_on_the_list(self):
        move = self.move(self.spec(), rules={"somebody-else": {}})
        self.start(move, words=['[peer."source"]', "restart presyncd"])
        self.nothing_came(move)

    def test_a_listed_peer_over_its_memory(self):
        move = self.move(self.spec(), rules={"source": {"max_memory": "64M"}})
        self.start(move, words=["max_memory", "64 MiB"])
        self.nothing_came(move)

    def test_certificates_are_replaced_while_a_sync_goes_on(self):
        move = self.move(self.spec())
        move.start()
        move.wait_synced()
        folder = self.folder + "/certificates"
        before = pathlib.Path(f"{folder}/source.crt").read_text()
        shutil.rmtree(folder)
        from lab import certificates  # on the path since e2e
        certificates.of_lab(self.folder, move.two)  # of a new authority, even
        self.assertNotEqual(pathlib.Path(f"{folder}/source.crt").read_text(), before)
        for daemon in (move.source_daemon, move.target_daemon):
            daemon.process.send_signal(1)  # SIGHUP
        deadline = time.monotonic() + 20
        while any("certificates read again" not in daemon.words(50)
                  for daemon in (move.source_daemon, move.target_daemon)):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        self.assertEqual((move.status()["state"], move.status()["reconnects"]), ("syncing", 0))
        # And now it has to shake hands anew. Each stream falls when its own oldest bytes were not answered for too long:
        # a cable that comes back in between leaves a link that is still to fall, in the midst of the launch perhaps.
        move.two.link_down()
        deadline = time.monotonic() + 60
        while move.status()["state"] == "syncing":
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)
        move.two.link_up()
        move.wait_synced()
        self.launch(move)

    def test_presyncd_without_root(self):
        """Its own user and two capabilities: keeps root's QEMU in sync, and starts one that has no rights at all."""
        spec = self.spec()
        image = pathlib.Path(self.folder) / "image"  # the cache is root's alone
        subprocess.run(["cp", "-rL", "--sparse=always", "--reflink=auto", spec.image, image], check=True)
        plugin = shutil.copy(presync.plugin_path(), self.folder)
        object.__setattr__(spec, "image", image)
        move = self.move(spec)
        move.source_daemon.stop()
        move.target_daemon.stop()
        for daemon in (move.source_daemon, move.target_daemon):
            shutil.rmtree(daemon.ram, ignore_errors=True)
            config = daemon.config.read_text().replace(presync.plugin_path(), plugin)
            daemon.config.write_text(config)
            daemon.prefix = ["setpriv", f"--reuid={OWN_USER}", f"--regid={OWN_USER}", "--clear-groups",
                             f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}",
                             f"--ambient-caps={CAPABILITIES}", "--no-new-privs"]
        os.chmod(image, 0o755)
        subprocess.run(["chown", "-R", f"{OWN_USER}:{OWN_USER}", self.folder], check=True)
        for daemon in (move.source_daemon, move.target_daemon):
            daemon.start()
            self.assertEqual(self.rights(daemon.process.pid)[1], {"cap_dac_override", "cap_sys_ptrace"})
        self.assertEqual(self.rights(move.source.process.pid)[0], 0, "the source's QEMU is another user's")
        move.start()
        qemu = move.target_daemon.guest_pids()[presync.NAME]
        self.assertEqual(self.rights(qemu), (OWN_USER, set()))
        for path in move.target_daemon.ram.glob("*"):
            self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        self.launch(move)

    @staticmethod
    def rights(pid):
        """(user, effective capabilities) of a process."""
        status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
                      if ":" in line)
        bits = int(status["CapEff"], 16)
        names = {1: "cap_dac_override", 19: "cap_sys_ptrace"}
        return int(status["Uid"].split()[0]), {names.get(bit, str(bit)) for bit in range(64) if bits >> bit & 1}


del EndToEnd  # it is run where it is written

if __name__ == "__main__":
    unittest.main()
