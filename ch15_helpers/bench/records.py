"""Numbers of production systems and of this book, recorded on one kind of machine.

``data/peers_h200.json``: the peers, measured once under the conditions that the file states.
``data/ours_h200.json``: ours, written by ``python -m ch15_helpers.bench.production``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

from ch15_helpers.errors import Ch15Error

SCHEMA_VERSION = 1
GROUPS = ("attention", "experts", "engine", "experts under load", "products under load")
ATTENTION = ("64 x 4096", "128 x 1024")
ENGINE = ("128 requests", "1 request", "4 prompts of 8000")
EXPERTS = tuple((m, n) for m in ("QWEN3_30B_A3B", "MIXTRAL_8X7B") for n in (1, 64, 1024, 16384))
FILLS_CHIP = 1024  # tokens from which a block's arithmetic keeps the chip at its power limit
PRODUCTS_MODEL, PRODUCTS_TOKENS = "LLAMA3_8B", 8448
MODEL_NAMES = {"QWEN3_30B_A3B": "Qwen3-30B-A3B", "MIXTRAL_8X7B": "Mixtral-8x7B",
               "LLAMA3_8B": "Llama-3-8B"}  # fmt: skip
HIGHER_IS_BETTER = ("TB/s", "TFLOP/s", "tok/s")


@dataclass(frozen=True)
class Row:
    """One number of one system.

    Attributes:
        group: of GROUPS. work: the shape or the load. unit: of ``value`` and ``limit``.
        limit: what the ceilings of the same run allow, None where it was not computed.
    """

    group: str
    work: str
    unit: str
    system: str
    value: float
    limit: float | None = None

    @property
    def fraction(self) -> float | None:
        """Of the limit, 1 is best."""
        if self.limit is None:
            return None
        return self.value / self.limit if self.higher_is_better else self.limit / self.value

    @property
    def higher_is_better(self) -> bool:
        return self.unit in HIGHER_IS_BETTER

    def speed_over(self, other: Row) -> float:
        """How many times as fast as the other system this one is."""
        ratio = self.value / other.value
        return ratio if self.higher_is_better else 1 / ratio


@dataclass(frozen=True)
class Record:
    """A file of rows: where, when, with what and under which conditions.

    Attributes:
        ceilings: of that machine, measured when the rows were; empty where each row has its limit.
    """

    hardware: str
    recorded: str
    software: str
    conditions: dict[str, str]
    rows: tuple[Row, ...]
    ceilings: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        rows = [{k: v for k, v in asdict(row).items() if v is not None} for row in self.rows]
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "rows": rows}


def load(name: str) -> Record | None:
    """``peers_h200`` or ``ours_h200`` from the package, None where nothing is recorded.

    Raises:
        Ch15Error: the file is malformed; says what is wrong.
    """
    path = files("ch15_helpers.bench").joinpath("data", f"{name}.json")
    return parse(path.read_text(encoding="utf-8"), name) if path.is_file() else None


def parse(text: str, name: str) -> Record:
    """A record from its JSON; raises as ``load``."""
    try:
        data = json.loads(text)
        if data.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version is not {SCHEMA_VERSION}")
        rows = tuple(Row(**row) for row in data.pop("rows"))
        unknown = {row.group for row in rows} - set(GROUPS)
        if unknown:
            raise ValueError(f"unknown groups {sorted(unknown)}")
        return Record(**data, rows=rows)
    except (KeyError, TypeError, ValueError) as error:
        raise Ch15Error(f"{name}.json is not a record of rows: {error}") from error


def attention_work(shape: str) -> str:
    """The name of a decode attention's work in the records."""
    return f"decode {shape}"


def expert_work(model: str, tokens: int) -> str:
    """The name of a block's work in the records."""
    return f"{MODEL_NAMES.get(model, model)}, {tokens} token{'' if tokens == 1 else 's'}"


def product_work(name: str) -> str:
    """The name of a dense layer's product in the records."""
    return f"{MODEL_NAMES[PRODUCTS_MODEL]} {name}, {PRODUCTS_TOKENS} tokens"


def fastest_peer(group: str, work: str, key: str) -> float | None:
    """The best number that a peer was recorded to reach on this work and hardware key."""
    record = load(f"peers_{key}")
    rows = [r for r in record.rows if (r.group, r.work) == (group, work)] if record else []
    if not rows:
        return None
    best = max if rows[0].higher_is_better else min
    return best(row.value for row in rows)
