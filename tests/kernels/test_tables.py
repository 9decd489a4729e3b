"""Launch settings as data: defaults, what tables change, and that asking for them needs no device."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dtm_triton.kernels
from dtm_triton.kernels import settings, tables
from dtm_triton.kernels.settings import CountSettings, GatherSettings
from dtm_triton.kernels.tables import asked, family, table, trial, tuned

SHIPPED = sorted(tables.FOLDER.glob("*.json"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables in the place of the shipped one."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    table.cache_clear()
    yield tmp_path  # type: ignore[misc]
    table.cache_clear()


def test_a_table_overrides_its_bucket_only(folder: Path) -> None:
    content = {"source": "a test", "settings": {"gather": {"c64": {"tokens": 8, "num_warps": 2}}}}
    (folder / "sm_90.json").write_text(json.dumps(content))
    default = settings.gather_settings(64, "other GPU")
    assert settings.gather_settings(64, "sm_90") == replace(default, tokens=8, num_warps=2)
    assert settings.gather_settings(128, "sm_90") == settings.gather_settings(128, "other GPU")
    assert settings.count_settings("sm_90") == CountSettings()


def test_a_table_with_an_unknown_field_is_an_error(folder: Path) -> None:
    (folder / "sm_90.json").write_text(json.dumps({"settings": {"count": {"any": {"columms": 8}}}}))
    with pytest.raises(TypeError, match="columms"):
        settings.count_settings("sm_90")


@pytest.mark.usefixtures("folder")
def test_an_unknown_gpu_takes_the_defaults() -> None:
    assert table("sm_777") == {"settings": {}}
    for default in (CountSettings(), GatherSettings()):
        assert tuned(default, "count", "any", "sm_777") is default
    assert settings.match_settings(196, torch.bfloat16, 256, "sm_777").slots == 256


@pytest.mark.usefixtures("folder")
def test_a_trial_is_over_when_its_block_is() -> None:
    def rows() -> int:
        return settings.count_settings("sm_90").rows

    with trial("sm_90", "count", "any", {"rows": 8}):
        assert rows() == 8
        with trial("sm_90", "count", "any", {"rows": 16}):
            assert rows() == 16
        with trial("sm_90", "count", "any", {}):
            assert rows() == 32
        assert rows() == 8
    with pytest.raises(KeyError, match="broken"), trial("sm_90", "count", "any", {"rows": 8}):
        raise KeyError("broken")
    assert rows() == 32
    assert not table("sm_90")["settings"].get("count")


def test_what_is_asked_for_is_heard_inside_the_block_only() -> None:
    with asked() as outer:
        with asked() as inner:
            settings.count_settings("any")
        settings.gather_settings(512, "any")
    settings.row_loss_settings(512, "any")
    assert inner == {("count", "any"): CountSettings()}
    assert outer.keys() == {("count", "any"), ("gather", "c128")}


def test_the_defaults_are_heard_not_what_the_table_says() -> None:
    with trial("sm_90", "count", "any", {"rows": 8}), asked() as found:
        assert settings.count_settings("sm_90").rows == 8
    assert found["count", "any"] == CountSettings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        settings.count_settings("any").rows = 8  # type: ignore[misc]


def test_a_cpu_has_a_family() -> None:
    assert family(torch.device("cpu")) == "cpu"


def kinds() -> dict[str, Any]:
    """The settings classes of the kernels, by the ops that tables may name."""
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(dtm_triton.kernels.__path__):
        if module.name.endswith("settings"):
            loaded = importlib.import_module(f"dtm_triton.kernels.{module.name}")
            found |= {name: kind for name, kind in vars(loaded).items() if is_dataclass(kind)}
    ops = {"match": "Match", "groups": "Group", "gather": "Gather", "count": "Count", "stream": "Stream"}
    named = {op: found[f"{name}Settings"] for op, name in ops.items() if f"{name}Settings" in found}
    return named | dict.fromkeys(("loss", "row_loss"), found["GroupSettings"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_name_what_exists(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["source"] and content["family"] == path.stem
    for op, buckets in content["settings"].items():
        names = {field.name for field in fields(kinds()[op])} - {"slots"}
        for bucket, changed in buckets.items():
            assert changed and changed.keys() <= names, (op, bucket)
            for name, value in changed.items():
                assert type(value) in (int, bool), (op, bucket, name)
                free = name in ("max_registers", "num_stages", "gram_stages", "max_programs", "programs")
                assert free or isinstance(value, bool) or (value > 0 and value & (value - 1) == 0), (op, bucket, name)


def test_settings_ask_the_device_nothing() -> None:
    """Neither importing them nor looking them up initialises CUDA or needs Triton."""
    code = """
import sys, torch
def refuse(*_, **__): raise AssertionError("asked the device")
for name in ("is_available", "device_count", "get_device_capability", "get_device_properties", "current_device"):
    setattr(torch.cuda, name, refuse)
torch.cuda._lazy_init = refuse
sys.modules["triton"] = None
from dtm_triton.kernels import settings, tables
settings.match_settings(196, torch.bfloat16, 256, "sm_90")
settings.loss_settings(512, 128, "gfx942")
assert tables.family(torch.device("cpu")) == "cpu"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
