"""Running one test over every implementation: reference, portable, triton, and triton with tiny tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

BACKENDS = ("reference", "portable", "triton", "triton-small")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

EXAMPLES = {"reference": 40, "portable": 40, "triton": 3, "triton-small": 2}
"""The interpreter takes up to a second for what the others do in a millisecond."""

if DEVICE.type == "cuda":
    EXAMPLES = dict.fromkeys(BACKENDS, 60)

over_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
"""The `backend` fixture (conftest.py) swaps in the tiny tiles and gives the name to pass to the library."""


def property_test(**strategies: SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A hypothesis test that runs over every backend: the function takes `backend` and what the strategies draw."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @over_backends
        def test(backend: str, request: pytest.FixtureRequest) -> None:
            @settings(
                max_examples=EXAMPLES[request.node.callspec.params["backend"]],
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(**strategies)
            def run(**drawn: Any) -> None:
                check(backend, **drawn)

            run()

        test.__doc__ = check.__doc__
        return test

    return decorate
