"""Two hosts with a libvirtd each, on one machine: for presync with guests that libvirt manages.

    with LibvirtHosts(folder) as two:
        two.define("source", domain_xml(spec, two)); two.virsh("source", "start", NAME)

Each host is a network namespace (hosts.py) and a namespace of mounts and of the host's name: its own /run, /var and
/etc/libvirt, its own tmpfs for guests' memory, a libvirtd with a UUID of its own.  QEMU runs as an unprivileged user, in
libvirt's sandbox.  What is below `folder` both hosts see: that is the shared storage.  Needs root and the packages of
tools/setup; starts no service of this machine, and leaves nothing.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import textwrap
import time
import uuid as _uuid

from . import guest as _guest
from . import hosts as _hosts
from . import presync as _presync

NAME = "demo"
UUID = "6d1e3a52-7c0b-4f55-9b0a-0a5e5f1c2d3e"
QEMU_USER = 64055  # Debian's number of libvirt-qemu; the user need not exist
LabError = _hosts.LabError
HOOK = pathlib.Path(__file__).resolve().parent.parent / "libvirt" / "presync-hook"
LIBVIRT_TCP = "qemu+tcp://{host}/system"


def available():
    """Why the lab can't be built here; "" if it can."""
    if shutil.which("libvirtd") is None or shutil.which("virsh") is None:
        return "there is no libvirtd or no virsh: run tools/setup"
    if os.geteuid() != 0:
        return "namespaces need root"
    return ""


