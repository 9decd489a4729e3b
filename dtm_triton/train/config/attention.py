"""Configuration of attention maps: where masks of kind "attention" get their weights from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtm_triton.attention_masking import Crop
from dtm_triton.train.config.checks import check


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention maps of all images, and when they are made. Used by masks of kind "attention" only."""

    source: Literal["student", "ema", "teacher"] = "student"
    """Whose last block attends: the student's, that of its moving average, or that of the frozen teacher."""
    statistic: Literal["class_row", "row_column"] = "class_row"
    """"class_row": what the class token attends to, scaled to 0..1 in every head, mean over heads; "row_column": times
    how much a patch is attended to by all tokens, not scaled. Without a class token the mean query of the patches."""
    maps: Literal["stored", "live"] = "stored"
    """"stored": one small map of every whole image, made anew every so many epochs, cropped and flipped as the image;
    "live": a map of every crop in every step, which costs a forward pass of the source."""
    warmup_epochs: int = 40
    """Epochs before the first maps; until then patches are masked at random."""
    warmup_masked: int = 147
    """Patches masked at random until then; none are thrown."""
    refresh_epochs: int = 40
    """Epochs between new maps; 0 makes them once."""
    crop: Crop = "exact"
    """"exact": a map is cropped as its image; "released": by the released program's mistaken index, for comparison."""
    precision: Literal["uint8", "float16"] = "uint8"
    """Of stored maps: 251 MB or twice as much for ImageNet-1K."""

    def __post_init__(self) -> None:
        for name in ("warmup_epochs", "warmup_masked", "refresh_epochs"):
            check(f"attention.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        stored = self.maps == "stored"
        check(
            "attention.crop", self.crop, stored or self.crop == "exact", '"exact" for live maps, which are of the crop'
        )

    def due(self, epoch: int) -> bool:
        """Whether stored maps are made anew when `epoch` epochs are done.

        >>> [epoch for epoch in range(121) if AttentionConfig().due(epoch)]
        [40, 80, 120]
        """
        since = epoch - self.warmup_epochs
        return since == 0 or (since > 0 and self.refresh_epochs > 0 and since % self.refresh_epochs == 0)
