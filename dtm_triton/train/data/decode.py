"""From the bytes of a file to a crop: what the workers do most of their time.

JPEGs are decoded by libjpeg-turbo (simplejpeg), at a half, a quarter or an eighth of their size where the crop stays at
least as large as its target; everything else, and what simplejpeg refuses, by Pillow. Pillow is the judge of what is
corrupt: a file that it cannot decode to its end, such as one cut off. `.npy` files hold uint8 [H, W, C] for any C.

The crop is scaled by PyTorch's antialiased bicubic kernel for bytes: Pillow's filter, to a level of grey, in less than
half of its time. Orientation tags (EXIF) are not applied, as in torchvision's ImageFolder and so in the published runs.
"""

from __future__ import annotations

import io
import math
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dtm_triton.train.config.data import DataConfig

if TYPE_CHECKING:
    from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

EVALUATION_SHARE = 0.875  # side of the centre crop over the shorter side, as is usual on ImageNet
MOST_PIXELS = 178_956_970  # Pillow's limit, against files that unpack to more than the memory
NPY = b"\x93NUMPY"
WHOLE = -1  # the seed of no random crop: the whole image

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""
Place = tuple[float, float, float, float]
"""top, left, bottom, right as shares of the height and width of a whole image."""


class ImageError(ValueError):
    """An image that cannot be read: it is skipped and counted, not the end of a run."""


class Crop(NamedTuple):
    """A part of an image, scaled, and which part it is."""

    image: Tensor
    """uint8 [C, H, W]; it lies in memory as [H, W, C]."""
    place: Place
    """What its pixels show; beyond 0..1 where they show more than the image."""


def load_crop(data: bytes, config: DataConfig, seed: int | None) -> Crop:
    """The crop that `seed` decides of an encoded image; evaluation's for None; all of it, squeezed, for WHOLE.

    A place is exact at any size of decoding: the last pixel of a scaled JPEG may lie beyond the edge in part.

    Args:
        data: the bytes of an image file.
        config: its image_size, channels and crop_scale.

    Raises:
        ImageError: the image cannot be decoded, or has other channels.
    """
    target = config.image_size
    try:
        size = jpeg_size(data) if config.channels in (1, 3) else None
        if size is not None:
            box = choose_box(size, config, seed)
            eighths = _eighths(box, target)
            while seed == WHOLE and any(side * eighths % 8 for side in size):
                eighths *= 2  # until the pixels end where the image does
            pixels = _decode_jpeg(data, size, config.channels, eighths)
            if pixels is not None:
                scaled = _scaled(box, eighths, pixels.shape)
                return Crop(resize(pixels, scaled, target), _place(scaled, size, eighths))
        pixels = decode(data, config.channels, turbo=False)
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise ImageError(f"cannot be decoded: {error}") from error
    return crop_pixels(pixels, config, seed)


def crop_pixels(pixels: Pixels, config: DataConfig, seed: int | None) -> Crop:
    """`load_crop` for decoded pixels, uint8 [H, W, C]."""
    size = pixels.shape[1], pixels.shape[0]
    box = choose_box(size, config, seed)
    return Crop(resize(pixels, box, config.image_size), _place(box, size))


def decode(data: bytes, channels: int, turbo: bool = True) -> Pixels:
    """The whole image, uint8 [H, W, C]. Raises ImageError, or what a decoder raises."""
    from PIL import Image, UnidentifiedImageError

    size = jpeg_size(data) if turbo and channels in (1, 3) else None
    if size is not None and (pixels := _decode_jpeg(data, size, channels, 8)) is not None:
        return pixels
    if data[: len(NPY)] == NPY:
        pixels = np.load(io.BytesIO(data), allow_pickle=False)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
            raise ImageError(f"must be uint8 [H, W, {channels}], got {pixels.dtype} {list(pixels.shape)}")
        return pixels
    try:
        file = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # its own text holds an address
        raise ImageError("is not an image, or of a kind that Pillow does not know") from error
    with file:
        pixels = np.array(with_channels(file, channels))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def shrink(data: bytes, side: int, channels: int) -> Pixels | None:
    """The whole image with its shorter side scaled to `side`, uint8 [H, W, C]; None when it is not larger than that.

    An image that is not larger is decoded too: what this returns or leaves alone can be read. Raises ImageError.
    """
    try:
        size = jpeg_size(data) if channels in (1, 3) else None
        pixels = None
        if size is not None:
            eighths = _eighths((0, 0, *size), _shrunk(size, side))
            pixels = _decode_jpeg(data, size, channels, eighths)
        if pixels is None:
            pixels = decode(data, channels, turbo=False)
            size = pixels.shape[1], pixels.shape[0]
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise ImageError(f"cannot be decoded: {error}") from error
    assert size is not None
    if min(size) <= side:
        return None
    small = resize(pixels, (0, 0, pixels.shape[1], pixels.shape[0]), _shrunk(size, side))
    return small.permute(1, 2, 0).contiguous().numpy()


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that simplejpeg can decode, None for everything else."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        import simplejpeg

        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ImportError, ValueError):
        return None
    return (width, height) if colours not in ("CMYK", "YCCK") and width * height <= MOST_PIXELS else None


