#!/usr/bin/python3
"""Moves a guest of libvirt's between two hosts where AppArmor confines QEMU and libvirtd, by the rules that the packages install.

    tests/apparmor.py [-v]         needs /usr/sbin/libvirtd (tools/setup); PRESYNC_BUILD names the build folder

The hosts are two machines of tools/rdma-vm, for AppArmor is the kernel's: Debian's kernel, libvirt with its security driver
`apparmor`, Debian's profiles of libvirtd and QEMU. Files are where the packages put them, with what presync-libvirt's postinst does. The guest is
tests/rdma/bare_guest.S, for Linux would take minutes to boot inside an emulated machine. Run by hand: some ten minutes without KVM.
"""

import contextlib
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from lab import hosts as lab_hosts  # noqa: E402  (after the path is set)

BUILD = pathlib.Path(os.environ.get("PRESYNC_BUILD", ROOT / "build" / "release")).resolve()
CACHE = pathlib.Path(os.environ.get("PRESYNC_CACHE", pathlib.Path.home() / ".cache" / "presync")) / "apparmor"
UUID = "3c0c9a4e-8a4e-4a36-9d0c-6d1f1d7a5b11"
SOCKETS = f"/run/presync/libvirt/libvirt-{UUID}"
MEMORY = "/dev/shm/libvirt"
LAPS_AT = 2 << 20  # where the guest counts (bare_guest.S)
# Debian's packages that bring AppArmor's rules. Unpacked in the machines only: this host stays as it is.
PACKAGES = ("apparmor", "libapparmor1", "libvirt-daemon-system")

# Makes a machine a host of libvirt's. $1: what the packages install; $2: the host's address; $3: its UUID.
PREPARE = f"""set -e
mount -t securityfs securityfs /sys/kernel/security
grep -qw apparmor /sys/kernel/security/lsm || {{ echo "this kernel has no AppArmor: $(cat /sys/kernel/security/lsm)"; exit 1; }}
tar -C "$1" -c . | tar -C / -x --keep-directory-symlink
echo 'libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin' >>/etc/passwd
echo 'presync:x:64056:64056::/nonexistent:/usr/sbin/nologin' >>/etc/passwd
printf 'libvirt-qemu:x:64055:\\npresync:x:64056:\\n' >>/etc/group
systemd-tmpfiles --create /usr/lib/tmpfiles.d/presync-libvirt.conf
mkdir -p {MEMORY} /var/lib/libvirt /var/cache/libvirt /var/log/libvirt/qemu
cat >/etc/libvirt/libvirtd.conf <<end
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
auth_unix_rw = "none"
host_uuid = "$3"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
end
cat >/etc/libvirt/qemu.conf <<end
user = "+64055"
group = "+64055"
security_driver = "apparmor"
cgroup_controllers = [ ]
stdio_handler = "file"
memory_backing_dir = "{MEMORY}"
end
mkdir -p /etc/presync
cat >/etc/presync/presyncd.toml <<end
listen = "$2"
insecure = true
[libvirt]
peer_uri = "qemu+tcp://{{host}}/system"
end
mkdir -p /etc/apparmor.d/local/abstractions  # with what follows, as libvirt's postinst does
(cd /etc/apparmor.d/local && touch usr.sbin.libvirtd usr.lib.libvirt.virt-aa-helper abstractions/libvirt-qemu)
apparmor_parser -r /etc/apparmor.d/usr.sbin.libvirtd /etc/apparmor.d/usr.lib.libvirt.virt-aa-helper
"""
# What the package's script adds once its files are there.
INSTALL_RULES = f"sh {shlex.quote(str(ROOT / 'debian' / 'presync-libvirt.postinst'))} configure"
SERVICES = """
setsid libvirtd --listen >/var/log/libvirtd.out 2>&1 </dev/null &
setsid presyncd >/var/log/presyncd.out 2>&1 </dev/null &
for try in $(seq 300); do
  virsh -q list >/dev/null 2>&1 && presync status >/dev/null 2>&1 && exit 0
  sleep 0.5
done
tail -n 5 /var/log/libvirtd.out /var/log/libvirt/libvirtd.log /var/log/presyncd.out
exit 1
"""
DOMAIN = f"""<domain type='qemu'>
  <name>bare</name>
  <uuid>{UUID}</uuid>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
  <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{BUILD}/tests/rdma/bare_guest.elf</kernel></os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def serve(folder):
    """Inside a machine: runs each NUMBER.sh that appears in `folder`, and leaves NUMBER.out, its exit status in the first line."""
    folder = pathlib.Path(folder)
    (folder / "up").touch()
    number = 0
    while not (folder / "end").exists():
        script = folder / f"{number}.sh"
        if not script.exists():
            time.sleep(0.2)
            continue
        done = subprocess.run(["bash", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        answer = folder / f"{number}.new"
        answer.write_bytes(f"{done.returncode}\n".encode() + done.stdout)
        answer.rename(folder / f"{number}.out")
        number += 1


class Host:
    """A machine of tools/rdma-vm whose commands come through a folder. A context manager."""

    def __init__(self, folder, number, nic):
        self.address = f"10.77.1.{number}"
        self._folder = pathlib.Path(folder) / f"host{number}"
        self._folder.mkdir()
        self._sent = 0
        self._log = open(self._folder / "log", "w", encoding="utf-8")
        self._machine = subprocess.Popen(
            [ROOT / "tools" / "rdma-vm", "--no-siw", "--smp", "1", "--mem", "1024", "--timeout", "1500", "--id", str(number), "--nic", nic,
             "--rw", self._folder, "--", sys.executable, pathlib.Path(__file__).resolve(), "--serve", self._folder],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)

    def __enter__(self):
        try:
            self._wait_for("up", 240)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        (self._folder / "end").touch()
        try:
            self._machine.wait(30)
        except subprocess.TimeoutExpired:
            self._machine.terminate()
            self._machine.wait()
        self._log.close()

    def _wait_for(self, name, seconds):
        deadline = time.monotonic() + seconds
        while not (self._folder / name).exists():
            if self._machine.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.address} does not answer: {(self._folder / 'log').read_text()}")
            time.sleep(0.1)

    def try_run(self, script, seconds=300):
        """(exit status, output) of a script of bash's."""
        new = self._folder / "new"
        new.write_text(script, encoding="utf-8")
        new.rename(self._folder / f"{self._sent}.sh")
        self._wait_for(f"{self._sent}.out", seconds)
        status, _, text = (self._folder / f"{self._sent}.out").read_text(errors="replace").partition("\n")
        self._sent += 1
        return int(status), text.strip()

    def run(self, script, seconds=300):
        status, text = self.try_run(script, seconds)
        if status != 0:
            raise AssertionError(f"{self.address}: exit status {status} of: ...{script[-200:]}\n{text}\n{self.words()}")
        return text

    def words(self):
        return self.try_run("tail -n 12 /var/log/libvirt/libvirtd.log /var/log/libvirt/qemu/bare.log /var/log/presyncd.out; dmesg | grep DENIED | tail -n 20")[1]

    def denied(self):
        """What AppArmor refused to a guest's QEMU, and to libvirtd."""
        return self.try_run("dmesg | grep 'apparmor=\"DENIED\"'")[1].splitlines()

    def laps(self):
        """How often the guest has been through its memory."""
        return int(self.run(f"for f in /proc/$(pgrep -o qemu-system)/map_files/*; do case $(readlink $f) in {MEMORY}/*)"
                            f" od -An -tu4 -j{LAPS_AT} -N4 $f; break;; esac; done"))


