"""docs/amt.md says what the code, the recipes and the study's record say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dtm_triton.train import recipes
from dtm_triton.train.config import AttentionConfig, MaskConfig
from dtm_triton.train.planning.budget import token_budget
from dtm_triton.train.study import design, page


def test_the_page_holds_what_the_record_says() -> None:
    text = page.PAGE.read_text()
    assert page.rendered(text, page.read_record()) == text


def test_the_page_counts_tokens_as_the_budget_does() -> None:
    """The table of recipes; FLOPs are against the row of the recipe without AMT."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.PAGE.read_text(), re.M)
    assert len(rows) == 6
    base = 0.0
    for name, cells in rows:
        config = recipes.PRETRAIN[name]()
        budget, mask = token_budget(config), config.mask
        base = base if "amt" in name else budget.flops
        counts = [mask.masked, mask.thrown, 196 - mask.masked - mask.thrown, budget.encoder_tokens]
        decoder = str(budget.decoder_tokens or "")
        wanted = [*map(str, counts), decoder, f"{budget.flops / base:.2f}".replace("1.00", "1")]
        assert [cell.strip() for cell in cells.split("|")] == wanted, name


def test_the_pages_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", page.PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert [part.shape for part in names["parts"]] == [(8, 88), (8, 78), (8, 30)]


def test_the_page_lists_every_option_of_attention_with_its_default() -> None:

    text = page.PAGE.read_text()
    for config in (AttentionConfig(), MaskConfig(kind="random", masked=1)):
        section = type(config).__name__.removesuffix("Config").lower()
        for field in dataclasses.fields(config):
            option = f"--{section}.{field.name.replace('_', '-')}"
            if field.name in ("kind", "min_patches"):  # of other kinds of masks
                continue
            (line,) = [line for line in text.splitlines() if line.startswith("| `--") and option in line.split("|")[1]]
            default = getattr(config, field.name)
            shown = " ".join(default) if isinstance(default, tuple) else str(default).removesuffix(".0")
            assert field.name in ("masked", "thrown") or shown in line, option


def test_the_record_is_whole() -> None:
    runs = page.read_record()["runs"]
    assert [(item["arm"], item["seed"]) for item in runs] == [
        (name, seed) for name in design.ARMS for seed in range(design.SEEDS)
    ]
    for item in runs:
        assert 0 <= item["knn"] <= 1 and 0 <= item["linear_probe"] <= 1
        assert (item["loss"] is None) == ("untrained" in item["arm"])


def test_the_pages_pictures_are_there_and_small() -> None:
    files = [page.FOLDER / name for name in (*page.CHOSEN, "differences.png")]
    assert sum(path.stat().st_size for path in files) < 600_000
    for path in files:
        assert f"](study/{path.name})" in page.PAGE.read_text(), path.name


def test_a_page_is_made_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "FOLDER", tmp_path / "study")
    monkeypatch.setattr(page, "PAGE", tmp_path / "amt.md")
    page.PAGE.write_text(f"# AMT\n\n{page.BEGIN}\nold\n{page.END}\n\nrest\n")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 6), (200, 100, 50)).save(tmp_path / "pictures" / "a.png")
    record = {
        "machine": {"device": "CPU", "torch": "2", "date": "today"},
        "runs": [{"arm": arm, "seed": 0, "linear_probe": 0.5, "knn": 0.4, "seconds": 1.0} for arm in ("mae", "amt")],
    }
    page.write_page(record, tmp_path / "pictures", ["a.png"])
    assert page.read_record(page.FOLDER) == record
    text = page.PAGE.read_text()
    assert text.startswith("# AMT\n\n") and text.endswith("\n\nrest\n") and "old" not in text
    assert "2 runs, 0 core-minutes; CPU, torch 2, today." in text
    with Image.open(page.FOLDER / "a.png") as copied:
        assert copied.convert("RGB").getpixel((3, 3)) == (200, 100, 50)
    assert (page.FOLDER / "differences.png").exists()
