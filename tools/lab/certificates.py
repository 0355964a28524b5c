"""Certificates for the hosts of the lab, as an operator makes them: by tools/make-certs."""

import os
import pathlib
import subprocess

from . import hosts as _hosts

_TOOL = pathlib.Path(__file__).resolve().parent.parent / "make-certs"


def make(folder, *hosts, days=2):
    """Makes them in `folder`.  `hosts` as make-certs has them: "target,10.231.0.2"."""
    done = subprocess.run([_TOOL, "--folder", folder, "--days", str(days), *hosts],
                          capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _hosts.LabError(f"make-certs failed: {done.stderr.strip()}")


def of_lab(folder, two):
    """The folder with those of both hosts of the lab; made the first time."""
    certificates = pathlib.Path(folder) / "certificates"
    if not certificates.exists():
        make(certificates, *(f"{host},{address},127.0.0.1" for host, address in two.address.items()))
        os.chmod(certificates, 0o755)  # a presyncd that is not root reads them here, too
    return certificates


def settings(folder, host):
    """The lines of presyncd.toml."""
    return [f'certificate = "{folder}/{host}.crt"', f'key = "{folder}/{host}.key"', f'ca = "{folder}/ca.crt"']
