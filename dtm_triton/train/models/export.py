"""The pre-trained student as plain timm weights: usable without this package.

A folder in timm's own layout (`model.safetensors`, `config.json`), or `NAME.safetensors` with `NAME.json` beside it.
The JSON holds the arguments of `timm.create_model` and whatever was noted about the training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file, save
from torch import nn

from dtm_triton import __version__
from dtm_triton.train.engine.checkpoint import write_atomically, write_text
from dtm_triton.train.models.encoder import Encoder

# of timm's description of its own weights, what stays true of ours
KEPT_SETTINGS = ("mean", "std", "interpolation", "first_conv", "classifier", "fixed_input_size")


def export_student(
    student: Encoder,
    path: Path | str,
    metadata: Mapping[str, Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Write the student's backbone (no mask token, no head) so that timm loads it strictly.

    `json["architecture"]` and `json["model_args"]` are the arguments: `timm.create_model(architecture, **model_args)`
    then `load_state_dict(safetensors)`. A folder loads by `timm.create_model("local-dir:FOLDER", pretrained=True)` too.
    The exported model has no classifier and no pooling: its output is the normed tokens, prefix tokens first.

    Args:
        student: any network that was pre-trained, on any device.
        path: NAME.safetensors, or a folder; what is missing of it is created, what is there is replaced atomically.
        metadata: anything JSON can hold, kept under "training" beside this package's version.
        mean, std: the normalisation the student was trained with, one value a channel; by default timm's for the model.

    Returns:
        the path of the weights.

    Raises:
        TypeError: metadata or model arguments that JSON cannot hold.

    >>> import tempfile
    >>> from dtm_triton.train.models.student import MaskedStudent
    >>> student = MaskedStudent("vit_tiny_patch16_224", out_features=8, image_size=12, patch_size=2,
    ...                         model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    >>> folder = Path(tempfile.mkdtemp())
    >>> export_student(student, folder, {"epochs": 60}).name
    'model.safetensors'
    >>> model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    >>> model.embed_dim, load_exported(folder).embed_dim
    (24, 24)
    """
    weights, description = _paths(Path(path))
    settings: dict[str, Any] = {key: student.backbone.pretrained_cfg.get(key) for key in KEPT_SETTINGS}
    settings.update({key: list(value) for key, value in (("mean", mean), ("std", std)) if value is not None})
    arguments = student.create_kwargs
    settings["input_size"] = [arguments["in_chans"], *arguments["img_size"]]
    config = {
        "architecture": student.model_name.split(".")[0],
        "num_classes": 0,
        "num_features": student.backbone.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": settings,
        "training": {"dtm_triton": __version__, **(metadata or {})},
    }
    text = json.dumps(config, indent=2)  # before anything is written
    state = {name: value.detach().cpu().contiguous() for name, value in student.backbone_state_dict().items()}
    write_atomically(weights, lambda file: file.write(save(state, metadata={"format": "pt"})))
    write_text(description, text)
    return weights


def load_exported(path: Path | str) -> nn.Module:
    """The plain timm model that `export_student` wrote, weights loaded strictly, in eval mode.

    Raises FileNotFoundError when the weights or the JSON beside them are missing.

    >>> import tempfile
    >>> from dtm_triton.train.models.student import MaskedStudent
    >>> student = MaskedStudent("vit_tiny_patch16_224", out_features=8, image_size=12, patch_size=2,
    ...                         model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    >>> model = load_exported(export_student(student, Path(tempfile.mkdtemp(), "student.safetensors")))
    >>> model.embed_dim, model.patch_embed.grid_size
    (24, (6, 6))
    """
    weights, description = _paths(Path(path))
    for file in (weights, description):
        if not file.is_file():
            raise FileNotFoundError(f"path must be what export_student wrote, {str(file)!r} does not exist")
    config = json.loads(description.read_text())
    model = timm.create_model(config["architecture"], **config["model_args"])
    model.load_state_dict(load_file(weights), strict=True)
    return model.eval()


def exported_input(path: Path | str) -> dict[str, Any]:
    """What the exported model takes: "input_size" [C, H, W], "mean" and "std" of a channel each."""
    settings = json.loads(_paths(Path(path))[1].read_text())["pretrained_cfg"]
    return {name: list(settings[name]) for name in ("input_size", "mean", "std")}


def _paths(path: Path) -> tuple[Path, Path]:
    if path.suffix == ".safetensors":
        return path, path.with_suffix(".json")
    return path / "model.safetensors", path / "config.json"
