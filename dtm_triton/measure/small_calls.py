"""Every op once on small inputs of awkward sizes: a program to run under a memory or race checker.

compute-sanitizer --tool memcheck python -m dtm_triton.measure.small_calls

racecheck sees shared memory only, which the compiler manages. The barriers that are written by hand order memory that
it does not watch: for those the tests repeat calls and compare bits.
"""

from __future__ import annotations

import argparse
import sys

import torch

from dtm_triton.measure.cases import OPS, Case, call, make_inputs

SIZES = ((2, 50, 40, ((7, 6),)), (1, 197, 72, ((14, 14),)), (1, 300, 24, ((20, 20),)), (1, 1100, 20, ((500,),)))
"""Images, tokens, channels and schedule: fused, split, chunked and streamed matching, and edges of every tile."""


def cases() -> list[Case]:
    """Every op in every size that it takes."""
    found = []
    for batch, tokens, channels, schedules in SIZES:
        for op in OPS:
            chosen = (schedules[0][:1],) if op == "tome_step" else schedules * (1 + (op == "dtm_loss"))
            for dtype in (torch.bfloat16, torch.float32):
                found.append(Case(op=op, batch=batch, tokens=tokens, channels=channels, dtype=dtype, schedules=chosen))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("small_calls: PyTorch sees no GPU")
    device = torch.device(arguments.device)
    chosen = [case for case in cases() if arguments.only in case.name]
    for case in chosen:
        call(case, make_inputs(case, device), arguments.backend)()
    if device.type == "cuda":
        torch.cuda.synchronize()
    sys.stdout.write(f"{len(chosen)} calls\n")


if __name__ == "__main__":
    main()
