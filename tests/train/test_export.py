"""The export loads with timm alone, strictly, and gives the same outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dtm_triton import __version__
from dtm_triton.train.models.export import export_student, load_exported
from dtm_triton.train.models.student import MaskedStudent

FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", {}),
    "beit": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}),
    "beit-tables": ("beit_base_patch16_224", {"use_abs_pos_emb": True}),
    "eva": ("eva02_tiny_patch14_224", {}),
}

# what a stranger would write, in a process of its own
PLAIN_TIMM = """
import json, sys
from pathlib import Path
import timm, torch
from safetensors.torch import load_file
for name in sys.argv[2:]:
    base = Path(sys.argv[1], name)
    config = json.loads(base.with_suffix(".json").read_text())
    model = timm.create_model(config["architecture"], **config["model_args"]).eval()
    model.load_state_dict(load_file(base.with_suffix(".safetensors")), strict=True)
    images = torch.load(base.with_suffix(".images"))
    folder = timm.create_model(f"local-dir:{base}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(images), folder(images)), name
        torch.save(model(images), base.with_suffix(".outputs"))
assert "dtm_triton" not in sys.modules
"""


def build(family: str, drop_path: float = 0.1) -> MaskedStudent:
    name, kwargs = FAMILIES[family]
    torch.manual_seed(0)
    student = MaskedStudent(
        name,
        out_features=5,
        image_size=(12, 8),
        patch_size=2,
        drop_path=drop_path,
        model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3, **kwargs},
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student.eval()


def test_plain_timm_loads_what_was_exported(tmp_path):
    images = torch.rand(2, 3, 12, 8)
    for family in FAMILIES:
        student = build(family)
        assert export_student(student, tmp_path / f"{family}.safetensors") == tmp_path / f"{family}.safetensors"
        assert export_student(student, tmp_path / family) == tmp_path / family / "model.safetensors"
        torch.save(images, tmp_path / f"{family}.images")
    command = [sys.executable, "-c", PLAIN_TIMM, str(tmp_path), *FAMILIES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for family in FAMILIES:
        student = build(family)
        outputs = torch.load(tmp_path / f"{family}.outputs")
        assert torch.allclose(outputs[:, -24:], student.tokens(images), atol=1e-6), family
        assert outputs.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_load_exported(tmp_path, family):
    student, images = build(family), torch.rand(2, 3, 12, 8)
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        model = load_exported(export_student(student, path) if path.suffix else export_student(student, path).parent)
        assert not model.training
        assert torch.equal(model(images), student.backbone.forward_features(images))


def test_description(tmp_path):
    export_student(
        build("clip"), tmp_path / "out", {"recipe": "demo", "epochs": 3}, mean=(0.1, 0.2, 0.3), std=[1, 2, 3]
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "vit_base_patch16_clip_quickgelu_224" and config["num_classes"] == 0
    assert config["training"] == {"dtm_triton": __version__, "recipe": "demo", "epochs": 3}
    settings = config["pretrained_cfg"]
    assert settings["mean"] == [0.1, 0.2, 0.3] and settings["std"] == [1, 2, 3]
    assert settings["input_size"] == [3, 12, 8] and "drop_path_rate" not in config["model_args"]
    assert not any(name in json.dumps(config) for name in ("hf_hub_id", "url"))
    export_student(build("clip"), tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["pretrained_cfg"]["mean"][0] == 0.48145466


def test_a_second_export_replaces_the_first(tmp_path):
    student = build("vit")
    export_student(student, tmp_path, {"epoch": 1})
    with torch.no_grad():
        student.backbone.norm.weight.fill_(7)
    export_student(student, tmp_path, {"epoch": 2})
    assert (load_exported(tmp_path).norm.weight == 7).all()
    assert json.loads((tmp_path / "config.json").read_text())["training"]["epoch"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.replace

    def flushed(file):
        fsync(file)
        events.append(("flushed", os.readlink(f"/proc/self/fd/{file}")))

    def renamed(source, target):
        rename(source, target)
        events.append(("renamed", str(source)))

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    export_student(build("vit"), tmp_path)
    named = [path for kind, path in events if kind == "renamed"]
    assert len(named) == 2
    for path in named:
        assert events.index(("flushed", path)) < events.index(("renamed", path))
    assert events[-1] == ("flushed", str(tmp_path)), "the names too"


def test_bad_input_writes_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        export_student(build("vit"), tmp_path / "new", {"norm": torch.nn.LayerNorm})
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match=r"new/model\.safetensors"):
        load_exported(tmp_path / "new")
