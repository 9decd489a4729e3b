"""dtm-shard: whole, deterministic, verified shards, whatever the dataset, also when it is killed."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_images import data_config, encoded, smooth, write_classes

from dtm_triton.train.data.images import open_images
from dtm_triton.train.data.shard_writer import checksum
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.shard import RECORDS, ShardConfig, main, shard


def quiet(text: str) -> None:
    pass


def config(folder: Path, **changes: object) -> ShardConfig:
    fields = {"input": folder / "in", "output": folder / "out", "size": 40, "images_per_shard": 4, "workers": 1}
    return ShardConfig(**{**fields, **changes})  # type: ignore[arg-type]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 images, two of them corrupt and one small, in shards of 4."""
    folder = tmp_path_factory.mktemp("made")
    write_classes(folder / "in", classes=2, images=6, size=(90, 120))
    (folder / "in" / "c0" / "small.png").write_bytes(encoded(smooth(77, 30, 44), "PNG"))
    (folder / "in" / "c0" / "00.jpg").write_bytes(b"no image")
    whole = (folder / "in" / "c1" / "03.jpg").read_bytes()
    (folder / "in" / "c1" / "03.jpg").write_bytes(whole[: len(whole) // 2])
    shard(config(folder), quiet)
    return folder


def test_manifest_and_images(made: Path) -> None:
    manifest = json.loads((made / "out" / "manifest.json").read_text())
    assert (manifest["images"], manifest["classes"], len(manifest["shards"])) == (11, ["c0", "c1"], 4)
    assert sorted(one["name"] for one in manifest["skipped"]) == ["c0/00.jpg", "c1/03.jpg"]
    assert {one["name"]: one["sha256"] for one in manifest["shards"]}.items() <= digests(made / "out").items()
    assert not (made / "out" / RECORDS).exists()
    images = open_images(data_config(made / "out", source="shards"), "train")
    assert images is not None and sorted(images.labels.tolist()) == [0] * 6 + [1] * 5 and images.num_classes == 2
    sizes = set()
    for path in (made / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if not member.name.endswith(".cls"):
                    sizes.add(Image.open(io.BytesIO(content)).size)
                if member.name.endswith(".png"):
                    assert content == encoded(smooth(77, 30, 44), "PNG"), "a small one is copied as it is"
    assert sizes == {(53, 40), (44, 30)}


def test_shards_look_like_their_images(made: Path) -> None:
    whole = open_images(data_config(made / "in"), "train")
    small = open_images(data_config(made / "out", source="shards"), "train")
    assert whole is not None and small is not None
    fine = [n for n in range(13) if whole.name(n) not in ("c0/00.jpg", "c1/03.jpg")]
    originals = [whole.load(n, None).image.float() for n in fine]
    for number in range(11):
        crop = small.load(number, None).image.float()
        nearest = min(range(11), key=lambda n: float((originals[n] - crop).abs().mean()))
        assert float((originals[nearest] - crop).abs().mean()) < 4
        assert int(nearest >= 6) == int(small.labels[number])


def test_the_same_bytes_with_any_number_of_workers(made: Path, tmp_path: Path) -> None:
    shard(config(made, output=tmp_path / "two", workers=2), quiet)
    assert digests(tmp_path / "two") == {name: d for name, d in digests(made / "out").items() if "index" not in name}
    shard(config(made, output=tmp_path / "seed", seed=1), quiet)
    assert digests(tmp_path / "seed") != digests(tmp_path / "two")


def test_webdataset_reads_them(made: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(str(path) for path in (made / "out").glob("*.tar"))
    loaded = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg;png", "cls"))
    ours = open_images(data_config(made / "out", source="shards"), "train")
    assert ours is not None and [label for _, label in loaded] == ours.labels.tolist()
    assert all(isinstance(image, np.ndarray) and image.shape[2] == 3 for image, _ in loaded)


def test_what_is_right_is_kept_and_what_is_wrong_is_written_again(made: Path, tmp_path: Path) -> None:
    output, said = tmp_path / "out", []
    shard(config(made, output=output), quiet)
    before, times = digests(output), {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    shard(config(made, output=output), said.append)
    assert "4 of 4 shards are there" in said[0]
    damaged = bytearray((output / "shard-000001.tar").read_bytes())
    damaged[700] ^= 1  # the same size
    (output / "shard-000001.tar").write_bytes(damaged)
    (output / "shard-000002.tar").unlink()
    shard(config(made, output=output), said.append)
    assert "2 of 4 shards are there" in said[1] and digests(output) == before
    kept = ("shard-000000.tar", "shard-000003.tar")
    assert all((output / name).stat().st_mtime_ns == times[name] for name in kept)


def test_folders_that_cannot_be_used(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    shard(config(made, output=output), quiet)
    with pytest.raises(FolderError, match="shards of other images or settings"):
        shard(config(made, output=output, quality=50), quiet)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other.tar").write_bytes(b"")
    with pytest.raises(FolderError, match=r"'other.tar', which is not one of these shards"):
        shard(config(made, output=tmp_path / "mine"), quiet)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FolderError, match=r"output .*file.*"):
        shard(config(made, output=tmp_path / "file" / "out"), quiet)
    with pytest.raises(ValueError, match="output must be outside of input"):
        config(made, output=made / "in" / "out")
    write_classes(tmp_path / "bad", classes=1, images=2)
    for path in (tmp_path / "bad").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(FolderError, match="no image can be read"):
        shard(config(made, input=tmp_path / "bad", output=tmp_path / "none"), quiet)
    folders = ["--input", str(tmp_path / "nowhere"), "--output", str(tmp_path / "x")]
    with pytest.raises(SystemExit, match="does not exist"):
        main(folders)
    with pytest.raises(SystemExit):
        main([*folders, "--quality", "99"])
    assert "quality must be in 1..95, got 99" in " ".join(capsys.readouterr().err.split())


def test_a_shard_that_changes_while_it_is_checked_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtm_triton.train.data import shard_writer

    record = shard_writer.write_shard(
        tmp_path / "x.tar",
        open_images(data_config(made / "in"), "train"),
        range(2),
        [2, 3],
        side=40,
        quality=90,
        channels=3,
    )  # type: ignore[arg-type]
    shard_writer.check_shard(tmp_path / "x.tar", record, 3)
    with pytest.raises(FolderError, match="holds 2 images, 3 were written"):
        shard_writer.check_shard(tmp_path / "x.tar", record | {"images": 3}, 3)
    broken = (tmp_path / "x.tar").read_bytes().replace(b"\xff\xda", b"\xff\xff")
    (tmp_path / "x.tar").write_bytes(broken)
    with pytest.raises(FolderError, match="is not what was written"):
        shard_writer.check_shard(tmp_path / "x.tar", record, 3)
    with pytest.raises(FolderError, match="cannot be decoded"):
        shard_writer.check_shard(tmp_path / "x.tar", record | {"sha256": checksum(tmp_path / "x.tar")}, 3)


def test_other_sources_and_channels(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "in" / "k").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "k" / f"{number}.npy").write_bytes(encoded(smooth(number, 50, 90, 6), "npy"))
    shard(config(tmp_path, channels=6), quiet)
    six = data_config(tmp_path / "out", source="shards", channels=6, mean=(0.5,) * 6, std=(0.5,) * 6)
    images = open_images(six, "train")
    assert images is not None and images.load(0, 1).image.shape == (6, 16, 24)
    again = replace(config(tmp_path, channels=6), source="shards", input=tmp_path / "out", output=tmp_path / "again")
    assert shard(again, quiet)["images"] == 3


@pytest.mark.parametrize("channels", [3, 4])
def test_formats_that_nobody_would_look_for_in_a_shard(channels: int, tmp_path: Path) -> None:
    """Small ones, with the name of a JPEG, as they come from the web."""
    (tmp_path / "in" / "k").mkdir(parents=True)
    pixels = smooth(0, 30, 44, channels)
    for name, kind in enumerate(("JPEG2000", "TGA", "PNG")):
        (tmp_path / "in" / "k" / f"{name}.jpg").write_bytes(encoded(pixels, kind))
    assert shard(config(tmp_path, channels=channels), quiet)["images"] == 3
    fields = {"channels": channels, "mean": (0.5,) * channels, "std": (0.5,) * channels}
    images = open_images(data_config(tmp_path / "out", source="shards", **fields), "train")
    assert images is not None and sorted(Path(images.name(n)).suffix for n in range(3)) == sorted(
        [".png", *[".jpg" if channels == 3 else ".npy"] * 2]
    )
    first = images.load(0, None).image.float()
    assert all(float((images.load(number, None).image.float() - first).abs().mean()) < 4 for number in range(3))


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9 to the command: no orphan goes on, the next start continues, the end is the undisturbed one."""
    output, draw, seen = tmp_path / "out", random.Random(0), []
    write_classes(tmp_path / "in", classes=2, images=50, size=(48, 64))
    for _ in range(4):
        process = os.fork()
        if not process:
            os.setsid()
            shard(config(tmp_path, images_per_shard=1, workers=2), quiet)
            os._exit(0)
        deadline, wanted = time.monotonic() + 60, len(list(output.glob("*.tar"))) + draw.randint(1, 9)
        while len(list(output.glob("*.tar"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.005))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        seen.append(len(list(output.glob("*.tar"))))
        while _members_of_group(process) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _members_of_group(process), "workers outlive the command"
        assert not (output / "manifest.json").exists()
    assert 0 < seen[0] <= seen[-1] < 100 and seen == sorted(seen)
    said: list[str] = []
    shard(config(tmp_path, images_per_shard=1), said.append)
    kept = int(said[0].rpartition(": ")[2].split()[0])
    assert seen[-1] - 2 <= kept <= seen[-1], "each worker may have written a shard that has no record yet"
    shard(config(tmp_path, output=tmp_path / "undisturbed", images_per_shard=1), quiet)
    assert digests(output) == digests(tmp_path / "undisturbed")
    assert not list(output.glob("*.tmp"))


def _members_of_group(group: int) -> list[str]:
    return [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit() and _group_of(entry) == group]


def _group_of(entry: Path) -> int | None:
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[2]) if fields[0] != "Z" else None
