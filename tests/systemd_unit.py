#!/usr/bin/python3
"""presyncd as its unit has it: a systemd is booted for it, and a guest is moved between two presyncds in its whole sandbox.

    tests/systemd_unit.py [-v]      needs root; PRESYNC_BUILD names the build folder

systemd is process 1 of namespaces of its own (processes, mounts, network, cgroup2), over a copy-on-write view of this machine's
root, with nothing but its journal, presyncd.service (the target) and the same unit once more for the source. What it does is lost
when it ends; of this machine's own nothing is started, stopped or changed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import certificates, guest, hosts, presync  # noqa: E402  (after the path is set)

SYSTEMD = pathlib.Path("/lib/systemd/systemd")
UNIT = ROOT / "tools" / "presyncd" / "presyncd.service"
# $1: a folder; $2: a cgroup to be in; $3: where results go; the rest: what is run in the new root before systemd.
BOOT = """set -e
folder=$1 results=$3
mount -t tmpfs -o mode=755 presync-unit "$folder"
mkdir "$folder/upper" "$folder/work" "$folder/root"
root=$folder/root
mount -t overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" presync-unit "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for where in run dev; do mount -t tmpfs -o mode=755 tmpfs "$root/$where"; done
for node in null zero full random urandom tty kvm userfaultfd; do
  [ ! -c "/dev/$node" ] || cp -a "/dev/$node" "$root/dev/"
done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do ln -s "${link#*:}" "$root/dev/${link%%:*}"; done
touch "$root/dev/console"
mount --bind /dev/null "$root/dev/console"
mkdir "$root/results"
mount --bind "$results" "$root/results"
shift 3
cd "$root"
pivot_root . mnt
umount -l /mnt
mount --make-rshared / # credentials reach their unit by it
"$@"
exec env -i container=presync-unit PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=presync-test.target --log-target=journal
"""
IMAGES = "/var/lib/presync-images"
TARGET_QMP = "/run/presync/guests/demo.qmp"
KEY = "/etc/presync-host.key"
CREDENTIAL = "/run/credentials/presyncd.service/host.key"


def cgroup2():
    """Where the cgroups of version 2 are mounted."""
    for line in pathlib.Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        if line.split()[2] == "cgroup2":
            return pathlib.Path(line.split()[1])
    return None


def boot():
    """Boots it; (exit code, what the test inside said)."""
    with contextlib.ExitStack() as stack:
        folder, results = (stack.enter_context(tempfile.TemporaryDirectory(prefix="presync-unit-")) for _ in range(2))
        group = cgroup2() / f"presync-unit-{os.getpid()}"
        group.mkdir()
        stack.callback(remove_groups, group)
        # The cgroup's namespace begins at the group that the process is in by then.
        script = f'echo $$ > "{group}/cgroup.procs"; exec unshare --cgroup --mount --pid --uts --ipc --net --fork --kill-child --propagation private bash -c "$0" boot "$@"'
        build = os.environ.get("PRESYNC_BUILD", str(ROOT / "build" / "release"))
        argv = ["bash", "-c", script, BOOT, folder, str(group), results, "env", f"PRESYNC_BUILD={build}",
                "PYTHONDONTWRITEBYTECODE=1", sys.executable, str(pathlib.Path(__file__).resolve()), "--prepare"]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   preexec_fn=hosts.die_with_parent)
        stack.callback(hosts.stop, process)
        try:
            said = process.communicate(timeout=600)[0]
        except subprocess.TimeoutExpired:
            said = "it did not end in 600 s"
        said += "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(pathlib.Path(results).glob("*")))
        return process.returncode, said


def remove_groups(group):
    """systemd's cgroups, once their processes are gone."""
    deadline = time.monotonic() + 10
    while group.exists() and time.monotonic() < deadline:
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        time.sleep(0.05)


# ---- in the new root, before systemd ----


