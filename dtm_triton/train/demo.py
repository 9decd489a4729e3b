"""The whole road on digits, in about two minutes on two CPU cores: `python -m dtm_triton.train.demo`.

Trains a small convolutional teacher, pre-trains one student on its tokens as they are and one by Dynamic Token
Morphing, and probes both beside raw pixels, an untrained student and the teacher. Every stage goes on where it was
stopped, at any moment and in any way, and ends with the same bits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from dtm_triton.train import recipes
from dtm_triton.train.build import build_student, build_targets
from dtm_triton.train.command_line import run_command
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.data.augment import Normalise
from dtm_triton.train.data.draws import fold
from dtm_triton.train.engine.checkpoint import write_text
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.run_folder import refuse_changes
from dtm_triton.train.pretrain import pretrain, resolve
from dtm_triton.train.probe import Metrics, exported_features, probe
from dtm_triton.train.side_by_side import die_with_parent, run_side_by_side

HELD_OUT = 360  # digits
TITLES = {"tokenwise": "token-wise student", "dtm": "DTM student       "}
LEARNT = """What it shows: from masked images the DTM student learnt to predict its teacher's features. A linear
  probe is right on {dtm:.1f} % of the digits; on the same student's untrained features, on {untrained:.1f} %."""
NOT_LEARNT = "What it shows: nothing; the DTM student is no better than untrained, within the error. Train for longer."
LIMITS = """What it does not show: learning without labels, for the teacher was trained with all of them; nor that
  morphing helps: one seed on {held_out} held-out digits has a standard error of about {error:.1f} points, and digits
  of 36 tokens are too small a task to tell the two students apart."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The demo's stages, in a folder."""

    folder: Path = Path("runs/demo")
    """Everything is written here; stages found here are not repeated."""
    epochs: int = recipes.demo().run.epochs
    """Pre-training of each student."""
    teacher_epochs: int = recipes.demo().teacher.epochs
    """Training of the teacher."""
    only: Literal["tokenwise", "dtm"] | None = None
    """Train this student and stop: what the demo does side by side, in processes of their own."""

    def students(self) -> dict[str, PretrainConfig]:
        """The two students' configurations, by the names of their folders."""
        recipe = {"tokenwise": recipes.demo_tokenwise(), "dtm": recipes.demo()}
        return {name: self._placed(config, name) for name, config in recipe.items()}

    def _placed(self, config: PretrainConfig, name: str) -> PretrainConfig:
        teacher = replace(config.teacher, weights=self.folder / "teacher", epochs=self.teacher_epochs)
        return replace(config, teacher=teacher, run=replace(config.run, folder=self.folder / name, epochs=self.epochs))


def run_demo(demo: Demo, processes: Processes) -> dict[str, Metrics]:
    """Run every stage that is not finished; returns {row: {"knn", "linear_probe"}}, also kept in results.json."""
    students = demo.students()
    path = demo.folder / "results.json"
    resolved = json.dumps({name: json.loads(resolve(config)) for name, config in students.items()})
    if path.is_file():
        saved = json.loads(path.read_text())
        refuse_changes(demo.folder, json.dumps(saved["config"]), resolved)
        print(f"The demo in {demo.folder} is finished; remove the folder to run it again.")
        return saved["results"]
    config = students["dtm"]
    teacher = build_targets(config, processes).to(processes.device).eval()
    words = [sys.executable, str(Path(__file__)), f"--folder={demo.folder}", f"--epochs={demo.epochs}"]
    words += [f"--teacher-epochs={demo.teacher_epochs}"]
    run_side_by_side({name: [*words, f"--only={name}"] for name in students})
    torch.manual_seed(fold(config.run.seed, "weights"))
    untrained = build_student(config.student, config.data, teacher.out_features).to(processes.device)
    normalise = Normalise(config.data.mean, config.data.std).to(processes.device)
    rows: dict[str, Callable[[Tensor], Tensor]] = {
        "raw pixels": lambda images: images.flatten(1),
        "untrained student": lambda images: untrained.features(normalise(images)),
        "token-wise student": exported_features(students["tokenwise"].run.folder / "student", config.data, processes),
        "DTM student": exported_features(config.run.folder / "student", config.data, processes),
        "teacher (saw all labels)": lambda images: teacher(images).mean(1),
    }
    results = {name: probe(features, config.data, processes) for name, features in rows.items()}
    text = json.dumps({"results": results, "config": json.loads(resolved)}, indent=2)
    write_text(path, text)
    return results


def describe(demo: Demo, results: dict[str, Metrics]) -> str:
    """The table, what it shows and does not show, and where everything lies."""
    lines = [f"Features of {HELD_OUT} held-out digits, frozen", f"{'':26}{'kNN':>8}{'linear probe':>16}"]
    for name, metrics in results.items():
        lines.append(f"{name:26}{100 * metrics['knn']:6.1f} %{100 * metrics['linear_probe']:14.1f} %")
    dtm, untrained = (100 * results[name]["linear_probe"] for name in ("DTM student", "untrained student"))
    error = (dtm * (100 - dtm) / HELD_OUT) ** 0.5
    learnt = (
        LEARNT if dtm - untrained > 4 * max(error, 1.0) else NOT_LEARNT
    )  # 4 standard errors, nearly 3 of a difference
    lines += ["", learnt.format(dtm=dtm, untrained=untrained), LIMITS.format(held_out=HELD_OUT, error=error)]
    student = demo.folder / "dtm"
    lines += ["", "Where everything lies:"]
    lines += [
        f"  {student / 'student'}: the DTM student as plain timm weights",
        f"  {student}: groups.png, masks.png, curves.png, metrics.jsonl, config.json, checkpoints/",
        f"  {demo.folder}: results.json, teacher/, tokenwise/",
        f"  tensorboard --logdir {demo.folder}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command behind `make demo`."""
    import tyro

    demo = tyro.cli(Demo, prog="python -m dtm_triton.train.demo", description=__doc__, args=argv)
    run_command("demo", partial(_report, demo), "auto")


def _report(demo: Demo, processes: Processes) -> None:
    if demo.only is not None:
        die_with_parent()
        pretrain(demo.students()[demo.only], processes, title=TITLES[demo.only])
        return
    results = run_demo(demo, processes)
    print("\n" + describe(demo, results))


if __name__ == "__main__":
    main()
