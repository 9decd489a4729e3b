"""What a case is measured under: the three implementations, the compiled reference, and the released programs."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType

import torch
from torch import Tensor

from dtm_triton.backend import triton_unavailable
from dtm_triton.measure.cases import Case, Inputs, call
from dtm_triton.measure.released import OPS, released_call

IMPLEMENTATIONS = ("triton", "portable", "reference", "tome", "dtm", "compiled")
"""In the order in which they are measured: when time runs out, it is the last that are missing."""

TITLES = {
    "triton": "triton",
    "portable": "portable",
    "reference": "reference, eager",
    "compiled": "reference, torch.compile",
    "tome": "released ToMe, eager",
    "dtm": "released DTM, eager",
}

Call = Callable[[], tuple[Tensor, ...]]


class NotMeasured(Exception):
    """Why an implementation of a case was not measured, as half a sentence."""


class Late(BaseException):
    """Time is up; not an Exception, so that the compiler does not catch it."""


def build_call(
    name: str, case: Case, inputs: Inputs, released: dict[str, ModuleType], compile_seconds: float
) -> Call | None:
    """A function that runs `case` once under the implementation `name`, or None where there is nothing to measure.

    Raises NotMeasured with the reason why it cannot run here.
    """
    if name in ("tome", "dtm"):
        if name not in released or case.op not in OPS[name]:
            return None
        return released_call(name, released[name], case, inputs)
    if name == "compiled":
        return compiled(call(case, inputs, "reference"), compile_seconds)
    if name == "triton":
        if inputs.features.device.type == "cpu":
            return None  # the page says for all kernels at once that no GPU was there
        if reason := triton_unavailable(inputs.features.device):
            raise NotMeasured(reason)
    return call(case, inputs, name)


def compiled(function: Call, seconds: float) -> Call:
    """`function` under torch.compile, compiled. Raises NotMeasured when it does not compile within `seconds`."""
    if seconds <= 0:
        raise NotMeasured("no time was given for compiling")
    torch._dynamo.reset()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    fast = torch.compile(function)
    try:
        with time_limit(seconds):
            for _ in range(2):
                fast()
    except Late:
        torch._dynamo.reset()
        raise NotMeasured(f"compiling took more than {seconds:g} s") from None
    except torch.OutOfMemoryError:
        raise NotMeasured("not enough memory") from None
    except Exception as error:
        torch._dynamo.reset()
        raise NotMeasured(f"does not compile: {type(error).__name__}") from error
    return fast


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Late within the block after `seconds`, and every second from then on, as a destructor can swallow it.

    Only in the main thread.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