def prepare():
    system = pathlib.Path("/etc/systemd/system")
    for folder in (pathlib.Path("/usr/lib/systemd/system"), system):
        for wants in (*folder.glob("*.wants"), *folder.glob("*.requires")):
            shutil.rmtree(wants)
    pathlib.Path("/etc/fstab").write_text("", encoding="ascii")
    build = pathlib.Path(os.environ["PRESYNC_BUILD"])
    for name in ("presyncd", "presync"):
        shutil.copy(build / "tools" / name, f"/usr/local/bin/{name}")
    shutil.copy(build / "qemu-glue" / "plugin" / "presync_glue.so", "/usr/local/lib/presync_glue.so")
    shutil.copy(UNIT.parent / "presync.sysusers", "/usr/lib/sysusers.d/presync.conf")
    shutil.copy(UNIT.parent / "presync.tmpfiles", "/usr/lib/tmpfiles.d/presync.conf")
    subprocess.run(["systemd-sysusers"], check=True)
    subprocess.run(["systemd-tmpfiles", "--create", "/usr/lib/tmpfiles.d/presync.conf"], check=True)
    prepare_images()
    prepare_configs()
    unit = UNIT.read_text(encoding="utf-8")
    (system / "presyncd.service").write_text(unit, encoding="utf-8")
    # As docs/security.md has it: the key is root's alone.
    drop_in = system / "presyncd.service.d"
    drop_in.mkdir()
    (drop_in / "key.conf").write_text(f"[Service]\nLoadCredential=host.key:{KEY}\n", encoding="utf-8")
    source = re.sub(r"^((?:State|Runtime)Directory=presync)$", r"\1-source", unit, flags=re.M)
    source = source.replace("/presyncd\n", "/presyncd -c /etc/presync/source.toml\n", 1)
    (system / "presyncd-source.service").write_text(source, encoding="utf-8")
    (system / "presync-test.target").write_text("[Unit]\nWants=systemd-journald.service presync-test.service\n", encoding="ascii")
    (system / "presync-test.service").write_text(
        "[Unit]\nWants=presyncd.service presyncd-source.service\nAfter=presyncd.service presyncd-source.service\n"
        "SuccessAction=exit-force\nFailureAction=exit-force\n"
        f"[Service]\nType=oneshot\nExecStart={sys.executable} {pathlib.Path(__file__).resolve()} --inside\n"
        "Environment=PYTHONDONTWRITEBYTECODE=1 HOME=/root\n"
        "StandardOutput=file:/results/said\nStandardError=inherit\n", encoding="utf-8")


def prepare_images():
    os.environ["HOME"] = "/root"
    image = guest.image_for("hammer")
    subprocess.run(["cp", "-rL", "--sparse=always", image, IMAGES], check=True)
    subprocess.run(["chown", "-R", "presync-qemu:presync-qemu", IMAGES], check=True)
    os.chmod(IMAGES, 0o755)


def spec():
    return guest.GuestSpec(image=pathlib.Path(IMAGES), data_disk=f"{IMAGES}/data.img", workload="hammer",
                           kernel_args="presync.area_mb=12 presync.pages_s=1500 no_timer_check")


def with_credential(settings):
    return [f'key = "{CREDENTIAL}"' if line.startswith("key = ") else line for line in settings]


