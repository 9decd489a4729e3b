"""Which settings tuning may choose for an op: a short, fixed list of changes to the defaults, every one legal.

Each field that can be tuned alone, and the few combinations of fields that only make sense together. The lists are
fixed so that tests can run every setting that a table may come to hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

Fields = dict[str, Any]

MOST = 40
"""Candidates of one op and bucket: each takes seconds to compile and to measure."""

REGISTERS, MOST_REGISTERS = 65536, 255
"""Of a multiprocessor, and of a thread, on NVIDIA."""

TILE, DOT_TILE = 64, 128
"""Elements of a tile that a thread may hold; of an accumulator of `tl.dot`, which nothing else stands beside."""

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Shared memory of a program; 64 KB on AMD, and 99 KB on the other NVIDIA families."""

SINGLES: dict[str, dict[str, tuple[Any, ...]]] = {
    "match": {
        "num_warps": (4, 16),
        "max_registers": (128, 168, 224, 255),
        "match_rows": (32, 64, 128),
        "match_columns": (16, 32, 64),
        "rank_columns": (8, 16, 32, 64),
        "merge_rows": (4, 8, 16),
        "merge_columns": (64, 128, 256),
        "block_columns": (16, 32, 64),
        "link_rows": (8, 16, 32),
        "gram_rows": (32, 64, 128),
        "gram_channels": (16, 32, 64, 128),
        "gram_warps": (4, 8),
        "gram_stages": (2, 3, 4),
        "num_stages": (1, 2, 3),
        "max_programs": (128, 256, 512),
        "mean_groups": (8, 16, 32),
        "mean_channels": (64, 128, 256),
    },
    "groups": {"members": (1, 2, 4, 8, 16)},
    "loss": {"members": (1, 2, 4, 8), "max_registers": (64, 128, 168)},
    "row_loss": {"members": (1, 2, 4, 8), "max_registers": (64, 128, 168)},
    "gather": {},
    "count": {},
    "stream": {
        "norms": (False, True),
        "place": (False, True),
        "resident": (False,),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "channels": (32, 64, 128),
        "programs": (64, 132, 264),
        "select_warps": (4, 8, 16),
        "place_rows": (32, 64, 128),
        "place_columns": (32, 64, 128),
        "norm_rows": (16, 32, 64),
    },
}
"""Fields by op, the most promising first, and their values."""

TOGETHER: dict[str, tuple[dict[str, tuple[Any, ...]], ...]] = {
    "match": (
        {"fused": (True,), "max_registers": (128, 168, 255), "num_warps": (8,)},
        {"fused": (False,), "max_registers": (128,), "num_warps": (4, 8)},
        {"num_warps": (16,), "max_registers": (128,), "rank_columns": (16,)},
        {"gram_rows": (128,), "gram_warps": (8,), "gram_channels": (32, 64)},
    ),
    "groups": ({"groups": (0.5, 1, 2), "channels": (0.5, 1, 2), "num_warps": (2, 4, 8)},),
    "loss": ({"groups": (0.5, 1, 2), "channels": (0.5, 1, 2), "num_warps": (2, 4, 8)},),
    "row_loss": ({"groups": (0.5, 1, 2), "num_warps": (2, 4, 8, 16)},),
    "gather": ({"tokens": (0.5, 1, 2), "channels": (0.5, 1, 2), "num_warps": (2, 4, 8)},),
    "stream": ({"rows": (0.5, 1, 2), "columns": (0.5, 1, 2), "num_warps": (4, 8)},),
    "count": ({"rows": (0.5, 1, 2), "columns": (0.5, 1, 2), "num_warps": (2, 4, 8)},),
}
"""Fields by op that are tried in every combination; a fraction or a small number scales a tile's default."""

SCALED = ("groups", "channels", "tokens", "rows", "columns")
"""Fields whose values in TOGETHER scale the default."""

NO_TILES = (
    *("fused", "resident", "norms", "place"),
    *("max_registers", "max_programs", "programs", "num_stages", "gram_stages"),
)
"""Fields that need not be powers of two."""


