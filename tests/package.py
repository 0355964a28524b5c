#!/usr/bin/python3
"""Makes the packages, installs them in a clean root and moves a guest with what they installed.

    tests/package.py [-v]                      needs root; PRESYNC_BUILD names the build folder whose programs are packaged
    PRESYNC_SUITE=trixie tests/package.py -v   for another release of Debian: everything is compiled there, in a root of
                                               that release (some 20 minutes)

The root is Debian's minimum and what the lab needs (QEMU, iproute2, python3, openssl), made once from this machine's own package
sources and kept as ${PRESYNC_CACHE:-~/.cache/presync}/root-SUITE-HASH.tar.
"""

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = pathlib.Path(os.environ.get("PRESYNC_BUILD", ROOT / "build" / "release")).resolve()
CACHE = pathlib.Path(os.environ.get("PRESYNC_CACHE", pathlib.Path.home() / ".cache" / "presync"))
PACKAGES = ("python3", "iproute2", "procps", "busybox-static", "qemu-system-x86", "seabios", "bash-completion", "man-db", "openssl")
# Runs "$@" in the root $1.  The mounts are in a namespace of this one command: what cleans up afterwards can't reach
# through them.  $2 to $4: this tree, the cache and the packages, read-only.
INSIDE = """set -e
root=$1
mount --bind "$root" "$root" # ip netns exec wants / to be a mount point
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount --bind /tmp "$root/tmp"
for pair in "$2:src" "$3:cache" "$4:debs"; do
  mount --bind "${pair%:*}" "$root/${pair##*:}"
  mount -o remount,bind,ro "$root/${pair##*:}"
done
shift 4
exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root DEBIAN_FRONTEND=noninteractive "$@"
"""
# The same to make packages: $2 is this tree, read-only, $3 where they go.
MAKE = """set -e
root=$1
mkdir -p "$root/src" "$root/debs"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$2" "$root/src"
mount -o remount,bind,ro "$root/src"
mount --bind "$3" "$root/debs"
exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root DEB_BUILD_OPTIONS="parallel=2 noautodbgsym" sh -c '
git config --global --add safe.directory "*"
exec /src/tools/package --out /debs --lintian'
"""


def run(*argv, **options):
    """Output and errors as one text; AssertionError with it if it fails."""
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, argv))} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def codename():
    return re.search(r"^VERSION_CODENAME=(\w+)", pathlib.Path("/etc/os-release").read_text(encoding="utf-8"), re.M)[1]


SUITE = os.environ.get("PRESYNC_SUITE", codename())


