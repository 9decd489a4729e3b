"""Gate, then measure every case under every implementation, with a line of progress for each."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from dtm_triton.backend import triton_unavailable
from dtm_triton.measure import gate
from dtm_triton.measure.baselines import IMPLEMENTATIONS, TITLES, Late, NotMeasured, build_call, time_limit
from dtm_triton.measure.cases import Case, make_inputs
from dtm_triton.measure.ceilings import measure_ceilings
from dtm_triton.measure.machine import describe
from dtm_triton.measure.overhead import graph_replay, host_overhead
from dtm_triton.measure.record import Record, Row
from dtm_triton.measure.timing import Timing, measure, peak_bytes

SLOWEST = 20.0
"""An implementation that needs more than this many seconds, and ten times what was asked for, is given up."""


class GateFailed(Exception):
    """Results are wrong: nothing may be measured."""


class Sweep:
    """One run of the benchmark on `device`: `seconds` for each median, everything in about `minutes`."""

    def __init__(
        self,
        cases: list[Case],
        device: torch.device,
        *,
        seconds: float,
        minutes: float,
        compile_seconds: float,
        released: dict[str, ModuleType],
    ) -> None:
        self.cases, self.device, self.seconds = cases, device, seconds
        self.compile_seconds, self.released = compile_seconds, released
        self.start = time.perf_counter()
        self.gate_deadline, self.deadline = self.start + 30 * minutes, self.start + 60 * minutes

    def run(self) -> Record:
        """Raises GateFailed, before anything is measured, when an implementation is wrong."""
        gated = self._gate()
        self._say("measuring this device's ceilings")
        dtypes = tuple(dict.fromkeys(case.dtype for case in self.cases))
        ceilings = measure_ceilings(self.device, min(self.seconds, 1.0), dtypes)
        self._say(f"copy {ceilings.copy_gb_s:.0f} GB/s; matrix rates in TFLOP/s: {ceilings.matrix_tflop_s}")
        host, replay = self._calls()
        rows: list[Row] = []
        for implementation in IMPLEMENTATIONS:
            for case in self.cases:
                if row := self._row(case, implementation, gated):
                    rows.append(row)
        rows.sort(key=lambda row: [case.name for case in self.cases].index(row.case))  # stable: by case
        return Record(
            machine=describe(self.device), ceilings=ceilings, seconds=self.seconds, rows=rows, host=host, replay=replay
        )

    def _gate(self) -> set[str]:
        """Check every case under the backends that are measured; returns the names of the cases that were reached."""
        backends = ["portable"]
        if self.device.type == "cuda" and triton_unavailable(self.device) is None:
            backends.insert(0, "triton")
        failures: list[str] = []
        reached: set[str] = set()
        for case in self.cases:
            if time.perf_counter() > self.gate_deadline:
                self._say(f"the gate's time is up: {len(self.cases) - len(reached)} cases are not measured")
                break
            for backend in backends:
                verdict = "right"
                try:
                    gate.check(case, backend, self.device)
                except Exception as error:  # a kernel that does not compile is as wrong as one that miscounts
                    text = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                    verdict = f"WRONG: {text}"
                    failures.append(f"{case.name}: {backend}: {text}")
                self._say(f"gate: {case.name}: {backend}: {verdict}")
            reached.add(case.name)
        if failures:
            raise GateFailed("\n".join(failures))
        return reached

    def _row(self, case: Case, implementation: str, gated: set[str]) -> Row | None:
        """Measure one implementation of one case; None where there is nothing to measure."""
        try:
            if case.name not in gated:
                raise NotMeasured("the gate did not reach it in the time given")
            if self._left() <= 0:
                raise NotMeasured("the time given ran out")
            inputs = make_inputs(case, self.device)
            seconds = min(self.compile_seconds, self._left())
            function = build_call(implementation, case, inputs, self.released, seconds)
            if function is None:
                return None
            timing, peak = self._time(function)
        except NotMeasured as reason:
            self._say(f"{case.name}: {TITLES[implementation]}: not measured: {reason}")
            return Row.of(case, implementation, reason=str(reason))
        self._say(f"{case.name}: {TITLES[implementation]}: {timing.median_ms:.4g} ms (IQR {timing.iqr_ms:.2g})")
        return Row.of(case, implementation, **vars(timing), peak_bytes=peak)

    def _time(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Timing, int]:
        limit = min(max(SLOWEST, 10 * self.seconds), max(self._left(), 1.0))
        try:
            with time_limit(limit):
                return measure(function, self.device, self.seconds), peak_bytes(function, self.device)
        except Late:
            raise NotMeasured(f"five calls take more than {limit:.0f} s") from None
        except torch.OutOfMemoryError:
            raise NotMeasured("not enough memory") from None
        except Exception as error:
            raise NotMeasured(f"fails: {type(error).__name__}") from error

    def _left(self) -> float:
        """Seconds until nothing more is measured."""
        return self.deadline - time.perf_counter()

    def _calls(self) -> tuple[dict[str, Timing], dict[str, Timing]]:
        """Host time per call, and on a GPU graph replays."""
        host: dict[str, Timing] = {}
        replay: dict[str, Timing] = {}
        try:
            host = host_overhead(self.device, self.seconds)
        except ImportError:
            self._say("host time: not measured: Triton is not installed")
        for case in self.cases:
            if self.device.type == "cuda" and case.op == "dtm_loss" and case.dtype == torch.bfloat16:
                try:
                    replay[case.name] = graph_replay(case, self.device, self.seconds)
                except Exception as error:
                    self._say(f"graph of {case.name}: not measured: {type(error).__name__}: {error}")
        for name, timing in {**host, **{f"graph of {name}": t for name, t in replay.items()}}.items():
            self._say(f"{name}: {1e3 * timing.median_ms:.4g} us")
        return host, replay

    def _say(self, text: str) -> None:
        sys.stdout.write(f"[{time.perf_counter() - self.start:6.1f} s] {text}\n")
        sys.stdout.flush()
