"""The one training loop: objectives differ, this does not.

State is little: weights, AdamW's moments, the number of steps done. Data order, crops, masks, schedules and the random
numbers inside the network are pure functions of (seed, step), so a run that was stopped goes on with the same bits.

A non-finite loss makes the gradient non-finite in all processes; from that step on no update is applied (decided on the
device, nothing waits), and at the next log line the run ends with FloatingPointError. No step is left out silently, and
no checkpoint is written after the bad step.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dtm_triton.train.config import DataConfig, OptimizerConfig, RunConfig
from dtm_triton.train.data.batches import Batch, EvaluationBatches, MicroBatches, evaluation_loader, training_loader
from dtm_triton.train.data.draws import Draw, fold
from dtm_triton.train.data.images import open_images
from dtm_triton.train.engine.checkpoint import CheckpointError, FolderError, load_newest, save_checkpoint
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import Logbook, Metrics
from dtm_triton.train.engine.optimizer import build_optimizer, clip_gradient, guarded_step, learning_rate
from dtm_triton.train.engine.run_folder import hold_folder, refuse_changes, write_config
from dtm_triton.train.engine.stop import Stopped, StopRequest
from dtm_triton.train.objectives.objective import Objective

TRAIN_SHARE = 20_000  # training images an evaluation looks at, at most


class Trainer:
    """Trains an objective's network in a folder; continues what the folder holds.

    Args:
        objective: see `Objective`; it is moved to the device.
        data, optimizer, run: the configuration.
        processes: this process among those of the run.
        draws: random numbers every image of a batch comes with, by name.
        resolved: the whole configuration as JSON; a run only goes on with the one it began with.
        title: what people see in front of the progress.

    Raises:
        FolderError: data that is missing or empty, checkpoints that cannot be read, a configuration or data other than
            what the folder's run began with.
        ValueError: a batch size that cannot be divided, or is larger than the data.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        data: DataConfig,
        optimizer: OptimizerConfig,
        run: RunConfig,
        processes: Processes,
        draws: Mapping[str, Draw],
        resolved: str,
        title: str,
    ) -> None:
        self.run, self.optim, self.processes, self.resolved, self.title = run, optimizer, processes, resolved, title
        self.workers, self.device = data.workers, processes.device
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        if run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True, warn_only=True)
        images = open_images(data, "train")
        assert images is not None
        self.fingerprint = images.fingerprint
        self.batches = MicroBatches(images, data, run, processes, draws)
        self.test = open_images(data, "test")
        self.total = run.epochs * self.batches.steps_per_epoch
        self.warmup = round(optimizer.warmup_epochs * self.batches.steps_per_epoch)

        self.objective = objective
        objective.to(self.device).train()
        self.optimizer = build_optimizer(objective.network, optimizer)
        self.parameters = [p for p in objective.network.parameters() if p.requires_grad]
        self.step, self.best = 0, -math.inf
        self.bad_step = torch.full((), -1, device=self.device)  # first step whose gradient was not finite
        self.sums: dict[str, Tensor] = {}  # metrics since the last log line
        self.summed = 0
        self._restore()
        if processes.first:
            write_config(run.folder, resolved)
        self.parallel: Any = objective
        if processes.count > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False)

    def fit(self) -> Metrics:
        """Train to the end and evaluate; returns the last evaluation, empty without held-out images.

        Raises Stopped after Ctrl-C or SIGTERM, FloatingPointError for a loss that is not finite: see the module.
        """
        if self.step == self.total:
            return self._evaluate()
        run, per_epoch = self.run, self.batches.steps_per_epoch
        pin = self.device.type == "cuda"
        loader = training_loader(self.batches, self.step, self.total, self.workers, pin)
        last: Metrics = {}
        book = Logbook(run.folder, self.title, self.step, self.total, self.processes.first)
        held = hold_folder(run.folder) if self.processes.first else nullcontext()
        with held, StopRequest() as stop, book, loader as incoming:
            since, logged = time.monotonic(), self.step
            while self.step < self.total:
                self._train_step(incoming)
                end = self.step == self.total
                epoch = self.step // per_epoch if self.step % per_epoch == 0 else 0
                leaving = stop.number if self.processes.count == 1 else 0  # several leave together, at a log line
                if self.step % run.log_every == 0 or end:
                    metrics, heard = self._collect(stop.number)
                    leaving = leaving or heard
                    now = time.monotonic()
                    metrics["images_per_second"] = (self.step - logged) * run.batch_size / (now - since)
                    since, logged = now, self.step
                    book.write(self.step, metrics)
                due = end or (epoch and run.evaluate_every and epoch % run.evaluate_every == 0)
                if due and (last := self._evaluate()):
                    book.write(self.step, last)
                score = last.get(self.objective.judged_by, -math.inf)
                improved, self.best = score > self.best, max(score, self.best)
                if end or improved or leaving or self.step % run.checkpoint_every == 0:
                    self._save(improved)
                if leaving:
                    book.say(
                        f"{self.title.strip()}: stopped at step {self.step}, saved; the same command goes on from here"
                    )
                    raise Stopped(leaving)
        return last

    def _train_step(self, loader: Iterator[Batch]) -> None:
        run, parts = self.run, self.run.accumulate
        for part in range(parts):
            batch = self._receive(next(loader))
            self.objective.seed_draws(run.seed, self.step, self.processes.rank)
            torch.manual_seed(fold(run.seed, "network", self.step, part, self.processes.rank))  # drop path
            waits = self.processes.count > 1 and part < parts - 1
            quiet: AbstractContextManager[Any] = self.parallel.no_sync() if waits else nullcontext()
            with quiet:
                with self._autocast():
                    results = self.parallel(batch)
                loss = results["loss"]
                # a loss that is not finite may have a finite gradient: make sure that it has not
                (loss * torch.where(loss.detach().isfinite(), 1 / parts, float("nan"))).backward()
            self._add({name: value.detach().float() / parts for name, value in results.items()})
        norm = clip_gradient(self.parameters, self.optim.clip_norm)
        self._add({"grad_norm": norm})
        self.bad_step = torch.where((self.bad_step < 0) & ~norm.isfinite(), self.step, self.bad_step)
        lr = learning_rate(self.step, self.total, self.warmup, self.optim)
        guarded_step(self.optimizer, lr, (self.bad_step >= 0).float())
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.summed += 1

    def _receive(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        auto = self.run.precision == "auto" and self.device.type == "cuda"
        enabled = auto or self.run.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _collect(self, stop: int) -> tuple[Metrics, int]:
        """Means since the last call over all processes, and the signal that any of them received: the one sync."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] for name in names]) / self.summed
        extra = means.new_tensor([float(stop)])
        values = self.processes.mean(torch.cat([means, extra])).tolist()
        self._check_finite()
        self.sums, self.summed = {}, 0
        metrics = dict(zip(names, values, strict=False))
        metrics["lr"] = learning_rate(self.step - 1, self.total, self.warmup, self.optim)
        metrics["epoch"] = self.step / self.batches.steps_per_epoch
        heard = values[-1] > 0 and (stop or signal.SIGTERM)
        return metrics, int(heard)

    def _check_finite(self) -> None:
        bad = int(self.bad_step)
        if bad >= 0:
            raise FloatingPointError(
                f"loss or gradient not finite at step {bad} of {self.title}; nothing was updated since, the last good "
                f"checkpoint is in {str(self.run.folder / 'checkpoints')!r}. A smaller optimizer.lr, "
                "optimizer.clip_norm or run.precision float32 may help"
            )

    def _evaluate(self) -> Metrics:
        if self.test is None:
            return {}
        size = max(self.run.batch_size // (self.run.accumulate * self.processes.count), 1)
        sets = ((self.batches.images, TRAIN_SHARE), (self.test, None))
        chosen = [EvaluationBatches(images, size, self.processes, limit) for images, limit in sets]
        loaders = [evaluation_loader(batches, self.workers) for batches in chosen]
        return self.objective.evaluate(loaders[0], loaders[1], self.processes)

    def _save(self, best: bool) -> Path | None:
        self._check_finite()
        if not self.processes.first:
            return None
        everything = self.objective.state_dict()
        weights = {name: value for name, value in everything.items() if not name.startswith("teacher.")}
        state = {
            "step": self.step,
            "objective": weights,
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums,
            "summed": self.summed,
            "best": self.best,
            "config": self.resolved,
            "images": self.fingerprint,
            "processes": self.processes.count,
        }
        return save_checkpoint(self.run.folder / "checkpoints", self.step, state, best=best)

    def _restore(self) -> None:
        folder = self.run.folder / "checkpoints"
        state = load_newest(folder, print)
        step = state["step"] if state else 0
        if self.processes.mean(torch.tensor(step, dtype=torch.float64, device=self.device)).item() != step:
            raise CheckpointError(f"processes found different checkpoints in {str(folder)!r}; it must be shared")
        if state is None:
            return
        refuse_changes(self.run.folder, state["config"], self.resolved)
        if state["images"] != self.fingerprint:
            raise FolderError(f"data must be the {state['images']} that the run began with, got {self.fingerprint}")
        if state["processes"] != self.processes.count and self.processes.first:
            print(f"{state['processes']} processes before, {self.processes.count} now: equal to rounding, not in bits")
        missing, unexpected = self.objective.load_state_dict(state["objective"], strict=False)
        if unexpected or any(not name.startswith("teacher.") for name in missing):
            raise CheckpointError(f"checkpoint in {str(folder)!r} does not fit: {missing=}, {unexpected=}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.summed = step, state["best"], state["summed"]
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        if self.processes.first:
            print(f"{self.title.strip()}: goes on from step {step} of {self.total}")
