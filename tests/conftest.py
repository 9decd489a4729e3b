"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def look_through_triton_once_a_launch() -> None:
    """A third of the interpreter's time goes into patching Triton's language, all of it, in every call of a device
    function. What one launch has patched stays patched until it ends: once for every module of kernels is enough."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    class Launch:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            patched.clear()
            self.scope.restore()

    def patch_once(function: Any) -> Any:
        if function.__module__ in patched:
            return None
        scope = patch(function)
        outermost = not patched
        patched.add(function.__module__)
        return Launch(scope) if outermost else scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    look_through_triton_once_a_launch()


# A shell's background job ignores Ctrl-C, and so would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend to ask for; "triton-small" is triton with tiles so small that tiny inputs cross their edges."""
    if request.param == "triton-small":
        use_small_tiles(monkeypatch)
        return "triton"
    return request.param


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch every kernel with the smallest tiles it works with; tl.dot takes no less than 16."""
    from dtm_triton.kernels import settings

    def match_settings(num_tokens: int, dtype: torch.dtype, num_tasks: int, family: str) -> settings.MatchSettings:
        return settings.MatchSettings(
            fused=num_tokens % 2 == 0,
            slots=max(16, 1 << (num_tokens - 1).bit_length()),
            gram_rows=16,
            gram_channels=16,
            max_registers=224,
            match_rows=4,
            match_columns=4,
            rank_columns=4,
            link_rows=2,
            merge_rows=2,
            merge_columns=8,
            block_columns=4,
            mean_groups=2,
            mean_channels=8,
            max_programs=2,
        )

    group = settings.GroupSettings(groups=2, members=2, channels=8)
    monkeypatch.setattr(settings, "match_settings", match_settings)
    monkeypatch.setattr(settings, "group_settings", lambda *_: group)
    loss = settings.LossSettings(groups=2, members=2, channels=8)
    monkeypatch.setattr(settings, "loss_settings", lambda *_: loss)
    monkeypatch.setattr(settings, "gather_settings", lambda *_: settings.GatherSettings(tokens=4, channels=8))
    monkeypatch.setattr(settings, "count_settings", lambda *_: settings.CountSettings(rows=4, columns=4))
