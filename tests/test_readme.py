"""What README.md and the pages tell the reader to type exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]


def commands(path: Path) -> list[str]:
    """Lines of the shell blocks of a page, without prompts and comments."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", path.read_text(), re.DOTALL)
    lines = [re.sub(r"\s+#\s.*$", "", line).strip() for b in blocks for line in b.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line and not line.startswith("#")]


ALL = [pytest.param(c, id=f"{p.name}: {c}") for p in PAGES for c in commands(p)]


def targets() -> set[str]:
    """Targets that the Makefile has."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("command", ALL)
def test_command_exists(command: str) -> None:
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_0-9]+=.*", w)]
    if words[0] == "make":
        asked = {w for w in words[1:] if not w.startswith("-")}
        assert asked <= targets(), f"no such target: {asked - targets()}"
    elif words[0] == "ch15":
        known = subprocess.run(
            [sys.executable, "-m", "ch15_helpers", words[1], "--help"],
            capture_output=True,
            text=True,
            check=False,
            env={"COLUMNS": "200", "NO_COLOR": "1", "PATH": "/usr/bin:/bin", "TERM": "dumb"},
        )
        assert known.returncode == 0, f"no such command: {words[1]}"
        for option in (w.split("=")[0] for w in words if w.startswith("--")):
            assert option in known.stdout, f"{words[1]} has no option {option}"
        check_targets(words)


def check_targets(words: list[str]) -> None:
    """Every target that a command names is registered."""
    from ch15_helpers.bench.targets import TARGETS

    if "--targets" in words:
        asked = words[words.index("--targets") + 1].removeprefix("ch15").strip(":").split(",")
        placeholders = {"", "my_target"}  # the appendix shows how to add one
        assert set(asked) - placeholders <= set(TARGETS)


def test_make_targets_in_running_text_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"`make ([a-z]+)", page.read_text()):
            assert target in targets(), f"{page.name}: make {target}"


def test_files_that_the_readme_links_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_the_readme_is_short_and_has_a_picture() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 80
    assert re.search(r"!\[[^\]]{20,}\]\(book/images/[\w.-]+\)", text)
