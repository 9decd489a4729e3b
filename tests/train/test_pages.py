"""The commands of README, docs and examples, as typed: what they name fits together, and they run in order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from shrunk import write_images

from dtm_triton.train import finetune, pretrain, probe, recipes
from dtm_triton.train.command_line import parse
from dtm_triton.train.config import DataConfig, PretrainConfig
from dtm_triton.train.data.images import open_images
from dtm_triton.train.demo import Demo

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "examples").glob("*.sh"))]
STARTS = {
    "train/pretrain.py": "dtm-pretrain",
    "docs/examples/torchrun.sh": "dtm-pretrain",
    "docs/examples/slurm.sh": "dtm-pretrain",
}
COMMANDS = {
    "dtm-pretrain": (pretrain.main, recipes.PRETRAIN, "demo"),
    "dtm-finetune": (finetune.main, recipes.FINETUNE, "finetune_demo"),
    "dtm-probe": (probe.main, recipes.PROBE, "probe_demo"),
}
SHORT = ["--run.epochs=1", "--run.batch-size=256", "--run.device=cpu", "--student.model-kwargs.depth=1"]
QUICK = {
    "dtm-pretrain": [*SHORT, "--teacher.epochs=1"],
    "dtm-finetune": SHORT,
    "dtm-probe": ["--device=cpu"],
}


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The training commands with options on a page, in its order: (dtm-..., options)."""
    text = re.sub(r"\\\n#? *", "", page.read_text())
    names = "|".join(map(re.escape, [*STARTS, *COMMANDS]))
    found = re.findall(rf"(?<![\w-])({names}) (--[^`\n]*)", text)
    return [(STARTS.get(name, name), shlex.split(words, comments=True)) for name, words in found]


def typed(page: Path) -> list[tuple[str, list[str]]]:
    """Those of `commands` that stand for no other: `NAME`, `RUN` and `...` are left to the reader."""
    return [(name, words) for name, words in commands(page) if not {"NAME", "..."} & set(words)]


def test_the_pages_have_commands() -> None:
    assert len(typed(ROOT / "README.md")) >= 5
    assert all(typed(ROOT / "docs" / "examples" / script) for script in ("slurm.sh", "torchrun.sh"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_names_both_folders_or_none(page: Path) -> None:
    """One folder of the reader's and one of the recipe's would not belong together, and the recipe's be missing."""
    for name, words in typed(page):
        _, table, default = COMMANDS[name]
        recipe = table[words[words.index("--recipe") + 1] if "--recipe" in words else default]()
        config = parse(table, default, name, words)
        if config.data.train_folder != recipe.data.train_folder:
            assert config.data.test_folder is None or config.data.test_folder != recipe.data.test_folder, words


def open_parts(data: DataConfig) -> list[int]:
    return [len(images.labels) for images in (open_images(data, part) for part in ("train", "test")) if images]


def test_the_readmes_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortened, in one folder, each after the one before; full-scale recipes only open what their command names."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "imagenet")
    ran = []
    for name, words in typed(ROOT / "README.md"):
        main, table, default = COMMANDS[name]
        config = parse(table, default, name, words)
        if isinstance(config, PretrainConfig) and config.data.source != "digits":
            counts = [] if "PATH/TO/IMAGES" in words else open_parts(config.data)
            assert counts == ([] if "PATH/TO/IMAGES" in words else [16, 6])
        else:
            main([*words, *QUICK[name]])
            ran.append(name)
    assert ran == ["dtm-pretrain", "dtm-finetune", "dtm-probe"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"demo", "finetune_demo"}


def test_the_demo_and_its_recipes_mean_the_same_folders() -> None:
    students, recipe = Demo().students(), {"dtm": recipes.demo(), "tokenwise": recipes.demo_tokenwise()}
    for name, config in recipe.items():
        assert pretrain.resolve(config) == pretrain.resolve(students[name])
    student = recipes.demo().run.folder / "student"
    assert recipes.finetune_demo().student.weights == recipes.probe_demo().weights == student


def test_the_recipes_page_has_every_recipe_and_no_other() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    cells = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| `")]
    named: set[str] = set()
    for name in re.findall("`([^`]+)`", " ".join(cells)):
        stem, *others = name.split("\\|")
        head = stem.rpartition("_")[0]
        if name.startswith("dtm_vit_small"):  # dtm_vit_small|base|large_patch16_in1k, and `..._released`, `..._paper`
            sizes = [f"dtm_vit_{size}_patch16_in1k" for size in ("small", "base", "large")]
            named |= {size + variant for size in sizes for variant in ("", "_released", "_paper")}
        elif not name.startswith("..."):
            named |= {stem, *(f"{head}_{other}" for other in others)}
    assert named == {*recipes.PRETRAIN, *recipes.FINETUNE}
