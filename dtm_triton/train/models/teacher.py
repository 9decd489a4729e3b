"""Teachers: frozen networks whose patch tokens are the student's targets.

`build_teacher` makes one of any timm Vision Transformer; `ConvTeacher` is a small convolutional network that is trained
on the spot, for the demo. Shapes: images [B, C, H, W], targets [B, N, C'] with N = h * w tokens of the student's grid.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from dtm_triton.train.models.attention import Statistic, attention_map, tokens_and_attention

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


class NoWeightsError(RuntimeError):
    """No weights given, none in the hub cache, and none to be had from the network."""


class Teacher(nn.Module):
    """A frozen timm ViT that turns images into normed patch tokens. Made by `build_teacher`.

    Images come as floats in 0..1, are resized to the model's input (bicubic, antialiased, clamped to 0..1) where they
    differ in size, and normalised with the given mean and deviation. The module stays in eval mode and gives no
    gradients, whatever is called on it.

    Attributes: grid (height, width) of the tokens; out_features, their width.
    """

    model: Any  # a timm model: what it offers is checked when it is built
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: tuple[float, ...], std: tuple[float, ...], project: bool) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.project = project
        height, width = model.patch_embed.grid_size
        self.grid: tuple[int, int] = (int(height), int(width))
        self.image_size: tuple[int, int] = tuple(model.patch_embed.img_size)
        self.out_features: int = model.head.out_features if project else model.embed_dim
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher never leaves eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Targets [B, N, out_features] for images [B, C, H, W], floats in 0..1; grey ones are repeated."""
        return self._targets(self.model.forward_features(self._prepared(images)))

    @torch.no_grad()
    def attention(self, images: Tensor, statistic: Statistic = "class_row") -> Tensor:
        """How much the last block attends to every patch [B, N] of images as for forward: see `attention_map`."""
        return attention_map(self.model, self._prepared(images), statistic)

    @torch.no_grad()
    def targets_and_attention(self, images: Tensor, statistic: Statistic = "class_row") -> tuple[Tensor, Tensor]:
        """What forward and `attention` give, in one pass."""
        tokens, maps = tokens_and_attention(self.model, self._prepared(images), statistic)
        return self._targets(tokens), maps

    def _targets(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, self.model.num_prefix_tokens :]
        # a model pooled by mean keeps its final norm behind the pooling; else this is the identity
        tokens = self.model.fc_norm(tokens)
        return self.model.head(tokens) if self.project else tokens

    def _prepared(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise TypeError(f"images must be floats in 0..1, got {images.dtype}")
        channels = self.mean.shape[1]
        if images.shape[1] not in (1, channels):
            raise ValueError(f"images must have {channels} channels or one, got {list(images.shape)}")
        images = images.expand(-1, channels, -1, -1)
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self.mean) / self.std


