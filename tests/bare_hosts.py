#!/usr/bin/python3
"""Makes the packages and does with them what docs/operations.md tells an operator to do, word for word, on two clean hosts.

    tests/bare_hosts.py [-v]       needs root; PRESYNC_BUILD names the build folder whose programs are packaged

The list "Two bare hosts to a guest moved" is read from that page and typed: certificates, installation, configuration, services,
doctor, start, status, launch, report. Then both hosts' packages are upgraded while the guest is synced for its way back.

    PRESYNC_PACKAGES_BEFORE=FOLDER tests/bare_hosts.py -v     the same, but first with the packages in FOLDER, which an earlier version's
                                                              tools/package made; they are then upgraded to those of this tree

The hosts are network namespaces with a root and a systemd of their own (tools/lab/machine.py). The root is Debian's minimum and what
the lab needs (QEMU, iproute2, python3, openssl), made once from this machine's own package sources and kept as
${PRESYNC_CACHE:-~/.cache/presync}/root-SUITE-HASH.tar. Not there: sshd, for which `cp` stands; the mirror, which the hosts can't
reach: what presync's packages depend on is put into apt's cache before.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "tests"))
import package  # noqa: E402  (after the path is set)
from lab import guest, hosts as lab_hosts, machine  # noqa: E402  (after the path is set)

package.PACKAGES += ("systemd",)
run, clean_root, BUILD = package.run, package.clean_root, package.BUILD
OPERATIONS = ROOT / "docs" / "operations.md"
BEFORE = os.environ.get("PRESYNC_PACKAGES_BEFORE")
GUEST_FOLDER = "/run/presync/guests/web1.d"
SHARED = "/shared"  # the storage that both hosts reach
# In the hosts' PATH: what the operator does by hand in steps 7 and 8.
EDITOR = f"""#!/bin/sh
exec python3 {SHARED}/edit.py "$1"
"""
# In the administrator's PATH, for there is no sshd: `scp FILE... HOST:` to the home of a host.
SCP = """#!/bin/sh
for to; do :; done
for file; do [ "$file" = "$to" ] || cp "$file" "$HOSTS/${to%:}/"; done
"""


# Runs "$@" in the root $1.  The mounts are in a namespace of this one command: what cleans up afterwards can't reach
# through them.  $2, the packages, are /mnt there.
INSIDE = """set -e
root=$1
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount --bind "$2" "$root/mnt"
shift 2
exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root DEBIAN_FRONTEND=noninteractive "$@"
"""


class Hosts(lab_hosts.TwoHosts):
    """With the addresses of docs/operations.md."""

    address = {"source": "10.0.0.1", "target": "10.0.0.2"}


def operators_list():
    """[(who, command)] of docs/operations.md."""
    section = OPERATIONS.read_text(encoding="utf-8").split("## Two bare hosts to a guest moved")[1]
    block = section.split("```sh\n")[1].split("```")[0]
    steps = [re.match(r"(admin|source|target)# +(.*?)(?: +# ?\d+.*)?$", line).groups() for line in block.splitlines()]
    if not 10 <= len(steps) <= 16:
        raise AssertionError(f"{len(steps)} commands:\n{block}")
    return steps


class BareHostsTest(unittest.TestCase):
    """Steps build on each other: one test."""

    def inside(self, *argv, **options):
        return run("unshare", "--mount", "--propagation", "private", "bash", "-c", INSIDE, "inside",
                   self.root, self.debs, *argv, **options)

    def set_up_root(self, folder):
        self.root = pathlib.Path(folder) / "root"
        self.root.mkdir()
        run("tar", "-xf", clean_root(), "-C", self.root, "--numeric-owner")
        shutil.copy("/etc/resolv.conf", self.root / "etc" / "resolv.conf")
        (self.root / "etc/apt/apt.conf.d/99test").write_text('APT::Get::Assume-Yes "true";\nAPT::Install-Recommends "false";\n', encoding="ascii")
        # Nothing of these concerns presync, and each takes its time.
        for unit in ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "dpkg-db-backup.timer"):
            (self.root / "etc/systemd/system" / unit).symlink_to("/dev/null")
        self.inside("apt-get", "update", "-qq")
        self.inside("sh", "-c", "apt-get install -qq --download-only /mnt/*.deb")

    def test_bare_hosts(self):
        with tempfile.TemporaryDirectory(prefix="presync-package-") as folder, contextlib.ExitStack() as stack:
            self.folder = pathlib.Path(folder)
            self.debs = self.newer_debs = self.folder / "build" / "package"
            if BEFORE:
                self.newer_debs = self.folder / "newer" / "package"
                shutil.copytree(BEFORE, self.debs, ignore=lambda _, names: [name for name in names if not name.endswith(".deb")])
            print(run(ROOT / "tools" / "package", "--build", BUILD, "--out", self.newer_debs, "--lintian"))
            self.names = sorted(p.name for p in self.debs.glob("*.deb"))
            self.assertEqual(len(self.names), 3, self.names)
            self.set_up_root(folder)
            self.set_up_hosts(stack)
            self.type_the_list()
            self.expect_runs("target")
            self.look_at_files(self.machines["target"])
            self.upgrade_while_synced()
            self.purge(self.machines["target"])

    def set_up_hosts(self, stack):
        """Two bare hosts, the storage, and the administrator's folder."""
        shared = self.folder / "shared"
        shared.mkdir()
        self.image = guest.image_for("hammer")
        disk = pathlib.Path(guest.copy_data_disk(self.image, shared))
        shared.chmod(0o755)
        disk.chmod(0o666)  # QEMU is root's on the one host, presync-qemu's on the other
        run("cp", "-r", "--sparse=always", self.image, shared / "image")
        run("chmod", "-R", "a+rX", shared / "image")
        shutil.copy(next(self.debs.glob("presync-libvirt_*")), shared)
        two = stack.enter_context(Hosts())
        self.machines = {host: stack.enter_context(machine.Machine(two, host, name, self.root, self.folder, [f"{shared}:{SHARED}:rw"]))
                         for host, name in (("source", "host1"), ("target", "host2"))}
        (self.folder / "admin-bin").mkdir()
        homes = self.folder / "homes"
        homes.mkdir()
        for host, each in self.machines.items():
            (homes / two.address[host]).symlink_to(each.path("/root"))
            self.write_program(each.path("/usr/local/bin/editor"), EDITOR)
        self.write_program(self.folder / "admin-bin" / "scp", SCP)
        (self.folder / "tools").symlink_to(ROOT / "tools")
        self.spec = guest.GuestSpec(image=f"{SHARED}/image", data_disk=f"{SHARED}/data.img", workload="hammer",
                                    kernel_args="presync.area_mb=24 presync.pages_s=1000")
        # Before QEMUs ran apart there was no folder of a guest's own.
        self.agent_folder, self.agent_prefix = ("/run/presync", "/run/presync/web1.") if BEFORE else (GUEST_FOLDER, "{folder}/web1.")
        target = self.qemu(self.spec, "target", ram="{ram.ram0}", qmp="{qmp}", glue="{glue}", agent=f"{self.agent_prefix}agent")
        edit = {"host1": {"certificate": "/etc/presync/host1.crt", "key": "/etc/presync/host1.key", "ca": "/etc/presync/ca.crt"}}
        edit["host2"] = {key: path.replace("host1", "host2") for key, path in edit["host1"].items()}
        edit["host2"]["listen"] = "10.0.0.2:7350"
        tables = {"host1": "", "host2": f"\n[peer.host1]\n\n[guest.web1]\ncommand = {json.dumps(target)}\n"}
        (shared / "edit.py").write_text(textwrap.dedent(f"""\
            import re, socket, sys
            keys, tables = {edit!r}[socket.gethostname()], {tables!r}[socket.gethostname()]
            text = open(sys.argv[1]).read()
            for key, value in keys.items():
                text, count = re.subn(f'(?m)^{{key}} = "[^"]*"', lambda m: f'{{key}} = "{{value}}"', text, count=1)
                assert count == 1, key
            open(sys.argv[1], "w").write(text + tables)
            """), encoding="utf-8")

    def write_program(self, path, text):
        path.write_text(text, encoding="ascii")
        path.chmod(0o755)

    def qemu(self, spec, role, ram, qmp, glue, agent):
        spec = dataclasses.replace(spec, plugin=f"/usr/lib/x86_64-linux-gnu/qemu/presync_glue.so,socket={glue}")
        return guest.qemu_argv(spec, role, guest.Sockets(ram=[ram], qmp=[qmp], agent=agent, serial=agent.replace(".agent", ".serial")))

    def start_guest(self, host):
        """As the page says; its QEMU needs presync's plug-in."""
        argv = self.qemu(self.spec, "source", "/dev/shm/web1.ram", "/run/web1.qmp", "/run/web1.glue", "/run/web1.agent")
        host.run(f"systemd-run --quiet --unit web1 {shlex.join(argv)}")
        self.reader = guest.BeatReader()
        self.addCleanup(self.reader.close)
        self.reader.attach("source", str(host.path("/run/web1.agent")), 30)
        self.reader.wait_beat("source", 240)

    def type_the_list(self):
        admin = {**os.environ, "PATH": f"{self.folder}/admin-bin:{os.environ['PATH']}", "HOSTS": str(self.folder / "homes")}
        for who, command in operators_list():
            if "doctor" in command:
                self.start_guest(self.machines["source"])
            if "--watch" in command:
                command = f"timeout -s INT 3 {command} || [ $? = 124 ]"
            if "launch " in command:
                self.before = self.check_guest()
                self.reader.mark()
                self.reader.attach("target", str(self.machines["target"].path(f"{self.agent_folder}/web1.agent")), 30)
            if who == "admin":
                text = run("bash", "-ec", command, cwd=self.folder, env=admin)
            else:
                text = self.machines[who].run(command)
            print(f"{who}# {command}\n{text}", flush=True)
            self.look_at(command, text)

    def look_at(self, command, text):
        """What the operator is told."""
        for word, wanted in (("doctor", "proved"), ("--watch", "launch now"), ("launch ", "runs on"), ("status", "web1")):
            if word in command:
                self.assertIn(wanted, text, command)
        self.assertNotIn("problem  ", text if "doctor" in command else "")
        if command.startswith("presync report"):
            page = self.machines["source"].path("/root/web1.html").read_text(encoding="utf-8")
            self.assertIn("</html>", page)

    def check_guest(self):
        answer = self.reader.command("check", 120)
        self.assertEqual({k: v for k, v in answer.items() if k.endswith(("_bad", "_errors", "_dropped")) and v}, {}, answer)
        return answer

    def expect_runs(self, host):
        """There, whole, and only there."""
        self.reader.wait_beat(host, 60)
        after = self.check_guest()
        self.assertTrue(self.reader.result().clean(), self.reader.result())
        self.assertGreater(after["counter"], self.before["counter"])
        other = next(each for each in self.machines if each != host)
        self.assertEqual(self.machines[other].try_run("pgrep -c qemu-system").stdout.strip(), "0")

    def look_at_files(self, host):
        """What was installed beside what the list used."""
        self.assertEqual(host.run("dpkg --audit"), "")
        host.run(f"cp {SHARED}/presync-libvirt_*.deb . && apt-get install -qq ./presync-libvirt_*.deb")
        self.assertNotRegex(host.try_run("dpkg --verify presync presync-qemu presync-libvirt").stdout.replace(
            "/etc/presync/presyncd.toml", ""), "/")
        self.assertIn("presync", host.run("presync --version"))
        self.assertIn("is good", host.run("presyncd --check"))
        self.assertEqual(host.run("systemctl is-enabled presyncd").strip(), "enabled")
        for key, value in (("User", "presync"), ("ActiveState", "active"), ("NRestarts", "0"), ("StatusText", ".+")):
            self.assertRegex(host.run(f"systemctl show -P {key} presyncd").strip(), f"^{value}$")
        for path in re.findall(r'"(/[^",]*\.so)[",]', host.path("/etc/presync/presyncd.toml").read_text(encoding="utf-8")):
            self.assertTrue(host.path(path).exists(), path)
        for page in ("presync.1", "presyncd.toml.5", "presyncd.8", "presync-qemu.7", "presync-libvirt.7"):
            name, section = page.rsplit(".", 1)
            self.assertIn("NAME", host.run(f"man {section} {name}"), page)
        hook = "/etc/libvirt/hooks/qemu.d/presync"
        self.assertEqual(host.path(hook).stat().st_mode & 0o777, 0o755)
        host.run(f"echo '<uuid>6d1e3a52-7c0b-4f55-9b0a-0a5e5f1c2d3e</uuid>' | {hook} web1 migrate begin -")
        words = host.run(". /usr/share/bash-completion/bash_completion; . /usr/share/bash-completion/completions/presync; "
                         "COMP_WORDS=(presync sta); COMP_CWORD=1; COMP_LINE='presync sta'; COMP_POINT=11; _presync; echo ${COMPREPLY[*]}")
        self.assertEqual(sorted(words.split()), ["start", "status"])

    def upgrade_while_synced(self):
        """The way back, and each host gets a newer package while the guest is synced."""
        here, there = self.machines["target"], self.machines["source"]
        config = there.path("/etc/presync/presyncd.toml")
        back = self.qemu(self.spec, "target", ram="{ram.ram0}", qmp="{qmp}", glue="{glue}", agent=f"{self.agent_prefix}agent")
        config.write_text(config.read_text(encoding="utf-8").replace('listen = "127.0.0.1:7350"', 'listen = "10.0.0.1:7350"') +
                          f"\n[peer.host2]\n\n[guest.web1]\ncommand = {json.dumps(back)}\n", encoding="utf-8")
        there.run("systemctl restart presyncd")
        start = "presync start web1 --qmp /run/presync/guests/web1.qmp --to 10.0.0.1 --wait"
        here.run(start)
        qemu = here.run("pgrep qemu-system")
        self.make_newer()
        self.upgrade(there)
        if BEFORE:  # docs/operations.md, "From a presync whose QEMUs ran as the user presync"
            config.write_text(config.read_text(encoding="utf-8").replace(self.agent_prefix, "{folder}/web1."), encoding="utf-8")
            there.run("systemctl restart presyncd")
        self.wait_synced(here, lambda guest: guest["reconnects"] > 0)
        self.upgrade(here)
        self.assertEqual(here.run("pgrep qemu-system"), qemu, "the guest is presyncd's child and outlives it")
        here.run(start)
        print(self.wait_synced(here, lambda guest: guest["resumption"]["from"] == "copy")["resumption"])
        self.before = self.check_guest()
        self.reader.mark()
        self.assertEqual(here.run("ps -o user= -C qemu-system-x86_64").strip(), "presync" if BEFORE else "presync-qemu")
        self.assertEqual(there.run("ps -o user= -C qemu-system-x86_64").strip(), "presync-qemu")
        self.reader.attach("source", str(there.path(f"{GUEST_FOLDER}/web1.agent")), 30)
        report = json.loads(here.run("presync launch web1 --verify --json"))
        self.assertEqual(report["pages_differing"], 0)
        self.expect_runs("source")

    def make_newer(self):
        """The same packages, but for their version."""
        newer = self.folder / "shared" / "newer"
        newer.mkdir()
        for name in self.names:
            parts = newer / name.split("_")[0]
            run("dpkg-deb", "-R", self.newer_debs / name, parts)
            control = parts / "DEBIAN" / "control"
            control.write_text(re.sub("(?m)^(Version: .*)$", r"\1+newer", control.read_text(encoding="utf-8")), encoding="utf-8")
            run("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "-b", parts, newer / name)

    def upgrade(self, host):
        config = host.path("/etc/presync/presyncd.toml").read_text(encoding="utf-8")
        before = host.run("systemctl show -P MainPID presyncd")
        # To the question about presyncd.toml, which both sides changed, the answer is the default: keep.
        print(host.run(f"cd {SHARED}/newer; apt-get -o Dpkg::Options::=--force-confold install ./presync_*.deb ./presync-qemu_*.deb"))
        self.assertIn("+newer", host.run("dpkg-query -W presync"))
        self.assertEqual(host.try_run("systemctl is-active presyncd").stdout.strip(), "active",
                         host.run("systemctl --no-pager status presyncd || true; journalctl --no-pager -n 40 -u presyncd"))
        self.assertNotEqual(host.run("systemctl show -P MainPID presyncd"), before, "the old one runs on")
        self.assertEqual(host.path("/etc/presync/presyncd.toml").read_text(encoding="utf-8"), config, "an upgrade keeps what the operator wrote")

    def wait_synced(self, host, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while True:
            status = json.loads(host.run("presync status web1 --json"))["guests"]
            if status and status[0]["state"] == "syncing" and condition(status[0]):
                return status[0]
            self.assertLess(time.monotonic(), deadline, status)
            time.sleep(0.2)

    def purge(self, host):
        host.run("apt-get purge -qq presync presync-qemu presync-libvirt")
        for path in ("/etc/presync/presyncd.toml", "/usr/sbin/presyncd", "/usr/lib/x86_64-linux-gnu/qemu/presync_glue.so",
                     "/etc/libvirt/hooks/qemu.d/presync"):
            self.assertFalse(host.path(path).exists(), path)
        self.assertNotEqual(host.try_run("systemctl is-active presyncd").returncode, 0)


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("bare_hosts.py needs root")
    unittest.main()