class LibvirtHosts(_hosts.TwoHosts):
    """See the module's text."""

    def __init__(self, folder, link_mbit=1000, hook=True):
        super().__init__(link_mbit)
        self.shared = pathlib.Path(folder)
        self._hook = hook
        self._holders = {}
        self._libvirtds = {}

    # ---- files of a host, as everybody sees them ----

    def folder(self, host):
        return self.shared / host

    def run_presync(self, host):
        """What is /run/presync there."""
        return self.folder(host) / "run-presync"

    def agent(self, host):
        """The agent's socket of the guest that runs there."""
        return str(self.run_presync(host) / "libvirt" / "agent.sock")

    def log(self, host):
        return self.folder(host) / "libvirtd.log"

    # ---- making and removing ----

    def _make(self):
        super()._make()
        os.chmod(self.shared, 0o755)
        shutil.copy(_presync.plugin_path(), self.shared / "presync_glue.so")
        # A copy: libvirt makes them the user's who runs QEMU.
        subprocess.run(["cp", "-r", "--sparse=always", _guest.image("text"), self.shared / "image"], check=True)
        for host in self.hosts:
            self._make_folders(host)
            self._make_holder(host)
            self.start_libvirtd(host)

    def _make_folders(self, host):
        folder = self.folder(host)
        for name in ("etc", "etc/hooks/qemu.d", "log", "memory", "bin", "run-presync/libvirt"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        os.chmod(folder / "run-presync" / "libvirt", 0o777)
        if self._hook:
            self.install_hook(host)
        (folder / "etc" / "libvirtd.conf").write_text(textwrap.dedent(f"""\
            listen_tls = 0
            listen_tcp = 1
            auth_tcp = "none"
            auth_unix_rw = "none"
            auth_unix_ro = "none"
            host_uuid = "{_uuid.uuid5(_uuid.NAMESPACE_DNS, f'{host}.{folder}')}"
            log_outputs = "2:file:{self.log(host)}"
            keepalive_interval = 1
            keepalive_count = 5
            """), encoding="ascii")
        (folder / "etc" / "qemu.conf").write_text(textwrap.dedent(f"""\
            user = "+{QEMU_USER}"
            group = "+{QEMU_USER}"
            security_driver = "none"
            seccomp_sandbox = 1
            remember_owner = 0
            namespaces = [ ]
            cgroup_controllers = [ ]
            stdio_handler = "file"
            keepalive_interval = 1
            keepalive_count = 5
            memory_backing_dir = "{folder}/memory"
            """), encoding="ascii")
        for name, line in (("passwd", f"libvirt-qemu:x:{QEMU_USER}:{QEMU_USER}::/nonexistent:/usr/sbin/nologin\n"),
                           ("group", f"libvirt-qemu:x:{QEMU_USER}:\n")):
            text = pathlib.Path("/etc", name).read_text(encoding="utf-8")
            (folder / name).write_text("".join(x for x in text.splitlines(True) if not x.startswith("libvirt-qemu:")) + line, encoding="utf-8")
        wrapper = folder / "bin" / "presync"
        wrapper.write_text(f'#!/bin/sh\nexec {_presync.program("presync")} --socket {folder}/presyncd.sock "$@"\n', encoding="ascii")
        wrapper.chmod(0o755)

    def install_hook(self, host):
        """As the package does.  libvirtd sees the folder since its start."""
        shutil.copy(HOOK, self.folder(host) / "etc" / "hooks" / "qemu.d" / "presync")

    def remove_hook(self, host):
        (self.folder(host) / "etc" / "hooks" / "qemu.d" / "presync").unlink()

    def _make_holder(self, host):
        """A process that keeps the host's mounts and name alive."""
        if not pathlib.Path("/etc/libvirt").is_dir():
            raise LabError("there is no /etc/libvirt to mount over: run tools/setup")
        folder = self.folder(host)
        script = textwrap.dedent(f"""\
            set -e
            hostname presync-{host}
            mount -t tmpfs -o mode=755 tmpfs /run
            mkdir -p /run/presync
            mount --bind {folder}/run-presync /run/presync
            mount -t tmpfs -o mode=755 tmpfs /var
            mkdir -p /var/lib /var/cache /var/log/libvirt /var/tmp
            ln -s /run /var/run
            mount --bind {folder}/log /var/log/libvirt
            mount --bind {folder}/etc /etc/libvirt
            mount --bind {folder}/passwd /etc/passwd  # libvirtd demands its user, which libvirt-daemon alone does not make
            mount --bind {folder}/group /etc/group
            mount -t tmpfs -o mode=755 tmpfs {folder}/memory
            echo ready
            exec sleep infinity
            """)
        holder = super().popen(host, ["unshare", "--uts", "sh", "-c", script], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        with holder.stdout as out:
            ready = out.readline() == b"ready\n"
        if not ready:
            raise LabError(f"the mounts of host {host} can't be made: see above")
        self._holders[host] = holder.pid

    def wrap(self, host, argv):
        if host not in self._holders:
            return super().wrap(host, argv)
        return ["nsenter", "-t", str(self._holders[host]), "-n", "-m", "-u", *map(str, argv)]

    def start_libvirtd(self, host, seconds=30):
        path = f"PATH={self.folder(host)}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        with open(self.folder(host) / "libvirtd.out", "a", encoding="utf-8") as out:
            self._libvirtds[host] = self.popen(host, ["env", path, "libvirtd", "--listen"], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        deadline = time.monotonic() + seconds
        while self.try_virsh(host, "list").returncode != 0:
            if self._libvirtds[host].poll() is not None or time.monotonic() > deadline:
                raise LabError(f"libvirtd on {host} does not answer:\n{self.words(host)}")
            time.sleep(0.1)

    def kill_libvirtd(self, host):
        """As a crash does.  Guests run on."""
        self._libvirtds[host].send_signal(signal.SIGKILL)
        self._libvirtds[host].wait()

    def words(self, host, lines=20):
        texts = []
        for path in (self.folder(host) / "libvirtd.out", self.log(host), self.folder(host) / "log" / "qemu" / f"{NAME}.log"):
            with contextlib.suppress(OSError):
                texts += [f"--- {path}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(texts)

    def close(self):
        for host, name in self.namespace.items():
            if host in self._holders:
                _end_all(name)
        self._holders.clear()
        super().close()

    # ---- libvirt ----

    def try_virsh(self, host, *arguments, seconds=120):
        """virsh on a host, as subprocess.run."""
        return subprocess.run(self.wrap(host, ["virsh", "-q", "-c", "qemu:///system", *arguments]),
                              capture_output=True, text=True, check=False, timeout=seconds)

    def virsh(self, host, *arguments, seconds=120):
        """The same; its output, or LabError."""
        done = self.try_virsh(host, *arguments, seconds=seconds)
        if done.returncode != 0:
            raise LabError(f"virsh {' '.join(arguments)} on {host}: {done.stderr.strip()}\n{self.words(host)}")
        return done.stdout.strip()

    def start_virsh(self, host, *arguments):
        """virsh that goes on beside us, as subprocess.Popen."""
        return self.popen(host, ["virsh", "-q", "-c", "qemu:///system", *arguments], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def define(self, host, xml):
        path = self.folder(host) / "domain.xml"
        path.write_text(xml, encoding="utf-8")
        # On a busy machine libvirt's first talk with QEMU, about what that can do, sometimes fails; it is not remembered.
        if self.try_virsh(host, "define", str(path)).returncode != 0:
            self.virsh(host, "define", str(path))

    def state(self, host, name=NAME):
        """libvirt's word: "running", "paused", "shut off"; "" for a domain that it does not know."""
        done = self.try_virsh(host, "domstate", name)
        return done.stdout.strip() if done.returncode == 0 else ""

    def peer_uri(self, host):
        return LIBVIRT_TCP.format(host=self.address[host])

    def left_over(self, host):
        """Files of presync's and libvirt's that a guest that is not there should not have left: memory, sockets, markers."""
        root = pathlib.Path(f"/proc/{self._holders[host]}/root")
        memory = root / str(self.folder(host) / "memory").lstrip("/")
        found = [p for p in memory.rglob("*") if p.is_file()]
        found += [p for p in (self.run_presync(host) / "libvirt").iterdir() if p.name.startswith((UUID, f"libvirt-{UUID}"))]
        return [p.name for p in found]

    def qemu_pids(self, host):
        """Of all QEMUs that run on a host."""
        pids = []
        for pid in _pids(self.namespace[host]):
            with contextlib.suppress(OSError):
                if "qemu-system" in pathlib.Path(f"/proc/{pid}/comm").read_text():
                    pids.append(pid)
        return pids


def _pids(namespace):
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]


def _end_all(namespace):
    """libvirt's QEMUs are nobody's children: all that lives in a namespace of ours goes."""
    for _ in range(100):
        pids = _pids(namespace)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            return
        time.sleep(0.05)


def domain_xml(spec, two, name=NAME, uuid=UUID, presync=True):
    """A domain of the lab's guest.  `presync`: with what presync needs; else as it would be without."""
    sockets = f"/run/presync/libvirt/libvirt-{uuid}"
    agent = "/run/presync/libvirt/agent.sock" if name == NAME else f"/run/presync/libvirt/{name}.sock"
    append = (f"console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off init_on_alloc=0 nokaslr "
              f"presync.workload={spec.workload} presync.beat_ms={spec.beat_ms} {spec.kernel_args}")
    image = f"{two.shared}/image"
    needs = f"""
  <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
  <qemu:commandline>
    <qemu:arg value='-plugin'/><qemu:arg value='{two.shared}/presync_glue.so,socket={sockets}.glue'/>
    <qemu:arg value='-chardev'/><qemu:arg value='socket,id=presync,path={sockets}.qmp,server=on,wait=off'/>
    <qemu:arg value='-mon'/><qemu:arg value='chardev=presync,mode=control'/>
  </qemu:commandline>""" if presync else ""
    kind = "kvm" if _guest.kvm_usable() else "qemu"
    return f"""<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{spec.memory_mb}</memory>
  <vcpu>1</vcpu>{needs}
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{image}/kernel</kernel>
    <initrd>{image}/initramfs</initrd>
    <cmdline>{append.strip()}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='{_guest.cache_mode(f"{image}/system.img")}'/>
      <source file='{image}/system.img'/>
      <target dev='vda' bus='virtio'/>
      <readonly/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='{_guest.cache_mode(spec.data_disk)}'/>
      <source file='{spec.data_disk}'/>
      <target dev='vdb' bus='virtio'/>
      <shareable/>
    </disk>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='/run/presync/{name}.serial'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{agent}'/>
      <target type='virtio' name='{_guest.AGENT_PORT}'/>
    </channel>
  </devices>
</domain>
"""


class _Daemon(_presync.Daemon):
    """`presync` looks at the host's own files, too."""

    def run(self, *arguments, **options):
        argv = [_presync.program("presync"), "--socket", self.socket, *arguments]
        return subprocess.run(self._two.wrap(self.host, argv), check=False, **options)


def daemon(two, host, **options):
    """presyncd on a host, with [libvirt]."""
    table = {"memory_backing_dir": f"{two.folder(host)}/memory", "peer_uri": LIBVIRT_TCP, "unsafe": True,
             "plugin": f"{two.shared}/presync_glue.so", **options.pop("libvirt", {})}
    return _Daemon(two, host, two.shared, tables={"libvirt": table}, **options)
