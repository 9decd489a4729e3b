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
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dtm_triton.train.config import DataConfig, OptimizerConfig, RunConfig
from dtm_triton.train.data.batches import Batch, EvaluationBatches, MicroBatches, evaluation_loader, training_loader
from dtm_triton.train.data.draws import fold
from dtm_triton.train.data.images import open_images
from dtm_triton.train.engine.averages import Averages
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import Logbook, Metrics
from dtm_triton.train.engine.optimizer import build_optimizer, clip_gradient, guarded_step, learning_rate
from dtm_triton.train.engine.parallel import Parallel
from dtm_triton.train.engine.resume import resume
from dtm_triton.train.engine.run_folder import hold_folder, keep_apart, write_config
from dtm_triton.train.engine.saver import Saver
from dtm_triton.train.engine.skipped import SkippedImages
from dtm_triton.train.engine.state import fingerprint, training_tensors
from dtm_triton.train.engine.stop import Agreement, Stopped, StopRequest
from dtm_triton.train.engine.watch import Watch
from dtm_triton.train.maps.run_maps import RunMaps
from dtm_triton.train.objectives.objective import Objective

TRAIN_SHARE = 20_000  # training images an evaluation looks at, at most


class Trainer:
    """Trains an objective's network in a folder; continues what the folder holds.

    Args:
        objective: see `Objective`; it is moved to the device.
        data, optimizer, run: the configuration.
        processes: this process among those of the run.
        resolved: the whole configuration as JSON; a run only goes on with the one it began with.
        title: what people see in front of the progress.

    Raises:
        FolderError: data that is missing or empty, checkpoints that cannot be read, a configuration, data or a teacher
            other than what the folder's run began with.
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
        keep_apart(run.folder, [data.train_folder, data.test_folder])
        images = open_images(data, "train")
        assert images is not None
        self.batches = MicroBatches(images, data, run, processes, objective.draws())
        self.test = open_images(data, "test")
        self.total = run.epochs * self.batches.steps_per_epoch
        self.warmup = round(optimizer.warmup_epochs * self.batches.steps_per_epoch)
        self.skipped = SkippedImages(images.name, len(images.labels), data.max_corrupt)

        self.origin = {"images": images.fingerprint, "teacher": fingerprint(getattr(objective, "teacher", None))}
        self.objective = objective
        objective.to(self.device).train()
        self.parallel = Parallel(objective, run, processes)
        self.optimizer = build_optimizer(objective.network, optimizer)
        self.parameters = [p for p in objective.network.parameters() if p.requires_grad]
        self.step, self.best = 0, -math.inf
        self.on_disk, self.resumed = -1, -1  # the steps of the newest checkpoint and of the one this run began with
        self.watch = Watch(self.device)
        self.averages = Averages(processes)  # metrics since the last log line
        self.maps: RunMaps | None = None
        self.after_maps: Callable[[int], None] = lambda step: None
        """Called in all processes when maps have been made anew at a step."""
        if objective.maps is not None:
            grid = objective.network.grid
            self.maps = RunMaps(objective.maps, images, grid, run.folder, processes, data.workers, self.skipped.limit)
        resume(self)

    def fit(self) -> Metrics:
        """Train to the end and evaluate; returns the last evaluation, empty without held-out images.

        Raises Stopped after Ctrl-C or SIGTERM, FloatingPointError for a loss that is not finite: see the module;
        FolderError when too many images are unreadable, or checkpoints cannot be written again and again.
        """
        if self.step == self.total:
            return self._evaluate()
        run, per_epoch = self.run, self.batches.steps_per_epoch
        loader = training_loader(self.batches, self.step, self.total, self.workers, pin=self.device.type == "cuda")
        last: Metrics = {}
        held = hold_folder(run.folder) if self.processes.first else nullcontext()
        with held, StopRequest() as stop, self._open_book() as book, loader as incoming:
            agreement, saver = Agreement(self.processes), Saver(run.folder / "checkpoints", self.processes)
            since, logged = time.monotonic(), self.step
            while self.step < self.total:
                since += self._begin_step(saver, book, lambda: agreement.exchange(stop.number))
                self._train_step(incoming)
                leaving = agreement.exchange(stop.number)
                end = self.step == self.total
                epoch = self.step // per_epoch if self.step % per_epoch == 0 else 0
                if self.step % run.log_every == 0 or end:
                    metrics = self._collect(book, saver)
                    now = time.monotonic()
                    metrics["images_per_second"] = (self.step - logged) * run.batch_size / (now - since)
                    since, logged = now, self.step
                    book.write(self.step, metrics)
                if end or _due(epoch, run.evaluate_every):
                    saver.settle()  # an evaluation starts processes, which must not copy a thread's half-done work
                    if last := self._evaluate():
                        book.write(self.step, last)
                score = last.get(self.objective.judged_by, -math.inf)
                improved, self.best = score > self.best, max(score, self.best)
                kept = _due(epoch, run.keep_every)
                if end or improved or leaving or kept or self.step % run.checkpoint_every == 0:
                    self._save(saver, book, improved, f"end of epoch {epoch}" if kept else "")
                if leaving and not end:
                    self._leave(book, leaving, saver.finish())
            agreement.finish()
            if trouble := saver.finish():
                raise FolderError(f"the last {trouble}")
        return last

    def first_rows(self, count: int) -> Batch:
        """The first `count` images of the first step, at most a batch of them, with their maps if there are any."""
        batch = self.batches.rows(0, 0, min(count, self.run.batch_size))
        if self.maps is not None:
            self.maps.add_to(batch)
        return batch

    def _leave(self, book: Logbook, number: int, trouble: str | None) -> NoReturn:
        if trouble:
            raise FolderError(f"stopped at step {self.step}; its {trouble}")
        book.say(f"{self.title.strip()}: stopped at step {self.step}, saved; the same command goes on from here")
        raise Stopped(number)

    def _open_book(self) -> Logbook:
        """Begin to write into the folder, which this process holds."""
        if self.processes.first:
            write_config(self.run.folder, self.resolved)
        return Logbook(self.run.folder, self.title, self.step, self.total, self.processes.first)

    def whole_network(self) -> nn.Module:
        """The trained network with all its weights, to export; every process must call it."""
        return self.parallel.whole_network()

    def _begin_step(self, saver: Saver, book: Logbook, leaving: Callable[[], int]) -> float:
        """What happens between epochs: attention maps are made anew when they are due. Returns the seconds it took.

        The checkpoint before them is on the disk first: a run that ends in the middle of them goes on there.
        """
        self.objective.epoch, place = divmod(self.step, self.batches.steps_per_epoch)
        if place or self.maps is None or not self.maps.due(self.objective.epoch):
            return 0.0
        began = time.monotonic()
        if self.on_disk != self.step:
            self._save(saver, book, best=False, why="")
        trouble = saver.finish()
        if trouble:
            book.say(trouble)

        def attend(images: Tensor) -> Tensor:
            with self._autocast():
                return self.objective.attend(images)

        def check() -> None:
            if number := leaving():
                self._leave(book, number, trouble)

        self.maps.refresh(self.step, attend, check, book.say, go_on=self.resumed == self.step)
        self.after_maps(self.step)
        return time.monotonic() - began

    def _train_step(self, loader: Iterator[Batch]) -> None:
        run, parts = self.run, self.run.accumulate
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            batch = next(loader)
            self.skipped.note(batch.pop("skipped"))
            if self.maps is not None:
                self.maps.add_to(batch)
            batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            self.objective.seed_draws(run.seed, self.step, self.processes.rank)
            torch.manual_seed(fold(run.seed, "network", self.step, part, self.processes.rank))  # drop path
            with self.parallel.backward_of(last=part == parts - 1):
                with self._autocast():
                    results = self.parallel(batch)
                loss, value = results["loss"], results["loss"].detach()
                # a loss that is not finite may have a finite gradient: make sure that it has not
                (loss * torch.full_like(value, 1 / parts).masked_fill(~value.isfinite(), math.nan)).backward()
            total += value / parts
            self.averages.add(results, parts)
        norm = clip_gradient(self.parameters, self.optim.clip_norm)
        self.averages.add({"grad_norm": norm})
        broken = self.watch.look(self.step, total, norm)
        lr = learning_rate(self.step, self.total, self.warmup, self.optim)
        guarded_step(self.optimizer, lr, broken)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.averages.step()
        self.objective.after_step(self.step / self.total)

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.run.half_precision(self.device)
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _collect(self, book: Logbook, saver: Saver) -> Metrics:
        """Means since the last call, and what people must know: the one place of a step where the host waits."""
        means = self.averages.means()
        self._check_finite()
        self.averages.clear()
        found = self.processes.gather((self.watch.spike(), sorted(self.skipped.fresh)))
        if news := self.skipped.tell(number for _, numbers in found for number in numbers):
            book.say(news)
        if spikes := [spike for spike, _ in found if spike is not None]:
            self._tell_spike(min(spikes), book, saver)
        metrics = {**means, "lr": learning_rate(self.step - 1, self.total, self.warmup, self.optim)}
        if self.skipped.known:
            metrics["skipped_images"] = float(len(self.skipped.known))
        return {**metrics, "epoch": self.step / self.batches.steps_per_epoch}

    def _tell_spike(self, spike: tuple[int, float, float], book: Logbook, saver: Saver) -> None:
        if self.processes.first:
            step, loss, usual = spike
            text = f"loss {loss:.4g} at step {step} where {usual:.4g} was usual"
            kept = saver.protect(step, text)
            book.say(f"{self.title.strip()}: {text}; " + (f"{kept.name} before it is kept" if kept else "none is kept"))

    def _check_finite(self) -> None:
        bad = self.watch.bad_step()
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
        with self._autocast():
            metrics = self.objective.evaluate(loaders[0], loaders[1], self.processes)
        return self.processes.gather(metrics)[0]  # which one is best must not hang on a processor's rounding

    def _save(self, saver: Saver, book: Logbook, best: bool, why: str) -> None:
        self._check_finite()
        plain = {
            "step": self.step,
            **self.averages.plain(),
            "usual_loss": self.processes.mean(self.watch.usual).tolist(),
            "skipped": sorted(self.skipped.known),
            "best": None if self.best == -math.inf else self.best,
            "config": self.resolved,
            "processes": self.processes.count,
            **self.origin,
        }
        tensors = training_tensors(self.objective, self.optimizer)
        beside = self.maps.path if self.maps is not None else None
        if trouble := saver.save(self.step, tensors, plain, best=best, why=why, beside=beside):
            book.say(trouble)
        self.on_disk = self.step


def _due(epoch: int, every: int) -> bool:
    """Whether something that happens every so many epochs does at the end of this one; 0 is no epoch's end."""
    return bool(epoch and every and epoch % every == 0)
