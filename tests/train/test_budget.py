"""Tokens and operations of recipes: those that PyTorch counts while the network runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shrunk import FULL_SCALE, PATCHES, SIZE, shrink, write_images

from dtm_triton.groups import TokenGroups
from dtm_triton.partition import Partition
from dtm_triton.train import recipes
from dtm_triton.train.benchmark.flops import count_flops
from dtm_triton.train.build import assemble, build_targets
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.planning.budget import Budget, _network, describe_budget, token_budget

ROOT = Path(__file__).parents[2]


def budget(name: str) -> Budget:
    return token_budget(recipes.PRETRAIN[name]())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def counted(config: PretrainConfig) -> int:
    """Operations of the network that is trained, on one image: masked patches first, thrown ones next."""
    network = assemble(config, build_targets(config, Processes())).network
    mask, places = config.mask, torch.arange(PATCHES)
    masked, thrown = places < mask.masked, (places >= mask.masked) & (places < mask.masked + mask.thrown)
    parts = Partition.of(masked[None], thrown[None], mask.masked, mask.thrown)
    kept, more = PATCHES - mask.thrown, []
    if config.method == "beit_v2":
        whole = TokenGroups(torch.zeros(1, kept).int(), torch.full((1, 1), kept).int())
        more = [[whole] * config.loss.num_schedules]
    views = 2 if config.method == "byol" else 1
    return views * count_flops(lambda: network(torch.rand(1, 3, *SIZE), parts, *more))


@pytest.mark.parametrize("name", FULL_SCALE)
def test_operations_are_those_counted(name: str, images: Path, tmp_path: Path) -> None:
    config = shrink(recipes.PRETRAIN[name](), images, tmp_path)
    assert token_budget(config).flops == counted(config)


@pytest.mark.parametrize("model", ["vit_small_patch16_18x2_224", "vit_base_patch16_xp_224"])
def test_blocks_of_another_build_are_counted(model: str, images: Path, tmp_path: Path) -> None:
    """Two attentions side by side, and one that shares its norm with the layers beside it."""
    config = shrink(recipes.PRETRAIN["maskfeat_vit_base"](), images, tmp_path)
    config = replace(config, student=replace(config.student, model=model))
    assert token_budget(config).flops == counted(config)


def test_no_student_is_refused_by_its_count(images: Path, tmp_path: Path) -> None:
    """A model with further modules that have heads, such as those of its positions."""
    config = shrink(recipes.PRETRAIN["maskfeat_vit_base"](), images, tmp_path)
    kwargs = {**config.student.model_kwargs, "fc_norm": False}
    config = replace(config, student=replace(config.student, model="vit_relpos_small_patch16_224", model_kwargs=kwargs))
    assert 0 < token_budget(config).flops <= counted(config)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("mae_vit_base", 50, 197),
        ("amt_mae_vit_base", 31, 119),
        ("simmim_vit_base", 197, 0),
        ("amt_simmim_vit_base", 145, 0),
        ("dtm_amt_vit_base", 147, 0),
        ("dtm_eva_vit_base", 201, 0),
    ],
)
def test_tokens_are_the_papers(name: str, encoder: int, decoder: int) -> None:
    found = budget(name)
    assert (found.patches, found.encoder_tokens, found.decoder_tokens) == (196, encoder, decoder)


def test_amt_computes_three_fifths_of_mae() -> None:
    """The transformer blocks 0.602 of MAE's; patches are embedded before any is thrown away, and so 0.607 in all."""

    def blocks(tokens: tuple[int, int]) -> float:
        parts = zip(tokens, (12, 8), (768, 512), strict=True)
        return sum(depth * (24 * n * width**2 + 4 * n**2 * width) for n, depth, width in parts)

    mae, amt = budget("mae_vit_base"), budget("amt_mae_vit_base")
    embedding, into, out = 2 * 196 * 768**2, 2 * 768 * 512, 2 * 512 * 768
    assert mae.flops == embedding + blocks((50, 197)) + 50 * into + 196 * out
    assert amt.flops == embedding + blocks((31, 119)) + 31 * into + 118 * out
    assert amt.flops / mae.flops == pytest.approx(0.607, abs=0.0005)
    assert blocks((31, 119)) / blocks((50, 197)) == pytest.approx(0.602, abs=0.0005)
    assert mae.encoder_flops == embedding + 12 * (24 * 50 * 768**2 + 4 * 50**2 * 768)


def test_it_says_so_in_a_line() -> None:
    assert budget("amt_mae_vit_base").describe() == (
        "each image of 196 patches: 31 tokens in the encoder, 119 in the decoder; 11.9 GFLOP forward"
    )
    config = recipes.PRETRAIN["amt_mae_vit_small"]()
    with torch.device("meta"):
        network = _network(config, config.student)
    before, after = describe_budget(config, network).splitlines()
    assert before == token_budget(recipes.PRETRAIN["mae_vit_small"]()).describe()
    assert after == f"after 40 epochs {token_budget(config).describe()}"
    assert budget("demo").describe() == "each image of 36 patches: 37 tokens in the encoder; 0.0266 GFLOP forward"


def test_weights_are_not_read(images: Path, tmp_path: Path) -> None:
    config: Any = shrink(recipes.PRETRAIN["mae_vit_base"](), images, tmp_path)
    started = replace(config, student=replace(config.student, weights=tmp_path / "nowhere"))
    assert token_budget(started) == token_budget(config)


def test_the_page_shows_these_figures() -> None:
    section = (ROOT / "docs" / "recipes.md").read_text().split("## What a step costs")[1].split("\n## ")[0]
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")
    ]
    assert len(rows) == 6
    base = Budget(patches=0, encoder_tokens=0, decoder_tokens=0, encoder_flops=0, decoder_flops=0)
    for name, encoder, decoder, flops, ratio in rows:
        found = budget(name)
        assert (encoder, decoder or "0") == (str(found.encoder_tokens), str(found.decoder_tokens)), name
        assert flops == f"{found.flops / 1e9:.3g}", name
        if ratio:
            assert ratio.split(";")[0] == f"{found.flops / base.flops:.2f}", name
        else:
            base = found
