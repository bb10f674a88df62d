"""Finds Open MPI, installs Debian's where that needs no question, and starts ranks over UCX.

``python tools/mpi.py --install`` is a step of ``make test`` and of ``make mpi-decode``: it prints
which mpirun will be used, or installs openmpi-bin when run as root, or says what to do. Without it
the tests that need it are skipped with that reason; under CI=true that is a failure.
``python tools/mpi.py NP [--hosts A,B] -- ARGUMENTS`` runs the pipeline on NP processes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

HINT = (
    "Open MPI is missing: install mpirun (Debian: apt-get install openmpi-bin libucx0) and mpi4py "
    "(pip install mpi4py==4.1.2)"
)
MODULE = "ch15_helpers.disagg.launch"
# Debian's builds take UCX only when told to accept every transport and device; `sm` is shared
# memory, and over several hosts UCX chooses for itself.
UCX = (
    *("--mca", "pml", "ucx", "--mca", "osc", "ucx"),
    *("--mca", "pml_ucx_tls", "any", "--mca", "pml_ucx_devices", "any"),
)


def find() -> str | None:
    """Return the path of mpirun, or None when it or the bindings are missing."""
    return shutil.which("mpirun") if importlib.util.find_spec("mpi4py") else None


def install() -> str | None:
    """Return mpirun, installing Debian's when this process may; None when it cannot."""
    may = os.name == "posix" and os.geteuid() == 0 and shutil.which("apt-get")
    if shutil.which("mpirun") is None and may:
        quiet = {
            "stdout": subprocess.DEVNULL,
            "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        }
        subprocess.run(["apt-get", "update", "-qq"], check=False, **quiet)
        packages = ("openmpi-bin", "libucx0")
        subprocess.run(["apt-get", "install", "-y", "-qq", *packages], check=False, **quiet)
    return find()


def command(mpirun: str, num_ranks: int, hosts: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line that starts the ranks."""
    as_root = ["--allow-run-as-root"] if os.name == "posix" and os.geteuid() == 0 else []
    where = ["--host", hosts] if hosts else ["--oversubscribe", "-x", "UCX_TLS=sm,self"]
    ranks = ["-np", str(num_ranks), *where, *UCX]
    return [mpirun, *as_root, *ranks, sys.executable, "-m", MODULE, *arguments]


def main() -> int:
    """Say what is there, or start the ranks."""
    if "--install" in sys.argv:
        mpirun = install()
        print(f"mpi: {mpirun}" if mpirun else f"mpi: {HINT}; its tests will be skipped")
        in_ci = os.environ.get("CI", "").lower() in ("1", "true", "yes")
        return 1 if mpirun is None and in_ci else 0
    mpirun = find()
    if mpirun is None:
        print(HINT, file=sys.stderr)
        return 1
    own, arguments = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, arguments = own[:cut], own[cut + 1 :]
    hosts = own[own.index("--hosts") + 1] if "--hosts" in own else ""
    return subprocess.run(command(mpirun, int(own[0]), hosts, arguments), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
