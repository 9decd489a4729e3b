"""Streaming takes memory that grows with the number of tokens: every allocation is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtm_triton.kernels import stream_settings
from dtm_triton.kernels.recording import recording
from dtm_triton.kernels.stream_match import stream_match
from dtm_triton.measure.timing import peak_bytes

PLAIN: dict[str, Any] = dict(num_protected=0, random_split=False, keep_order=False, threshold=None)
ALL = PLAIN | {"random_split": True, "threshold": 0.5}


class Allocations(TorchDispatchMode):
    """Collects the sizes of all memory that PyTorch's operators allocate, in bytes."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = storage  # kept, so that no other gets its number
        return result

    def sizes(self) -> list[int]:
        return [storage.nbytes() for number, storage in self.known.items() if number not in self.inputs]


def allocated(tokens: int, batch: int, schedules: int, iterations: int, options: dict[str, Any]) -> list[int]:
    """What a call allocates on a GPU, without one: on the meta device, with recorders in the kernels' places."""
    features = torch.empty((batch, tokens, 64), dtype=torch.bfloat16, device="meta")
    removed = torch.empty((schedules, iterations), dtype=torch.int32, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    with recording("sm_90"), Allocations(features, removed, seed) as found:
        stream_match(features, removed, seed, **options)
    return found.sizes()


@pytest.mark.parametrize(
    ("iterations", "options", "bytes_per_token"), [(1, PLAIN, 60), (1, ALL, 90), (3, ALL, 220 + 2 * 4 * 64)]
)
def test_memory_grows_with_the_number_of_tokens(iterations: int, options: dict[str, Any], bytes_per_token: int) -> None:
    """Twice the tokens, twice the memory; none of it is as large as a matrix with a bit for every pair."""
    batch, schedules = 4, 2
    before = None
    for tokens in (4096, 8192, 16384):
        sizes = allocated(tokens, batch, schedules, iterations, options)
        total = sum(sizes)
        assert total < bytes_per_token * tokens * batch * schedules
        assert max(sizes) < batch * schedules * tokens**2 / 8
        assert before is None or 1.8 * before < total < 2.1 * before
        before = total


def test_a_large_batch_is_taken_in_chunks() -> None:
    """No more scratch memory at a time than the setting; the results are what is left."""
    sizes = allocated(8192, 1024, 1, 2, ALL)
    results = 4 * 1024 * 8192
    scratch = [size for size in sizes if size != results]
    assert len(sizes) - len(scratch) == 3
    assert max(scratch) < stream_settings.STREAM_SCRATCH_BYTES / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts CPU allocations")
def test_peak_of_a_real_run() -> None:
    """What PyTorch's allocator itself saw, kernels included."""
    features = torch.randn(1, 1300, 4, generator=torch.Generator().manual_seed(0))
    removed, seed = torch.tensor([[300]], dtype=torch.int32), torch.tensor([0])
    peak = peak_bytes(lambda: stream_match(features, removed, seed, **PLAIN), features.device)
    assert 3 * 4 * 1300 < peak < 100 * 1300 < 1300**2 / 8
