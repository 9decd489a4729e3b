"""Decoding and cropping: both decoders agree, and with Pillow's bicubic; what cannot be read is told."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import data_config, encoded, smooth

from dtm_triton.train.data import decode as module
from dtm_triton.train.data.decode import ImageError, centre_box, choose_box, decode, load_crop, random_box, shrink

CONFIG = data_config(Path("unused"))


def channels(count: int, **changes: object):  # type: ignore[no-untyped-def]
    return data_config(Path("unused"), channels=count, mean=(0.5,) * count, std=(0.5,) * count, **changes)


@pytest.mark.parametrize("size", [(60, 80), (333, 221), (17, 24), (16, 300)])
@pytest.mark.parametrize("count", [1, 3])
def test_crops_agree_with_pillow(size: tuple[int, int], count: int) -> None:
    pixels = smooth(1, *size, count)
    for seed in [*range(6), None]:
        crop = load_crop(encoded(pixels, "PNG"), channels(count), seed).image
        assert crop.shape == (count, 16, 24) and crop.dtype == torch.uint8
        box = choose_box(size[::-1], CONFIG, seed)
        image = Image.fromarray(pixels.squeeze(-1) if count == 1 else pixels).crop(box)
        theirs = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC)).reshape(16, 24, count)
        assert np.abs(crop.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("size", [(480, 640), (130, 197), (60, 80)])
@pytest.mark.parametrize("count", [1, 3])
def test_scaled_jpegs_agree_with_whole_ones(size: tuple[int, int], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = encoded(smooth(2, *size), quality=95), channels(count)
    for seed in [*range(4), None]:
        fast = load_crop(data, config, seed).image.int()
        with monkeypatch.context() as patch:
            patch.setattr(module, "jpeg_size", lambda data: None)
            slow = load_crop(data, config, seed).image.int()
        assert (fast - slow).abs().float().mean() < 2.5 and (fast - slow).abs().max() <= 16


def test_a_crop_is_never_decoded_below_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = module.resize
    monkeypatch.setattr(module, "resize", lambda p, box, target: seen.append((p.shape, box)) or real(p, box, target))
    data = encoded(smooth(3, 480, 640))
    for seed in range(30):
        load_crop(data, CONFIG, seed)
        (height, width, _), (left, top, right, bottom) = seen[-1]
        whole = choose_box((640, 480), CONFIG, seed)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert right - left >= min(whole[2] - whole[0], 24) and bottom - top >= min(whole[3] - whole[1], 16)
    assert {shape[0] for shape, _ in seen} >= {60, 120}, "large crops are decoded at a fraction"
    for wide, high in ((24 * 8, 16 * 8 - 1), (24 * 8 - 1, 16 * 8)):  # one side a pixel too short
        assert module._eighths((0, 0, wide, high), (16, 24)) == 2
    assert module._eighths((5, 5, 24 * 8 + 5, 16 * 8 + 5), (16, 24)) == 1


@pytest.mark.parametrize("seed", range(20))
def test_boxes_lie_inside(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(50):
        size, target = (draw.randint(1, 90), draw.randint(1, 90)), (draw.randint(1, 40), draw.randint(1, 40))
        for box in (random_box(size, target, (0.08, 1.0), draw), centre_box(size, target)):
            left, top, right, bottom = box
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def corrupt_files() -> dict[str, bytes]:
    jpeg = encoded(smooth(4, 200, 300), quality=95)
    png = encoded(smooth(4), "PNG")
    return {
        "jpeg cut in half": jpeg[: len(jpeg) // 2],
        "jpeg without its end": jpeg[:-200],
        "jpeg header alone": jpeg[:300],
        "jpeg of zeros": jpeg[:300] + bytes(len(jpeg) - 300),
        "png cut in half": png[: len(png) // 2],
        "npy cut": encoded(smooth(4), "npy")[:-5],
        "npy of floats": encoded(smooth(4).astype(np.float32), "npy"),
        "npy of objects": encoded(np.array([{}, None], dtype=object), "npy"),
        "nothing": b"",
        "zeros": bytes(1000),
        "text": b"not an image, whatever its name says",
    }


@pytest.mark.parametrize("name", corrupt_files())
@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("turbo", [True, False])
def test_corrupt_files_are_told(name: str, seed: int | None, turbo: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fast decoder and without it."""
    if not turbo:
        monkeypatch.setattr(module, "jpeg_size", lambda data: None)
    with pytest.raises(ImageError):
        load_crop(corrupt_files()[name], CONFIG, seed)
    with pytest.raises(ImageError):
        shrink(corrupt_files()[name], 32, 3)


def test_flaws_that_cost_no_pixel_are_read() -> None:
    """What libjpeg only warns of: bytes in front of the end marker, and behind it."""
    jpeg = encoded(smooth(5), quality=90)
    clean = load_crop(jpeg, CONFIG, 1).image.int()
    for flawed in (jpeg[:-2] + b"\0\0\0" + jpeg[-2:], jpeg + b"trailing"):
        assert (load_crop(flawed, CONFIG, 1).image.int() - clean).abs().max() <= 3


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_every_mode_becomes_rgb_or_grey(mode: str) -> None:
    image = Image.fromarray(smooth(6))
    if mode == "I;16":
        image = Image.fromarray(smooth(6, channels=1)[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG", "I;16": "PNG"}.get(mode, "PNG")
    buffer = module.io.BytesIO()
    image.save(buffer, kind)
    for count in (1, 3):
        crop = load_crop(buffer.getvalue(), channels(count), None).image
        assert crop.shape == (count, 16, 24) and 30 < float(crop.float().mean()) < 225
        assert int(crop.max()) > int(crop.min()) + 50


@pytest.mark.parametrize(("count", "kind"), [(4, "PNG"), (4, "TIFF"), (2, "npy"), (7, "npy"), (3, "npy"), (1, "npy")])
def test_other_channels(count: int, kind: str) -> None:
    pixels = smooth(7, channels=count)
    crop = load_crop(encoded(pixels, kind), channels(count), None).image
    left, top, right, bottom = choose_box((80, 60), CONFIG, None)
    assert crop.shape == (count, 16, 24)
    whole = pixels[top:bottom, left:right].mean((0, 1))
    assert np.abs(crop.float().mean((1, 2)).numpy() - whole).max() < 3, "the channels keep their order"


@pytest.mark.parametrize(("kind", "message"), [("JPEG", "R, G, B, data.channels is 4"), ("npy", r"\[H, W, 4\]")])
def test_wrong_channels_are_told(kind: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_crop(encoded(smooth(8), kind), channels(4), 0)


def test_huge_headers_are_refused() -> None:
    """A small file that claims 60,000 x 60,000 pixels must not take 10 GB."""
    jpeg = bytearray(encoded(smooth(9)))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = b"\xea\x60\xea\x60"
    with pytest.raises(ImageError):
        load_crop(bytes(jpeg), CONFIG, 0)


def test_shrink_keeps_the_aspect_and_leaves_small_ones() -> None:
    small = shrink(encoded(smooth(10, 200, 310)), 64, 3)
    assert small is not None and small.shape == (64, 99, 3)
    assert shrink(encoded(smooth(10, 64, 310)), 64, 3) is None
    npy = shrink(encoded(smooth(10, 90, 70, 5), "npy"), 35, 5)
    assert npy is not None and npy.shape == (45, 35, 5)
    assert np.abs(decode(encoded(smooth(11), "PNG"), 3).astype(int) - smooth(11)).max() == 0
