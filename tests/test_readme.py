"""The README's examples run as they stand, one after the other, and what it points to exists."""

from __future__ import annotations

import re
from pathlib import Path

import dtm_triton.morph

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run() -> None:
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)
    assert names["merged"].shape == (8, 98, 768)  # type: ignore[attr-defined]
    assert names["outputs"].grad is not None  # type: ignore[attr-defined]
    assert names["groups"].size.shape == (8, 196) and names["groups"].count.shape == (8,)  # type: ignore[attr-defined]
    assert names["schedules"].shape == (2, 14) and names["value"] > 0  # type: ignore[attr-defined,operator]


def test_what_it_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target


def test_the_names_it_lists_exist() -> None:
    for name in dtm_triton.morph.__all__:
        assert f"`{name}`" in README or f"`{name}(" in README, name
