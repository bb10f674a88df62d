"""What a stored chapter must be: a function from a notebook to the list of its faults."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 1_000_000
MAX_LINES = 25
PARAMETERS = {"device", "model", "dtype", "iterations", "profile"}
IGNORED = "nbval-ignore-output"

# DESIGN section 5, as headings in this order; others may stand between them.
ANATOMY = (
    r"What you will be able to do",
    r"Predict first",
    r"The model",
    r"The baseline",
    r"The transformation|Step 1",
    r"Same tokens",
    r"What you should see",
    r"When it loses",
    r"Explore",
    r"On other hardware",
    r"Exercises",
    r"Takeaways",
)
MEASURES = re.compile(
    r"perf_counter|\bmeasure(?:_pair)?\(|\binterleave\(|time_once_s\(|\.measured\(|hardware\.ceilings"
)
UNIT_NUMBER = re.compile(
    r"(?<![\w=`$.])\d[\d.,]*\s*(?:ms|µs|us|tok/s|tokens/s|GB/s|GiB/s|TFLOP/s|×|x faster|%)(?![\w`])"
)
PLACES = re.compile(r"(?:/(?:home|Users|root|work|tmp|var/folders)/|[A-Z]:\\\\)[\w./-]*")


def problems(path: Path) -> list[str]:
    """Return every fault of a stored chapter, as sentences with the cell's number."""
    raw = path.read_bytes()
    notebook = json.loads(raw)
    cells = notebook["cells"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
    found = list(check_execution(cells))
    found += check_cells(cells)
    found += check_outputs(cells)
    found += check_anatomy(cells)
    found += check_numbers(cells)
    if len(raw) > MAX_BYTES:
        found.append(f"{len(raw):,} bytes; at most {MAX_BYTES:,}")
    for place in sorted(set(PLACES.findall(raw.decode("utf-8")))):
        found.append(f"names a place on somebody's machine: {place}")
    return found


def code_cells(cells: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in the notebook, cell) of the code cells."""
    return ((i, c) for i, c in enumerate(cells) if c["cell_type"] == "code")


def tags(cell: dict[str, Any]) -> set[str]:
    """Tags of a cell."""
    return set(cell["metadata"].get("tags", []))


def check_execution(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Every code cell was executed, once, in order, without an error."""
    counts = [c.get("execution_count") for _, c in code_cells(cells)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts[:6]}…, expected 1, 2, 3 …: run `make execute`"
    if not any(c.get("outputs") for _, c in code_cells(cells)):
        yield "has no outputs: it was stripped"
    for i, cell in code_cells(cells):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                yield f"cell {i} stores an error: {output.get('ename')}"


def check_cells(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Parameters first; short cells; what measures is not compared."""
    tagged = [(i, c) for i, c in code_cells(cells) if "parameters" in tags(c)]
    if len(tagged) != 1 or tagged[0][0] != next(code_cells(cells))[0]:
        yield "the first code cell, and no other, must be tagged `parameters`"
    else:
        assigned = set(re.findall(r"^(\w+)\s*(?::[^=\n]+)?=", tagged[0][1]["source"], re.MULTILINE))
        if missing := PARAMETERS - assigned:
            yield f"the parameters cell lacks {sorted(missing)}"
    for i, cell in code_cells(cells):
        lines = cell["source"].count("\n") + 1
        if lines > MAX_LINES:
            yield f"cell {i} has {lines} lines; at most {MAX_LINES}"
        body = re.sub(r"^(?:from|import) .*$", "", cell["source"], flags=re.MULTILINE)
        if MEASURES.search(body) and cell["outputs"] and IGNORED not in tags(cell):
            yield f"cell {i} shows what it measured, so it needs the tag {IGNORED}"


def check_outputs(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Pictures have alternative text; nothing is on standard error."""
    for i, cell in code_cells(cells):
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data or "image/svg+xml" in data:
                yield f"cell {i} shows a bare picture; use show_figure, which takes alt text"
            markup = "".join(data.get("text/html", ""))
            for tag in re.findall(r"<img\b[^>]*>", markup):
                if not re.search(r'\balt="[^"]{15,}"', tag):
                    yield f"cell {i} has a picture without alt text that says what it shows"
            if output.get("name") == "stderr":
                yield f"cell {i} prints on standard error: {''.join(output['text'])[:60]!r}"
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "markdown" and re.search(r"!\[\s*\]\(", cell["source"]):
            yield f"cell {i} has an image without alt text"


def headings(cells: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(cell, text) of the second-level headings."""
    return [
        (i, line[3:])
        for i, cell in enumerate(cells)
        if cell["cell_type"] == "markdown"
        for line in cell["source"].splitlines()
        if line.startswith("## ")
    ]


def check_anatomy(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Title, claim, hardware, then the sections of a chapter in their order."""
    first = cells[0]["source"]
    if not first.startswith("# ") or "**" not in first:
        yield "the first cell needs a title and the claim in bold"
    if not re.search(r"minutes?\b", first) or not re.search(r"\b(CPU|GPU)s?\b", first):
        yield "the first cell says how many minutes it takes and which hardware it needs"
    texts = [text for _, text in headings(cells)]
    at = 0
    for wanted in ANATOMY:
        place = next((k for k in range(at, len(texts)) if re.match(wanted, texts[k])), None)
        if place is None:
            where = f" after {texts[at - 1]!r}" if at else ""
            yield f"no section {wanted!r}{where}"
        else:
            at = place + 1
    text = "\n".join(c["source"] for c in cells if c["cell_type"] == "markdown")
    if not re.search(r":class: dropdown|\{dropdown\}", text):
        yield "exercises need dropdown solutions"
    views = [o for c in cells for o in c.get("outputs", []) if "data" in o]
    if not any("application/vnd.jupyter.widget-view+json" in o["data"] for o in views):
        yield "has no widget"
    if not any("<figure" in "".join(o["data"].get("text/html", "")) for o in views):
        yield "has no figure"


def check_numbers(cells: list[dict[str, Any]]) -> Iterator[str]:
    """The numbers of *What you should see* come from the run and are not typed."""
    starts = headings(cells)
    for (begin, text), (end, _) in zip(starts, [*starts[1:], (len(cells), "")], strict=True):
        if not text.startswith("What you should see"):
            continue
        section = cells[begin:end]
        for i, cell in enumerate(section, start=begin):
            typed = UNIT_NUMBER.findall(cell["source"]) if cell["cell_type"] == "markdown" else []
            if typed:
                yield f"cell {i} types measured numbers: {typed}"
        if not any(c.get("outputs") for c in section):
            yield "*What you should see* shows nothing that was recorded"
