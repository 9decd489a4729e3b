"""From configurations to modules: the student, the teacher, the objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from timm.models import load_state_dict

from dtm_triton.train.config import DataConfig, PretrainConfig, StudentConfig
from dtm_triton.train.conv_teacher import train_conv_teacher
from dtm_triton.train.data.draws import fold
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.models.attention import check_attends
from dtm_triton.train.models.autoencoder import MaskedAutoencoder
from dtm_triton.train.models.encoder import Encoder
from dtm_triton.train.models.student import CodeStudent, MaskedStudent, ProjectedStudent
from dtm_triton.train.models.targets import ConvTargets, HogTargets, PixelTargets
from dtm_triton.train.models.teacher import NoWeightsError, build_teacher
from dtm_triton.train.objectives.beit_v2 import BeitV2
from dtm_triton.train.objectives.byol import Byol
from dtm_triton.train.objectives.pretraining import Pretraining
from dtm_triton.train.objectives.tokens import TokenObjective

STUDENT_STD = 0.02  # what an Encoder starts from

Network = TypeVar("Network", bound=Encoder)


def build_objective(config: PretrainConfig, processes: Processes) -> TokenObjective:
    """What a pre-training run trains: teacher, network and objective, everything drawn from the run's seed.

    Raises FolderError for weights that are missing or do not fit, naming the field, and as `Trainer` does.
    """
    return assemble(config, build_targets(config, processes))


def assemble(config: PretrainConfig, teacher: Any) -> TokenObjective:
    """The objective on a teacher, images in 0..1 -> [B, N, out_features] with that attribute; None for "ema"."""
    objective = _assemble(config, teacher)
    if config.mask.thrown and objective.network.keep is None:
        raise FolderError(
            f"mask.thrown must be 0 for student.model {config.student.model!r}, which cannot leave patches (a "
            f"VisionTransformer, Eva or Beit can), got {config.mask.thrown}"
        )
    if config.mask.kind == "attention":
        try:
            check_attends(objective.attended)
        except ValueError as error:
            raise FolderError(f"attention.source {config.attention.source!r} gives no maps: {error}") from error
    return objective


def _assemble(config: PretrainConfig, teacher: Any) -> TokenObjective:
    torch.manual_seed(fold(config.run.seed, "weights"))
    student, data, width = config.student, config.data, getattr(teacher, "out_features", None)
    if config.method == "beit_v2":
        coder = build_network(CodeStudent, student, data, out_features=config.codebook.codes)
        return BeitV2(coder, teacher, config, teacher.out_features)
    if config.method == "byol":
        heads = config.projector
        return Byol(
            build_network(ProjectedStudent, student, data, hidden=heads.hidden, out_features=heads.features), config
        )
    if config.method == "mae":
        decoder = dict(width=config.decoder.width, depth=config.decoder.depth, heads=config.decoder.heads)
        network = build_network(MaskedAutoencoder, student, data, out_features=width, **decoder)
        return Pretraining(network, teacher, config)
    masked_student = build_network(MaskedStudent, student, data, out_features=width)
    depth = masked_student.num_blocks
    if teacher is None and config.ema.blocks > depth:
        raise FolderError(f"ema.blocks must be at most the student's {depth}, got {config.ema.blocks}")
    return Pretraining(masked_student, teacher, config)


def build_student(config: StudentConfig, data: DataConfig, out_features: int) -> MaskedStudent:
    """The student with a linear head, as `build_network`."""
    return build_network(MaskedStudent, config, data, out_features=out_features)


def build_network(kind: type[Network], config: StudentConfig, data: DataConfig, **head: Any) -> Network:
    """A network with random weights, or with those of `config.weights` in its backbone.

    Raises FolderError for a model that cannot be built and for weights that do not fit, FileNotFoundError for none.
    """
    with _named("student"):
        network = kind(
            config.model,
            image_size=data.image_size,
            patch_size=config.patch_size,
            in_chans=data.channels,
            positions=config.positions,
            drop_path=config.drop_path,
            model_kwargs=config.model_kwargs,
            **head,
        )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # what starts truncated-normal: tables of zeros stay, and so do fixed positions
            if parameter.requires_grad and (parameter.ndim > 1 or name.endswith("_token")):
                parameter.mul_(config.init_std / STUDENT_STD)
    if config.weights is not None:
        path = config.weights / "model.safetensors" if config.weights.is_dir() else config.weights
        if not path.is_file():
            raise FileNotFoundError(f"student.weights {str(path)!r} does not exist; pre-train first, or give None")
        try:
            state = load_state_dict(str(path), device="cpu", weights_only=True)
        except Exception as error:  # torch's, pickle's and safetensors' own kinds
            raise FolderError(
                _line(f"student.weights {str(path)!r} cannot be read as tensors only: {error}")
            ) from error
        try:
            network.load_backbone_state_dict(state)
        except ValueError as misfit:
            raise FolderError(_line(f"student.weights {str(path)!r} do not fit: {misfit}")) from misfit
    return network


def build_targets(config: PretrainConfig, processes: Processes) -> Any:
    """The frozen teacher: images in 0..1 -> [B, N, out_features]. Trains the "conv" one, or goes on training it.

    None for "ema": the objective averages its network. Raises FolderError naming the field of the teacher.
    """
    teacher, data, patch = config.teacher, config.data, config.student.patch_size
    if teacher.kind == "ema":
        return None
    if teacher.kind == "conv":
        return ConvTargets(train_conv_teacher(config, processes))
    if teacher.kind == "pixels":
        return PixelTargets(data.image_size, patch, data.mean, data.std, standardise=teacher.standardise)
    if teacher.kind == "hog":
        return HogTargets(data.image_size, patch, data.channels)
    height, width = data.image_size
    with _named("teacher"):
        return build_teacher(
            teacher.model,
            weights=teacher.weights,
            project=teacher.project,
            statistics=teacher.statistics,
            grid=(height // patch, width // patch),
            in_chans=data.channels,
            model_kwargs=teacher.model_kwargs,
        )


@contextmanager
def _named(section: str) -> Iterator[None]:
    """What a model or a file refuses, as a FolderError that names the field of the configuration."""
    try:
        yield
    except (ValueError, FileNotFoundError, NoWeightsError) as error:
        raise FolderError(_line(f"{section}.{error}")) from error


def _line(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())