def choose_box(size: tuple[int, int], config: DataConfig, seed: int | None) -> Box:
    """The crop of an image of `size` (width, height); a function of its arguments."""
    height, width = config.image_size
    if seed is None:
        return centre_box(size, (width, height))
    if seed == WHOLE:
        return 0, 0, *size
    return random_box(size, (width, height), config.crop_scale, random.Random(seed))


def random_box(size: tuple[int, int], target: tuple[int, int], scale: tuple[float, float], draw: random.Random) -> Box:
    """A crop of random area and of an aspect within 3/4..4/3 of the target's; after ten tries the centre."""
    wide, high = size
    aspect = target[0] / target[1]
    for _ in range(10):
        area = wide * high * draw.uniform(*scale)
        ratio = aspect * math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= wide and 0 < h <= high:
            left, top = draw.randint(0, wide - w), draw.randint(0, high - h)
            return left, top, left + w, top + h
    return centre_box(size, target, share=1.0)


def centre_box(size: tuple[int, int], target: tuple[int, int], share: float = EVALUATION_SHARE) -> Box:
    """The centre crop of the target's aspect whose tighter side spans `share` of the image.

    >>> centre_box((500, 375), (224, 224))
    (86, 23, 414, 351)
    """
    wide, high = size
    unit = share * min(wide / target[0], high / target[1])
    w, h = max(round(unit * target[0]), 1), max(round(unit * target[1]), 1)
    left, top = (wide - w) // 2, (high - h) // 2
    return left, top, left + w, top + h


def resize(pixels: Pixels, box: Box, target: tuple[int, int]) -> Tensor:
    """The `box` of pixels [H, W, C] scaled to `target` (height, width): uint8 [C, height, width], channels last."""
    left, top, right, bottom = box
    image = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right]))[None].permute(0, 3, 1, 2)
    if image.shape[2:] != target:
        image = F.interpolate(image, target, mode="bicubic", antialias=True)  # fast where channels lie last
    return image[0]


def _decode_jpeg(data: bytes, size: tuple[int, int], channels: int, eighths: int) -> Pixels | None:
    """Pixels [H, W, C] at `eighths` / 8 of the size, or None where simplejpeg finds anything wrong."""
    import simplejpeg

    least = {}
    if eighths < 8:
        width, height = (-(-side * eighths // 8) for side in size)
        least = {"min_width": width, "min_height": height}
    try:
        return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", **least)
    except ValueError:  # also for flaws that cost no pixel: Pillow decides
        return None


def _shrunk(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width of an image of `size` (width, height) whose shorter side becomes `side`."""
    wide, high = (max(side, round(length * side / min(size))) for length in size)
    return high, wide


def _eighths(box: Box, target: tuple[int, int]) -> int:
    """The least of 1, 2, 4, 8 that leaves the box at least as large as the target, or 8."""
    wide, high = box[2] - box[0], box[3] - box[1]
    for eighths in (1, 2, 4):
        if wide * eighths >= 8 * target[1] and high * eighths >= 8 * target[0]:
            return eighths
    return 8


def _scaled(box: Box, eighths: int, shape: tuple[int, ...]) -> Box:
    left, top, right, bottom = (round(side * eighths / 8) for side in box)
    return left, top, min(right, shape[1]), min(bottom, shape[0])


def _place(box: Box, size: tuple[int, int], eighths: int = 8) -> Place:
    """Of a box in an image of `size` (width, height) that was decoded at `eighths` / 8 of it."""
    left, top, right, bottom = (side * 8 / eighths for side in box)
    return top / size[1], left / size[0], bottom / size[1], right / size[0]


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """An image of 1 (grey), 3 (RGB) or its own number of channels."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # 16 bits: Pillow's conversion would cut everything above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(f"has pixels of mode {image.mode!r}, must have 8 or 16 bits")
    if channels in (1, 3):
        return image.convert("L" if channels == 1 else "RGB")
    if len(image.getbands()) != channels:
        raise ImageError(f"has the channels {', '.join(image.getbands())}, data.channels is {channels}")
    image.load()
    return image
