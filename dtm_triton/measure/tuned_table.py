"""The tables of launch settings as files: what tuning changes in one, and what it leaves.

{"family": "sm_90", "source": "measured", "device": ..., "torch": ..., "triton": ..., "date": ...,
"settings": {op: {bucket: {field: value}}}, "evidence": {op: {bucket: {what was measured or compiled}}}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dtm_triton.kernels.resources import to_json
from dtm_triton.measure.candidates import Fields

MEASURED = "measured"
RANKED = "ranked by compiled resources; not measured"

Entry = tuple[str, str, Fields, dict[str, Any]]
"""op, bucket, the fields that differ from the defaults, and the evidence."""


def read(path: Path) -> dict[str, Any]:
    """The table in `path`, or an empty one.

    >>> read(Path("no such table"))
    {'settings': {}}
    """
    return json.loads(path.read_text()) if path.exists() else {"settings": {}}


def merged(table: dict[str, Any], facts: dict[str, str], entries: list[Entry]) -> dict[str, Any]:
    """`table` with `entries` in the place of its own for those ops and buckets, and with the `facts` of this run.

    What was only ranked gives way to what is measured: of such a table nothing is kept. The other way round raises
    ValueError.

    >>> table = {"source": "measured", "settings": {"count": {"any": {"rows": 8}}}}
    >>> merged(table, {"source": "measured"}, [("gather", "c128", {"tokens": 8}, {"after_us": 9.0})])["settings"]
    {'count': {'any': {'rows': 8}}, 'gather': {'c128': {'tokens': 8}}}
    """
    if table.get("source") == MEASURED and facts["source"] == RANKED:
        raise ValueError("what was measured is not replaced by what is only ranked: write to another file")
    kept = table if table.get("source") == facts["source"] else {}
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    for part in ("settings", "evidence"):
        parts[part] = {op: dict(buckets) for op, buckets in kept.get(part, {}).items()}
    for op, bucket, fields, evidence in entries:
        for part, content in (("settings", fields), ("evidence", evidence)):
            parts[part].setdefault(op, {}).pop(bucket, None)
            if content:
                parts[part][op][bucket] = content
    return facts | {part: {op: buckets for op, buckets in found.items() if buckets} for part, found in parts.items()}


def write(path: Path, table: dict[str, Any]) -> None:
    """Write all at once, so that a run that is stopped leaves the old table or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(to_json(table))
    unfinished.replace(path)