def installed(folder):
    """A folder with what presync's packages and AppArmor's install."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not all(list(CACHE.glob(f"{name}_*.deb")) for name in PACKAGES):
        subprocess.run(["apt-get", "-o", "APT::Sandbox::User=root", "-q", "download", *PACKAGES], cwd=CACHE, check=True, stdout=subprocess.DEVNULL)
    root = pathlib.Path(folder) / "root"
    root.mkdir()
    for deb in CACHE.glob("*.deb"):
        subprocess.run(["dpkg", "-x", deb, root], check=True)
    subprocess.run(["cmake", "--install", BUILD, "--prefix", "/usr"], env={**os.environ, "DESTDIR": str(root)}, check=True, stdout=subprocess.DEVNULL)
    return root


# Another guest of the same host, which somebody has taken over.
OTHER_UUID = "3c0c9a4e-8a4e-4a36-9d0c-6d1f1d7a5b12"
OTHER = DOMAIN.replace(UUID, OTHER_UUID).replace("<name>bare</name>", "<name>other</name>")
# What its QEMU can do: of the same user, under the other domain's profile. Says what it could open or connect to.
TRY = """
import os, socket, sys
os.setgroups([]), os.setgid(64055), os.setuid(64055)
with open("/proc/self/attr/current", "w") as profile:
    profile.write("changeprofile libvirt-" + sys.argv[1])
for path in sys.argv[2:]:
    try:
        os.chmod(path, 0o666)
        print("mode changed", path)
        if sys.argv[1] not in path:
            os.unlink(path)
            print("removed", path)
    except OSError:
        pass
    try:
        if path.endswith((".glue", ".qmp")):
            stream = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if path.endswith(".glue") else socket.SOCK_STREAM)
            stream.settimeout(30)
            stream.connect(path)
            print("reached" if stream.recv(256) else "not greeted", path)
        else:
            open(path, "rb").close()
            print("reached", path)
    except OSError as error:
        print(error.strerror, path)