def sources():
    """This machine's package sources, for the release SUITE, one line each."""
    lines = subprocess.run([ROOT / "tools" / "setup", "--sources"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return "".join(f"{line.replace(f' {codename()}', f' {SUITE}')}\n" for line in lines.splitlines() if f" {codename()}" in line)


def build_packages():
    """What debian/control says that building needs."""
    control = (ROOT / "debian" / "control").read_text(encoding="utf-8")
    listed = re.search(r"^Build-Depends:(.*?)^\S", control, re.M | re.S)[1]
    return [re.sub(r"[ (:].*", "", entry.strip()) for entry in listed.split(",") if entry.strip() and "debhelper-compat" not in entry]


def clean_root(packages=None):
    """The tar of a root with `packages`; made if it is not there."""
    wanted, packages = sources(), packages or PACKAGES
    name = hashlib.sha256((wanted + " ".join(packages)).encode()).hexdigest()[:12]
    tar = CACHE / f"root-{SUITE}-{name}.tar"
    if not tar.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            run("mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}", SUITE,
                f"{folder}/root.tar", "-", input=wanted)
            os.rename(f"{folder}/root.tar", tar)
    return tar


class PackageTest(unittest.TestCase):
    """Steps build on each other: one test."""

    def inside(self, *argv, **options):
        return run("unshare", "--mount", "--propagation", "private", "bash", "-c", INSIDE, "inside",
                   self.root, ROOT, CACHE, self.debs, *argv, **options)

    def set_up_root(self, folder):
        self.root = pathlib.Path(folder) / "root"
        self.root.mkdir()
        run("tar", "-xf", clean_root(), "-C", self.root, "--numeric-owner")
        for name in ("src", "cache", "debs"):
            (self.root / name).mkdir()
        shutil.copy("/etc/resolv.conf", self.root / "etc" / "resolv.conf")
        policy = self.root / "usr" / "sbin" / "policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")  # no service starts in a chroot
        policy.chmod(0o755)

    def test_packages(self):
        with tempfile.TemporaryDirectory(prefix="presync-package-") as folder:
            self.debs = pathlib.Path(folder) / "debs"
            if SUITE == codename():
                print(run(ROOT / "tools" / "package", "--build", BUILD, "--out", self.debs, "--lintian"))
            else:
                self.make_there(folder)
            self.set_up_root(folder)
            self.install()
            self.look_at_files()
            self.move()
            self.upgrade_and_purge()

    def make_there(self, folder):
        """Of what is committed."""
        root, tree = pathlib.Path(folder) / "builder", pathlib.Path(folder) / "tree"
        root.mkdir()
        self.debs.mkdir()
        run("git", "clone", "--quiet", "--no-hardlinks", ROOT, tree)
        run("tar", "-xf", clean_root(["build-essential", "debhelper", "fakeroot", "git", "lintian", *build_packages()]), "-C", root, "--numeric-owner")
        print(run("unshare", "--mount", "--propagation", "private", "bash", "-c", MAKE, "make", root, tree, self.debs))

    def install(self):
        names = sorted(p.name for p in self.debs.glob("*.deb"))
        self.assertEqual(len(names), 3, names)
        self.inside("apt-get", "update", "-qq")
        self.inside("apt-get", "install", "-y", "-qq", "--no-install-recommends", *(f"/debs/{name}" for name in names))
        self.assertEqual(self.inside("dpkg", "--audit"), "")
        self.assertEqual(self.inside("dpkg", "--verify", *(name.split("_")[0] for name in names)), "")

    def look_at_files(self):
        self.assertIn("presync", self.inside("presync", "--version"))
        self.assertIn("is good", self.inside("presyncd", "--check"))
        unit = (self.root / "etc/systemd/system/multi-user.target.wants/presyncd.service").readlink()
        text = (self.root / str(unit).lstrip("/")).read_text(encoding="utf-8")
        self.assertIn("ExecStart=/usr/sbin/presyncd", text)
        for user in ("presync", "presync-qemu"):
            self.inside("getent", "passwd", user)
        self.assertIn("/dev/shm/presync 0711 presync", (self.root / "usr/lib/tmpfiles.d/presync.conf").read_text(encoding="utf-8"))
        config = (self.root / "etc/presync/presyncd.toml").read_text(encoding="utf-8")
        for path in re.findall(r'"(/[^",]*\.so)[",]', config):
            self.assertTrue((self.root / path.lstrip("/")).exists(), path)
        for page in ("presync.1", "presyncd.toml.5", "presyncd.8", "presync-qemu.7", "presync-libvirt.7"):
            name, section = page.rsplit(".", 1)
            self.assertIn("NAME", self.inside("man", section, name), page)
        hook = self.root / "etc/libvirt/hooks/qemu.d/presync"
        self.assertEqual(hook.stat().st_mode & 0o777, 0o755)
        self.inside("bash", "-c", f"echo '<uuid>6d1e3a52-7c0b-4f55-9b0a-0a5e5f1c2d3e</uuid>' | /{hook.relative_to(self.root)} web1 migrate begin -")
        words = self.inside("bash", "-c", ". /usr/share/bash-completion/bash_completion; . /usr/share/bash-completion/completions/presync; "
                            "COMP_WORDS=(presync sta); COMP_CWORD=1; COMP_LINE='presync sta'; COMP_POINT=11; _presync; echo ${COMPREPLY[*]}")
        self.assertEqual(sorted(words.split()), ["start", "status"])

    def move(self):
        print(self.inside("PRESYNC_INSTALLED=1", "PRESYNC_CACHE=/cache", "PYTHONDONTWRITEBYTECODE=1",
                          "python3", "/src/tests/e2e.py", "MoveTest.test_qemu7", "-v", timeout=600))

    def upgrade_and_purge(self):
        config = self.root / "etc/presync/presyncd.toml"
        mine = config.read_text(encoding="utf-8") + "# mine\n"
        config.write_text(mine, encoding="utf-8")
        names = sorted(p.name for p in self.debs.glob("*.deb"))
        self.inside("apt-get", "install", "-y", "-qq", "--reinstall", *(f"/debs/{name}" for name in names))
        self.assertEqual(config.read_text(encoding="utf-8"), mine, "an upgrade keeps what the operator wrote")
        self.inside("apt-get", "purge", "-y", "-qq", *(name.split("_")[0] for name in names))
        for path in ("etc/presync/presyncd.toml", "usr/sbin/presyncd", "usr/lib/x86_64-linux-gnu/qemu/presync_glue.so",
                     "etc/libvirt/hooks/qemu.d/presync"):
            self.assertFalse((self.root / path).exists(), path)


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("package.py needs root")
    unittest.main()
