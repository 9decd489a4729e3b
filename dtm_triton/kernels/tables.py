"""Launch settings as data: one JSON file per GPU family under tuned/, looked up by op and shape bucket.

A table says for an op and a bucket which fields of the op's settings differ from the defaults in `settings`; a GPU
without a table, or a bucket that is not in it, takes the defaults. `dtm-tune` writes the tables, and finds out here
which settings a call asks for.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

FOLDER = Path(__file__).parent / "tuned"

Settings = TypeVar("Settings")

_listeners: list[dict[tuple[str, str], Any]] = []


@functools.cache
def family(device: torch.device) -> str:
    """The GPU family whose table holds for `device`, such as "sm_90" or "gfx942"; "cpu" where there is no GPU.

    >>> family(torch.device("cpu"))
    'cpu'
    """
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def table(name: str) -> dict[str, Any]:
    """What tuned/`name`.json holds: {"source": ..., "settings": {op: {bucket: {field: value}}}}.

    >>> table("no such GPU")["settings"]
    {}
    """
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"settings": {}}


def tuned(default: Settings, op: str, bucket: str, name: str) -> Settings:
    """`default` with the fields that the table of family `name` has for `op` and `bucket`.

    >>> from dtm_triton.kernels.settings import CountSettings
    >>> tuned(CountSettings(), "count", "any", "no such GPU") == CountSettings()
    True
    """
    for listener in _listeners:
        listener[op, bucket] = default
    found = table(name)["settings"].get(op, {}).get(bucket)
    return replace(default, **found) if found else default  # type: ignore[type-var]


@contextmanager
def trial(name: str, op: str, bucket: str, fields: dict[str, Any]) -> Iterator[None]:
    """Within the block, family `name` takes `fields` for `op` and `bucket`: how the tuner tries a candidate.

    >>> from dtm_triton.kernels.settings import CountSettings
    >>> with trial("no such GPU", "count", "any", {"rows": 8}):
    ...     tuned(CountSettings(), "count", "any", "no such GPU").rows
    8
    """
    buckets = table(name)["settings"].setdefault(op, {})
    before = buckets.get(bucket)
    buckets[bucket] = fields
    try:
        yield
    finally:
        if before is None:
            del buckets[bucket]
        else:
            buckets[bucket] = before


@contextmanager
def asked() -> Iterator[dict[tuple[str, str], Any]]:
    """Gathers what the calls within the block ask settings for: (op, bucket) -> the default settings.

    >>> from dtm_triton.kernels.settings import count_settings
    >>> with asked() as found:
    ...     _ = count_settings("cpu")
    >>> list(found)
    [('count', 'any')]
    """
    found: dict[tuple[str, str], Any] = {}
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners[:] = [listener for listener in _listeners if listener is not found]