"""


class ConfinedTest(unittest.TestCase):
    def setUp(self):
        if shutil.which("libvirtd") is None:
            self.skipTest("there is no libvirtd: run tools/setup")
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        folder = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="presync-apparmor-"))
        subprocess.run([ROOT / "tools" / "rdma-vm", "--prepare"], check=True)
        root = installed(folder)
        cable = f"127.0.0.1:{lab_hosts.free_port()}"
        self.hosts = [self.stack.enter_context(Host(folder, number, f"socket,{end}={cable}")) for number, end in ((1, "listen"), (2, "connect"))]
        for number, host in enumerate(self.hosts):
            arguments = [root, host.address, f"5b0e7f1e-0c1c-4a52-8f3e-00000000000{number + 1}"]
            host.run(f"set -- {shlex.join(map(str, arguments))}\n{PREPARE}")
            self.say(f"host {host.address} has AppArmor and libvirt")

    def say(self, text):
        print(f"  {text}", flush=True)

    def confined(self, host):
        label = host.run("cat /proc/$(pgrep -o qemu-system)/attr/current")
        self.assertEqual(label, f"libvirt-{UUID} (enforce)")
        self.assertRegex(host.run("cat /proc/$(pgrep -o libvirtd)/attr/current"), r"libvirtd \(enforce\)")

    def move(self, here, there):
        here.run(f"presync start --domain bare --to {there.address} --wait", 300)
        before = here.laps()
        self.say(here.run("presync launch bare --verify", 300))
        self.assertEqual(there.run("virsh -q domstate bare"), "running")
        self.confined(there)
        deadline = time.monotonic() + 60
        while there.laps() <= before:
            self.assertLess(time.monotonic(), deadline, "the guest does not run")
        self.assertEqual(here.run("pgrep -c qemu-system || true"), "0")

    def taken_over(self, host):
        """From within `other`: its own monitor can be reached; that of `bare`, its plug-in and its memory can't, nor be changed."""
        host.run(f"cat >/tmp/other.xml <<'END'\n{OTHER}END\nvirsh -q define /tmp/other.xml && presync libvirt xml other --apply && virsh -q start other")
        own = [f"/run/presync/libvirt/libvirt-{OTHER_UUID}.{kind}" for kind in ("qmp", "glue")]
        others = [f"{SOCKETS}.qmp", f"{SOCKETS}.glue", *host.run(f"ls -d {MEMORY}/libvirt/qemu/*-bare/*").split()]
        self.assertEqual(len(others), 3, others)
        said = host.run(f"cat >/tmp/try.py <<'END'\n{TRY}END\npython3 /tmp/try.py {OTHER_UUID} {shlex.join(own + others)}").splitlines()
        self.say("\n    ".join(["as the other guest's QEMU:", *said]))
        for words in ("mode changed", "reached"):
            self.assertIn(f"{words} {own[0]}", said)
        refused = [f"{'not greeted' if path.endswith('.glue') else 'Permission denied'} {path}" for path in others]
        self.assertEqual([line for line in said if line.split()[-1] in others], refused)
        host.run("virsh -q destroy other")

    def test_to_and_fro(self):
        one, other = self.hosts
        one.run(SERVICES)
        one.run(f"cat >/tmp/bare.xml <<'END'\n{DOMAIN}END\nvirsh -q define /tmp/bare.xml && presync libvirt xml bare --apply")
        # Without the package's rules: what they are for.
        self.assertIn("AppArmor", one.try_run("presync doctor")[1])
        status, text = one.try_run("virsh -q start bare")
        self.assertNotEqual(status, 0, "QEMU was to be refused its sockets")
        self.assertIn("ermission denied", text)
        self.assertTrue([line for line in one.denied() if SOCKETS in line], one.words())
        for host in self.hosts:
            host.run(INSTALL_RULES)
        other.run(SERVICES)
        refused = {host: len(host.denied()) for host in self.hosts}
        for host in self.hosts:
            self.assertRegex(host.try_run("presync doctor")[1], r"AppArmor.*is included")
        one.run("virsh -q start bare")
        self.confined(one)
        self.taken_over(one)
        refused[one] = len(one.denied())
        for _ in range(2):
            self.move(one, other)
            self.move(other, one)
        for host in self.hosts:
            lines = host.denied()[refused[host]:]
            self.say(f"{host.address}: AppArmor refused {len(lines)} things" + "".join(f"\n    {line}" for line in lines))
            self.assertFalse([line for line in lines if "presync" in line or MEMORY in line or 'profile="libvirt-' in line])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        unittest.main(verbosity=2)