def prepare_configs():
    etc = pathlib.Path("/etc/presync")
    etc.mkdir(exist_ok=True)
    certificates.make(etc / "certificates", "source,127.0.0.1", "target,127.0.0.2")
    subprocess.run(["chown", "-R", "presync:presync", etc], check=True)
    shutil.copy(etc / "certificates" / "target.key", KEY)
    os.chmod(KEY, 0o600)
    (etc / "certificates" / "target.key").unlink()
    sockets = guest.Sockets(ram=["{ram.ram0}"], qmp=["{qmp}"], agent="{folder}/agent", serial="{folder}/serial")
    plugged = dataclasses.replace(spec(), plugin="/usr/local/lib/presync_glue.so,socket={glue}")
    command = guest.qemu_argv(plugged, "target", sockets)
    target = [f'listen = "127.0.0.2:{presync.PORT}"', *with_credential(certificates.settings(etc / "certificates", "target")),
              '[peer."source"]', "[guest.demo]", f"command = {json.dumps(command)}"]
    source = [f'listen = "127.0.0.1:{presync.PORT}"', *certificates.settings(etc / "certificates", "source"),
              'socket = "/run/presync-source/presyncd.sock"', 'state_folder = "/var/lib/presync-source"',
              'run_folder = "/run/presync-source"', 'ram_folder = "/dev/shm/presync-source"']
    for name, lines in (("presyncd", target), ("source", source)):
        (etc / f"{name}.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- under systemd ----


def run(*argv):
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, argv))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def status_of(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


class InsideTest(unittest.TestCase):
    """Run by presync-test.service."""

    def main_pid(self, unit):
        return int(run("systemctl", "show", "-P", "MainPID", unit))

    def as_it_sees(self, pid, *argv):
        """What root gets where that process is."""
        return subprocess.run(["nsenter", "-t", str(pid), "--mount", "--root", *argv], capture_output=True, text=True, check=False)

    def check_sandbox(self, pid, capabilities):
        status = status_of(pid)
        self.assertEqual(status["Seccomp"].strip(), "2")
        self.assertEqual(status["NoNewPrivs"].strip(), "1")
        self.assertNotEqual(status["Uid"].split()[0], "0")
        self.assertEqual(int(status["CapEff"], 16), capabilities)
        for path in ("/usr/x", "/etc/x", "/proc/sys/kernel/hostname", "/sys/fs/cgroup/cgroup.procs"):
            self.assertIn("Read-only file system", self.as_it_sees(pid, "sh", "-c", f"exec 3>>{path}").stderr, path)
        self.assertEqual(self.as_it_sees(pid, "ls", "-A", "/root").stdout, "")

    def check_reach(self, qemu, user):
        """What is presyncd's is not its QEMU's."""
        daemon = self.main_pid("presyncd")
        self.assertEqual(os.stat(f"/proc/{daemon}/mem").st_uid, 0, "presyncd can't be dumped")
        self.assertRegex(pathlib.Path(f"/proc/{daemon}/limits").read_text(encoding="ascii"), r"Max core file size +0 +0 ")
        self.assertEqual(os.stat("/dev/shm/presync").st_mode & 0o7777, 0o711)
        for script in (f"cat {CREDENTIAL}", f"cat {KEY}", "ls /run/presync/guests", "echo > /run/presync/guests/x.guest",
                       "ls /var/lib/presync", f"kill -0 {daemon}", f": < /proc/{daemon}/mem",
                       "/usr/local/bin/presync status"):
            done = self.as_it_sees(qemu, "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups",
                                   "--inh-caps=-all", "--bounding-set=-all", "sh", "-c", f"{script} && echo REACHED")
            self.assertNotIn("REACHED", done.stdout, script)

    def test_moves_a_guest(self):
        both = sum(1 << bit for bit in (0, 1, 5, 6, 7, 19))  # CAP_CHOWN, DAC_OVERRIDE, KILL, SETGID, SETUID, SYS_PTRACE
        for unit in ("presyncd", "presyncd-source"):
            self.assertEqual(run("systemctl", "show", "-P", "ActiveState", unit).strip(), "active", run("journalctl", "-u", unit))
            self.check_sandbox(self.main_pid(unit), both)
        source_side = ("presync", "--socket", "/run/presync-source/presyncd.sock")
        with presync.run_folder() as folder, contextlib.ExitStack() as stack:
            plugged = dataclasses.replace(spec(), plugin=f"/usr/local/lib/presync_glue.so,socket={folder}/glue")
            source = stack.enter_context(guest.Guest(plugged, "source", folder))
            reader = stack.enter_context(source.reader())
            source.wait_boot(reader, 120)
            monitor = source.sockets.qmp[0]
            print(run(*source_side, "doctor", "--qmp", monitor))
            print(run(*source_side, "start", "demo", "--qmp", monitor, "--to", "127.0.0.2", "--max-launch-time", "500ms"))
            note = pathlib.Path("/run/presync/guests/demo.guest").read_text(encoding="utf-8")
            qemu = int(re.search(r'"pid": ?(\d+)', note)[1])
            self.check_sandbox(qemu, 0)
            user = pwd.getpwnam("presync-qemu")
            self.assertEqual(status_of(qemu)["Uid"].split()[0], str(user.pw_uid))
            self.check_reach(qemu, user)
            reader.attach("target", "/run/presync/guests/demo.d/agent")
            print(run(*source_side, "launch", "demo", "--verify", "--wait"))
            reader.wait_beat("target", 60)
            self.check_guest(reader)
            # It outlives a restart of the unit, and so do its socket and its note.
            run("systemctl", "restart", "presyncd")
            self.assertNotEqual(self.main_pid("presyncd"), 0)
            self.check_sandbox(self.main_pid("presyncd"), both)
            beat = reader.wait_beat("target", 60)
            self.assertGreater(reader.wait_beat("target", 60).number, beat.number)
            self.check_guest(reader)
            self.assertTrue(os.path.exists(TARGET_QMP))
            self.assertTrue(reader.result().clean(), reader.result())

    def check_guest(self, reader):
        answer = reader.command("check", 60)
        self.assertEqual({k: v for k, v in answer.items() if k.endswith(("_bad", "_errors")) and v}, {}, answer)


class UnitTest(unittest.TestCase):
    def test_the_unit_as_it_is(self):
        for lacks, what in ((os.geteuid() != 0, "root"), (not SYSTEMD.exists(), "systemd"), (cgroup2() is None, "cgroup2")):
            if lacks:
                self.skipTest(f"needs {what}")
        code, said = boot()
        print(said)
        self.assertEqual(code, 0, "see above")


def inside():
    outcome = unittest.main(argv=["inside", "InsideTest", "-v"], exit=False).result
    if not outcome.wasSuccessful():
        print(run("journalctl", "-b", "-n", "200", "--no-pager"))
    sys.stdout.flush()
    return 0 if outcome.wasSuccessful() else 1


if __name__ == "__main__":
    if "--prepare" in sys.argv:
        prepare()
    elif "--inside" in sys.argv:
        sys.exit(inside())
    else:
        hosts.leave_on_sigterm()
        unittest.main(defaultTest="UnitTest")
