"""How a command line chooses a recipe and overrides its fields, and how a command ends."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from dtm_triton.train.config import FinetuneConfig, PretrainConfig, ProbeConfig
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes, join_processes
from dtm_triton.train.engine.stop import Stopped

Config = TypeVar("Config", PretrainConfig, FinetuneConfig, ProbeConfig)


def parse(recipes: dict[str, Callable[[], Config]], default: str, program: str, argv: Sequence[str] | None) -> Config:
    """The configuration that a command line asks for: `--recipe NAME` chooses one, other options override fields.

    Raises SystemExit after `--help` or a mistake, as argparse does.
    """
    import tyro

    words = list(sys.argv[1:] if argv is None else argv)
    name = default
    for place, word in enumerate(words):
        if word == "--recipe" or word.startswith("--recipe="):
            name = word.partition("=")[2] or (words[place + 1] if place + 1 < len(words) else "")
            del words[place : place + (1 if "=" in word else 2)]
            break
    names = ", ".join(recipes)
    if name not in recipes:
        near = " or ".join(difflib.get_close_matches(name, recipes, n=2)) or f"one of {names}"
        sys.exit(f"{program}: --recipe must be {near}, got {name!r}; `--help` names all")
    recipe = recipes[name]()
    text = f"--recipe NAME chooses one of: {names}. This is {name!r}; every field of it can be overridden.\n\n"
    try:
        return tyro.cli(type(recipe), prog=program, default=recipe, args=words, description=text)
    except ValueError as error:  # from a __post_init__
        sys.exit(f"{program}: {error}")


def run_command(program: str, work: Callable[[Processes], object], device: str, timeout_minutes: float = 10.0) -> None:
    """Do the work of a command, in one process or in those of torchrun.

    Ctrl-C and SIGTERM end with the exit codes 130 and 143 and without a traceback; a value or a folder that cannot be
    used, a full disk, a loss that is not finite, or another process that is gone, with 1 and one line.
    """
    # outside the loop, which saves first, a SIGTERM too should run what is in `finally`
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rank = int(os.environ.get("RANK", 0))
    speaker = f"{program}, process {rank}" if rank else program
    try:
        with join_processes(device, timeout_minutes) as processes:
            work(processes)
    except (Stopped, KeyboardInterrupt) as stopped:
        sys.exit(getattr(stopped, "exit_code", 128 + signal.SIGINT))
    except (FolderError, FloatingPointError, OSError) as error:
        sys.exit(f"{speaker}: {_message(error)}")
    except ValueError as error:
        if not _is_ours(error):
            raise
        sys.exit(f"{speaker}: {error}")
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        sys.exit(f"{speaker}: another process has ended, or was not heard of in time ({_first_line(error)})")


def _message(error: BaseException) -> str:
    """What an error says; one that a loader's worker raised comes with that worker's traceback around it.

    >>> _message(OSError("Caught OSError in DataLoader worker process 0.\\nOriginal Traceback ...\\nOSError: no: file"))
    'no: file'
    """
    text = str(error).strip()
    return text.split("\n")[-1].partition(": ")[2] if "Original Traceback" in text else text


def _is_ours(error: ValueError) -> bool:
    """Whether this package raised it: then it names what a person gave, and a traceback would only hide that."""
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(__file__).resolve().parents[1] in Path(place).resolve().parents


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether torch.distributed lost its peers; gloo tells so by a plain RuntimeError."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
