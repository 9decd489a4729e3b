"""AMT (arXiv 2211.15362) on ImageNet-1K: masks and thrown patches that follow attention, added to other recipes.

Counts are the paper's: on MAE its shares of the 196 patches, cut off, masked 0.45 and thrown 0.40; on SimMIM, whose
masks consist of 49 squares of 2 x 2 patches, 22 and 13 squares. Everything else is the recipe that it is added to.
"""

from __future__ import annotations

from dataclasses import replace

from dtm_triton.partition import count_patches
from dtm_triton.train.config import AttentionConfig, MaskConfig, PretrainConfig
from dtm_triton.train.recipes.frameworks import mae_vit_base, mae_vit_large, mae_vit_small, simmim_vit_base
from dtm_triton.train.recipes.imagenet import dtm_vit_base_patch16_in1k, dtm_vit_small_patch16_in1k

PATCHES = 196
SQUARE = 4  # patches in one of SimMIM's
EPOCHS = 40  # AMT: before the first maps, and between new ones


def amt_mae_vit_base() -> PretrainConfig:
    """AMT on MAE, ViT-B: after 40 epochs of MAE the encoder sees 30 patches and the decoder 118."""
    return _on_mae(mae_vit_base())


def amt_mae_vit_small() -> PretrainConfig:
    """AMT on MAE with ViT-S."""
    return _on_mae(mae_vit_small())


def amt_mae_vit_large() -> PretrainConfig:
    """AMT on MAE with ViT-L."""
    return _on_mae(mae_vit_large())


def amt_simmim_vit_base() -> PretrainConfig:
    """AMT on SimMIM: after 40 epochs 22 of the 49 squares are masked, 13 thrown, 14 seen: 145 of 197 tokens."""
    base = simmim_vit_base()
    maps = AttentionConfig(
        source="student",  # AMT: the encoder itself, in eval mode, on whole images
        statistic="class_row",  # AMT
        warmup_epochs=EPOCHS,  # the released program's; it crashes there
        warmup_masked=base.mask.masked,  # AMT: SimMIM until then
        refresh_epochs=EPOCHS,  # as on MAE
    )
    mask = MaskConfig(
        kind="attention",
        masked=22 * SQUARE,  # AMT: 22 of 49 squares
        thrown=13 * SQUARE,  # AMT: 13, which leaves 14 to see
        unit=base.mask.unit,  # SimMIM: 2, squares of 32 pixels
    )
    return replace(base, mask=mask, attention=maps)


def dtm_amt_vit_base() -> PretrainConfig:
    """DTM whose masks follow its teacher's attention, and whose student never meets a quarter of the patches. Ours."""
    return _on_dtm(dtm_vit_base_patch16_in1k())


def dtm_amt_vit_small() -> PretrainConfig:
    """`dtm_amt_vit_base` with ViT-S."""
    return _on_dtm(dtm_vit_small_patch16_in1k())


def _on_mae(base: PretrainConfig) -> PretrainConfig:
    maps = AttentionConfig(
        source="student",  # AMT: the encoder itself, in eval mode, on whole images
        statistic="class_row",  # AMT: the class token's attention in the last block
        maps="stored",  # AMT: of whole images, cropped and flipped with them
        warmup_epochs=EPOCHS,  # AMT: MAE until then
        warmup_masked=base.mask.masked,  # AMT: 75 %, MAE's
        refresh_epochs=EPOCHS,  # AMT: after 40, 80, ..., 360 of 400 epochs
        crop="exact",  # the released program's index is wrong
    )
    return replace(
        base,
        mask=MaskConfig(
            kind="attention",
            masked=count_patches(PATCHES, 0.45),  # AMT: 88
            thrown=count_patches(PATCHES, 0.40),  # AMT: 78, which leaves 30 to see
            temperature=1.0,  # AMT: in proportion to the weights
            uniform=0.01,  # ours: none is impossible; AMT: 0, where weights of 0 end the program
            order=("masked", "thrown", "visible"),  # AMT
        ),
        attention=maps,
    )


def _on_dtm(base: PretrainConfig) -> PretrainConfig:
    masked = base.mask.masked  # DTM: 75
    thrown = count_patches(PATCHES, 0.26)  # AMT's share on SimMIM, which has mask tokens too: 50
    maps = AttentionConfig(
        source="teacher",  # CLIP's blocks are computed for the targets anyway
        maps="live",  # of the very crop
        warmup_epochs=0,  # the teacher knows from the start where to look
    )
    return replace(
        base,
        mask=MaskConfig(kind="attention", masked=masked, thrown=thrown),
        attention=maps,
        loss=replace(base.loss, max_removed=PATCHES - thrown),  # DTM: up to all tokens, which are 146 here
    )
