"""The options that the pages tell people to type exist, with a value where they take one; what they link to exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dtm_triton.train import recipes
from dtm_triton.train.config import to_json

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTION = re.compile(r"--((?:run|loss|data|teacher|student|mask|optimizer|ema)\.[a-z.-]+)((?: (?!-)[A-Za-z0-9./_]+)?)")
CONFIG: dict[str, Any] = json.loads(to_json(recipes.PRETRAIN["dtm_vit_base_patch16_in1k"]()))


def options(page: Path) -> list[tuple[str, str]]:
    """Every option on a page, as code or in an indented line, with the word that follows it."""
    code = re.findall(r"`([^`\n]*)`|^    (.*)$", page.read_text(), re.MULTILINE)
    return [match for quoted in code for match in OPTION.findall("".join(quoted).partition("  #")[0])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    for option, value in options(page):
        section, _, name = option.partition(".")
        field = name.removeprefix("no-").replace("-", "_")
        assert field in CONFIG[section], f"--{option}"
        switch = isinstance(CONFIG[section][field], bool)
        assert switch or not name.startswith("no-"), f"--{option}"
        assert not (switch and value), f"--{option}{value}: a switch takes no value"


def test_the_pages_have_options() -> None:
    assert len(options(ROOT / "docs" / "training.md")) > 10 and len(options(ROOT / "README.md")) > 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)h#][^)#]*)\)", page.read_text()):
        assert (page.parent / target).exists(), target