def candidates(op: str, bucket: str, default: Any, family: str = "") -> list[Fields]:
    """The settings to try in place of `default`, as changed fields; the most promising first.

    op and bucket as in a table (`dtm_triton.kernels.tables`), family the GPU's.

    >>> from dtm_triton.kernels.settings import CountSettings
    >>> candidates("count", "any", CountSettings())[:2]
    [{'rows': 16, 'columns': 16, 'num_warps': 2}, {'rows': 16, 'columns': 16}]
    """
    found: list[Fields] = []
    for fields in _all(op, default):
        changed = {name: value for name, value in fields.items() if getattr(default, name) != value}
        if changed and changed not in found and legal(op, bucket, replace(default, **changed), default, family):
            found.append(changed)
    return found[:MOST]


def _all(op: str, default: Any) -> Iterator[Fields]:
    for axes in TOGETHER.get(op, ()):
        values = [
            [int(getattr(default, name) * value) if name in SCALED else value for value in choices]
            for name, choices in axes.items()
        ]
        for chosen in product(*values):
            yield dict(zip(axes, chosen, strict=True))
    for name, choices in SINGLES.get(op, {}).items():
        for value in choices:
            yield {name: value}


def legal(op: str, bucket: str, settings: Any, default: Any, family: str = "") -> bool:
    """Whether `settings` can be launched: tiles are powers of two and fit registers and shared memory.

    Where `default` itself has larger tiles than is sound for others, as large ones are legal.

    >>> from dtm_triton.kernels.settings import CountSettings
    >>> legal("count", "any", CountSettings(rows=24), CountSettings())
    False
    """
    values = asdict(settings)
    tiles = [value for name, value in values.items() if name not in NO_TILES]
    if any(value < 1 or value & (value - 1) for value in tiles):
        return False
    if not 1 <= values["num_warps"] <= 32 or ("channels" in values and values["channels"] < 16):
        return False
    if values.get("max_registers", 32) > min(MOST_REGISTERS, REGISTERS // (32 * settings.num_warps)):
        return False
    if tile(settings) > max(TILE, tile(default)):
        return False
    if op == "stream":
        rows, columns, stages = settings.rows, settings.columns, settings.num_stages
        if settings.resident:  # whole rows of channels, how many the bucket does not tell: nothing larger
            return rows <= default.rows and columns <= default.columns and stages <= default.num_stages
        return _dot_fits(rows, columns, settings.channels, settings.num_warps, stages, bucket, family)
    if op != "match":
        return True
    warps, stages = settings.gram_warps, settings.gram_stages
    if settings.fused:
        warps, stages = settings.num_warps, settings.num_stages
    rows, channels = settings.gram_rows, settings.gram_channels
    return _dot_fits(rows, rows, channels, warps, stages, bucket, family)


def _dot_fits(rows: int, columns: int, channels: int, warps: int, stages: int, bucket: str, family: str) -> bool:
    """Whether a product's accumulator fits the registers, and its pipeline the shared memory."""
    width = 4 if "single" in bucket else 2
    if min(rows, columns, channels) < 16 or rows * columns // (32 * warps) > DOT_TILE:
        return False
    return (rows + columns) * channels * width * stages <= shared_bytes(family)


def shared_bytes(family: str) -> int:
    """Shared memory that a program may take.

    >>> shared_bytes("gfx942"), shared_bytes("sm_90")
    (65536, 232448)
    """
    return SHARED_BYTES.get(family, (64 if family.startswith("gfx") else 99) * 1024)


def tile(settings: Any) -> int:
    """Elements of the largest register tile that a thread holds.

    >>> from dtm_triton.kernels.settings import CountSettings
    >>> tile(CountSettings(rows=32, columns=32, num_warps=4))
    8
    """
    values = asdict(settings)
    if "slots" in values:
        tiles = [
            values["match_rows"] * values["match_columns"],
            values["slots"] * values["rank_columns"],
            values["link_rows"] * values["rank_columns"],
            values["merge_rows"] * values["merge_columns"],
            values["merge_rows"] * values["block_columns"],
            values["mean_groups"] * values["mean_channels"],
        ]
    elif "select_warps" in values:
        return max(
            values["rows"] * values["columns"] // (32 * values["num_warps"]) // 2,  # the accumulator of a product
            values["place_rows"] * values["place_columns"] // (32 * values["select_warps"]),
        )
    elif "groups" in values:
        tiles = [values["groups"] * values["members"] * values["channels"]]
    else:
        rows, columns = ("tokens", "channels") if "tokens" in values else ("rows", "columns")
        tiles = [values[rows] * values[columns]]
    return max(tiles) // (32 * values["num_warps"])
