"""Executed notebooks in one stable form, so that a commit shows real changes only.

Two executions with the same results give the same bytes: metadata that tools add is dropped,
cell ids come from the cells' content, counts run from 1, and the random model ids of widgets are
replaced by ids that depend on the widgets' state and place alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

Notebook = dict[str, Any]

STATE_MIME = "application/vnd.jupyter.widget-state+json"
VIEW_MIME = "application/vnd.jupyter.widget-view+json"
MODEL_PREFIX = "IPY_MODEL_"
CELL_METADATA = ("tags", "mystnb", "slideshow", "editable")
INJECTED_TAG = "injected-parameters"
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


def normalise(notebook: Notebook) -> Notebook:
    """The stable form of an executed notebook; idempotent; the argument is not changed.

    A cell that was not executed keeps its missing count: a stripped notebook stays stripped.
    """
    nb: Notebook = json.loads(json.dumps(notebook))
    nb["cells"] = [c for c in nb["cells"] if INJECTED_TAG not in _tags(c)]
    count, seen = 0, dict[str, int]()
    for cell in nb["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k in CELL_METADATA and v}
        cell["source"] = _joined(cell["source"])
        cell["id"] = _cell_id(cell, seen)
        if cell["cell_type"] == "code":
            if cell.get("execution_count") is not None:
                count += 1
                cell["execution_count"] = count
            cell["outputs"] = _outputs(cell)
    nb["metadata"] = _metadata(nb["metadata"])
    nb["nbformat"], nb["nbformat_minor"] = 4, 5
    return _rename_widgets(nb)


def dumps(notebook: Notebook) -> str:
    """The text that is committed, in nbformat's own layout.

    Raises:
        nbformat.ValidationError: not a valid notebook.
    """
    import nbformat

    node = nbformat.from_dict(notebook)
    nbformat.validate(node)
    return str(nbformat.writes(node, version=4)).rstrip("\n") + "\n"


def _tags(cell: dict[str, Any]) -> list[str]:
    return list(cell.get("metadata", {}).get("tags", []))


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _cell_id(cell: dict[str, Any], seen: dict[str, int]) -> str:
    """Short hash of the content, with a number where two cells are the same."""
    content = f"{cell['cell_type']}\n{cell['source']}"
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    seen[digest] = seen.get(digest, 0) + 1
    return digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def _outputs(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Outputs with joined streams, the cell's count and no object addresses."""
    outputs: list[dict[str, Any]] = []
    for output in cell["outputs"]:
        output.pop("transient", None)
        if output["output_type"] == "execute_result":
            output["execution_count"] = cell["execution_count"]
        if output["output_type"] == "stream":
            output["text"] = _joined(output["text"])
            last = outputs[-1] if outputs else None
            if last and last["output_type"] == "stream" and last["name"] == output["name"]:
                last["text"] += output["text"]  # how a stream is cut depends on timing
                continue
        for mime, value in output.get("data", {}).items():
            text = _joined(value) if _is_text(value) else value
            output["data"][mime] = _ADDRESS.sub(" at 0x0", text) if mime == "text/plain" else text
        outputs.append(output)
    return outputs


def _is_text(value: object) -> bool:
    lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return isinstance(value, str) or lines


def _metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Kernel and language without versions, and the widgets' state."""
    kept: dict[str, Any] = {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    state = metadata.get("widgets", {}).get(STATE_MIME, {}).get("state")
    if state:
        kept["widgets"] = {STATE_MIME: {"state": state, "version_major": 2, "version_minor": 0}}
    return kept


def _rename_widgets(nb: Notebook) -> Notebook:
    state = nb["metadata"].get("widgets", {}).get(STATE_MIME, {}).get("state")
    if not state:
        return nb
    order = _widget_order(nb, state)
    names = {
        old: hashlib.sha256(f"widget {number}".encode()).hexdigest()[:32]
        for number, old in enumerate(order)
    }
    # Ids are 32 hex digits without a pattern: replacing them in the text hits nothing else.
    # One pass, because new names may be old names of a notebook that was normalised before.
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    text = pattern.sub(lambda m: names[m.group(0)], json.dumps(nb, ensure_ascii=False))
    renamed: Notebook = json.loads(text)
    return renamed


def _widget_order(nb: Notebook, state: dict[str, Any]) -> list[str]:
    """Every model id: first what the cells show, depth first, then the rest by content."""
    order: dict[str, None] = {}

    def visit(model_id: str) -> None:
        if model_id in order or model_id not in state:
            return
        order[model_id] = None
        for reference in _references(state[model_id]):
            visit(reference)

    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            view = output.get("data", {}).get(VIEW_MIME)
            if view:
                visit(view["model_id"])
    # Links and the like are shown by no cell. Sorting them by what they say, with known ids
    # already replaced by their place, does not depend on the random ids.
    while len(order) < len(state):
        place = {model_id: str(i) for i, model_id in enumerate(order)}
        rest = [m for m in state if m not in order]
        visit(min(rest, key=lambda m: (_signature(m, state, place, ()), rest.index(m))))
    return list(order)


def _signature(
    model_id: str, state: dict[str, Any], place: dict[str, str], path: tuple[str, ...]
) -> str:
    """Hash of a model's state in which references are places or, again, signatures."""
    if model_id in place:
        return f"place {place[model_id]}"
    if model_id in path:
        return f"loop {len(path) - path.index(model_id)}"
    text = json.dumps(state[model_id], sort_keys=True)
    for reference in dict.fromkeys(_references(state[model_id])):
        if reference in state:
            inner = _signature(reference, state, place, (*path, model_id))
            text = text.replace(reference, inner)
    return hashlib.sha256(text.encode()).hexdigest()


def _references(model: dict[str, Any]) -> list[str]:
    """Ids that a model's state names, in the order of sorted keys."""
    text = json.dumps(model, sort_keys=True)
    return re.findall(MODEL_PREFIX + r"([0-9a-zA-Z_-]+)", text)