def build_teacher(
    model: str,
    *,
    weights: Path | str | None = None,
    project: bool = False,
    statistics: str = "own",
    grid: tuple[int, int] | None = None,
    in_chans: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Teacher:
    """A frozen teacher from any timm ViT by name.

    Args:
        model: timm name with or without tag, for DTM "vit_base_patch16_clip_quickgelu_224.openai".
        weights: a file (.safetensors, or .pth/.pt/.bin read as tensors only), or a folder holding exactly one, or
            timm's "model.safetensors". timm's own and the publishers' layouts (OpenAI CLIP, DINOv2, BEiT) are
            understood, every parameter must be there. None: timm's hub cache, and the network for what is not in it.
        project: apply the model's head to every token: CLIP's 768 -> 512. Otherwise the tokens keep the model's width.
        statistics: "own", the mean and deviation the model was trained with, or "imagenet" (DTM's program).
        grid: the student's (height, width) in patches. The model's input becomes grid * its patch size (position tables
            are resampled) and images are resized to that. None: the model's own input size.
        in_chans: channels of the images to come: those of the model, or 1, which is repeated. None: not checked.
        model_kwargs: further timm arguments.

    Raises:
        ValueError: an unknown model, one for other channels or one that is not a plain ViT, no head to project with,
            an unknown `statistics`, an empty or ambiguous folder, a file of another kind, weights that do not fit.
        FileNotFoundError: `weights` does not exist.
        NoWeightsError: no weights given, none in the cache, and no network.

    Source: DTM (arXiv 2401.00254): final norm on all tokens, class token dropped, projected per token.

    >>> import tempfile, safetensors.torch
    >>> small = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32, "num_classes": 8}
    >>> path = Path(tempfile.mkdtemp(), "teacher.safetensors")
    >>> state = timm.create_model("vit_base_patch16_clip_quickgelu_224", **small).state_dict()
    >>> safetensors.torch.save_file(state, path)
    >>> teacher = build_teacher("vit_base_patch16_clip_quickgelu_224", weights=path, project=True, grid=(3, 2),
    ...                         model_kwargs=small)
    >>> teacher(torch.rand(2, 3, 48, 32)).shape
    torch.Size([2, 6, 8])
    """
    if not timm.is_model(model):
        near = difflib.get_close_matches(model.split(".")[0], timm.list_models(), n=3)
        raise ValueError(f"model must be the name of a timm model, got {model!r}; near it: {near}")
    if statistics not in ("own", "imagenet"):
        raise ValueError(f"statistics must be 'own' or 'imagenet', got {statistics!r}")
    kwargs = dict(model_kwargs or {})
    network = _from_hub(model, kwargs) if weights is None else _from_file(model, Path(weights), kwargs)
    missing = [n for n in ("patch_embed", "num_prefix_tokens", "fc_norm", "head") if not hasattr(network, n)]
    if missing:
        raise ValueError(f"model must be a plain Vision Transformer, got {model!r} without {', '.join(missing)}")
    if project and not isinstance(network.head, nn.Linear):
        raise ValueError(f"project must be False, {model!r} has no linear head; got {project!r}")
    if grid is not None and tuple(grid) != tuple(network.patch_embed.grid_size):
        sizes = tuple(side * patch for side, patch in zip(grid, network.patch_embed.patch_size, strict=True))
        network.set_input_size(img_size=sizes)
    if not project:
        network.reset_classifier(0)
    config = network.pretrained_cfg
    own = statistics == "own"
    mean, std = (config["mean"], config["std"]) if own else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    channels = network.patch_embed.proj.in_channels
    if len(mean) != channels:
        raise ValueError(f"statistics {statistics!r} are those of {len(mean)} channels, {model!r} takes {channels}")
    if in_chans not in (None, 1, channels):
        raise ValueError(f"model must take images of {in_chans} channels, {model!r} takes {channels}")
    return Teacher(network, tuple(mean), tuple(std), project)


def _from_hub(model: str, kwargs: dict[str, Any]) -> Any:
    try:
        return timm.create_model(model, pretrained=True, **kwargs)
    except TypeError as refusal:
        raise ValueError(f"model_kwargs must be arguments of {model!r}, got {kwargs}: {refusal}") from refusal
    except Exception as error:  # the hub client's errors share no base class
        raise NoWeightsError(
            f"weights of model {model!r} are neither in the hub cache nor to be had from the network ({error}); "
            "give a local file or folder"
        ) from error


def _from_file(model: str, path: Path, kwargs: dict[str, Any]) -> Any:
    file = _weight_file(path)
    try:
        state = load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:  # torch's, pickle's and safetensors' own kinds
        raise ValueError(f"weights {str(file)!r} cannot be read as tensors only: {error}") from error
    # the file decides whether there is a head, and how wide: then timm loads all of it strictly, and leaves out nothing
    if "visual.proj" in state:
        classes = state["visual.proj"].shape[1]
    else:
        classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    overlay = {"state_dict": state, "num_classes": classes, "label_offset": 0}
    try:
        network: Any = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay, **{**kwargs, "num_classes": classes}
        )
    except TypeError as refusal:
        raise ValueError(f"model_kwargs must be arguments of {model!r}, got {kwargs}: {refusal}") from refusal
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"weights {str(file)!r} do not fit model {model!r}: {error}") from error
    network.pretrained_cfg["state_dict"] = None  # timm keeps a reference to every tensor otherwise
    return network


def _weight_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_FILES)
        named = [file for file in files if file.name == "model.safetensors"]
        if len(named or files) != 1:
            names = [file.name for file in files]
            raise ValueError(f"weights must be a folder with one file {WEIGHT_FILES}, {str(path)!r} holds {names}")
        return (named or files)[0]
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(path)!r} is neither a file nor a folder")
    if path.suffix not in WEIGHT_FILES:
        raise ValueError(f"weights must be a file of kind {WEIGHT_FILES}, got {str(path)!r}")
    return path


class ConvTeacher(nn.Module):
    """A small convolutional classifier whose last feature map serves as a teacher.

    Two convolutions at full resolution, one that cuts the image into patches, two more over the grid of patches; the
    classifier reads their mean, so the features of the last one keep their place.

    Args:
        image_size: pixels, one number or (height, width), multiples of `patch_size`.
        patch_size: pixels a side; the student's.
        in_chans: image channels.
        num_classes: classes of the supervised task.
        out_features: channels of the last stage, the width of the targets.

    Raises ValueError for an image size that is no multiple of the patch size.

    >>> teacher = ConvTeacher(image_size=12, patch_size=2, in_chans=1, num_classes=10, out_features=64)
    >>> images = torch.rand(4, 1, 12, 12)
    >>> teacher(images).shape, teacher.tokens(images).shape, teacher.grid
    (torch.Size([4, 10]), torch.Size([4, 36, 64]), (6, 6))
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        *,
        in_chans: int = 1,
        num_classes: int = 10,
        out_features: int = 64,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"image_size must be positive multiples of patch_size {patch_size!r}, got {image_size!r}")
        self.grid = (height // patch_size, width // patch_size)
        self.out_features = out_features
        half = max(out_features // 2, 1)
        self.stages = nn.Sequential(
            _convolution(in_chans, half, 3),
            _convolution(half, half, 3),
            _convolution(half, out_features, patch_size, stride=patch_size),
            _convolution(out_features, out_features, 3),
            _convolution(out_features, out_features, 3),
        )
        self.head = nn.Linear(out_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] for images [B, in_chans, height, width]."""
        return self.head(self.stages(images).mean((2, 3)))

    def tokens(self, images: Tensor) -> Tensor:
        """Features of the last stage [B, N, out_features], in raster order of the grid."""
        return self.stages(images).flatten(2).transpose(1, 2)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    padding = kernel // 2 if stride == 1 else 0
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.GELU())
