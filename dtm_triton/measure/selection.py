"""Which cases a command works on: all, those of some ops, or one shape given on the command line."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import Any

import torch

from dtm_triton.measure.cases import OPS, Case

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """--op, and what makes a shape: --batch, --tokens, --channels, --dtype, --schedule, --protected."""
    group = parser.add_argument_group("cases", "without a shape: the ops' usual cases")
    group.add_argument("--op", choices=OPS, nargs="+", default=list(OPS), help="only these")
    group.add_argument("--batch", type=int)
    group.add_argument("--tokens", type=int)
    group.add_argument("--channels", type=int)
    group.add_argument("--dtype", choices=DTYPES)
    group.add_argument(
        "--schedule", type=parse_schedule, nargs="+", help="iterations x tokens removed: 14x14, or 5+4+4"
    )
    group.add_argument("--protected", type=int, choices=(0, 1, 2))


def chosen_cases(arguments: argparse.Namespace, usual: list[Case]) -> list[Case]:
    """The usual cases of the ops asked for; with a shape one case for each op, the rest taken from its first usual one.

    >>> parser = argparse.ArgumentParser()
    >>> add_case_arguments(parser)
    >>> usual = [Case(op="merge", batch=128, tokens=196, channels=768, schedules=((14,) * 7,))]
    >>> [case.name for case in chosen_cases(parser.parse_args(["--op", "merge", "--batch", "8"]), usual)]
    ['merge 8x196x768 bfloat16 7x14']
    """
    cases = [case for case in usual if case.op in arguments.op]
    shape: dict[str, Any] = {
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "channels": arguments.channels,
        "dtype": DTYPES[arguments.dtype] if arguments.dtype else None,
        "schedules": tuple(arguments.schedule) if arguments.schedule else None,
        "protected": arguments.protected,
    }
    shape = {name: value for name, value in shape.items() if value is not None}
    if not shape:
        return cases
    if "tokens" in shape and "schedules" not in shape:
        shape["schedules"] = ((max(1, arguments.tokens // 14),) * 7,)
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.op, case)
    return [replace(case, **_fitting(case, shape)) for case in first.values()]


def _fitting(case: Case, shape: dict[str, Any]) -> dict[str, Any]:
    """Only dtm_loss takes several schedules."""
    schedules = shape.get("schedules")
    if case.op == "dtm_loss" or not isinstance(schedules, tuple):
        return shape
    return shape | {"schedules": schedules[:1]}


def parse_schedule(text: str) -> tuple[int, ...]:
    """Tokens removed in each iteration.

    >>> parse_schedule("3x14"), parse_schedule("5+4")
    ((14, 14, 14), (5, 4))
    """
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        return (int(found[2]),) * int(found[1])
    if re.fullmatch(r"\d+(\+\d+)*", text):
        return tuple(int(part) for part in text.split("+"))
    raise argparse.ArgumentTypeError(f"a schedule is written 14x14 or 5+4+4, got {text!r}")
