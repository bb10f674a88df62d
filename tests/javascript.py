"""Runs the explorer's ES module outside a page: in Node where there is one, else in Chromium."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import browser
import pytest

MODULE = Path(__file__).parent.parent / "ch15_helpers" / "viz" / "formula_explorer.js"


def call(function: str, *arguments: Any) -> Any:
    """Call an exported function of ``formula_explorer.js`` with JSON arguments."""
    source = base64.b64encode(MODULE.read_bytes()).decode()
    body = (
        f'const m = await import("data:text/javascript;base64,{source}");'
        f"const value = m[{json.dumps(function)}](...{json.dumps(arguments)});"
    )
    node = shutil.which("node")
    if node:
        script = f"{body} console.log(JSON.stringify(value ?? null));"
        done = subprocess.run(
            [node, "--input-type=module"], input=script, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    if browser.find() is None:
        pytest.fail(browser.HINT) if browser.in_ci() else pytest.skip(browser.HINT)
    with browser.chromium() as (page, _):
        return page.evaluate(f"(async () => {{ {body} return value ?? null; }})()")
