"""Tune launch settings on the GPU at hand: `python kernels/tune.py`, or `dtm-tune` where it is installed.

    dtm-tune                                      # the usual ops and shapes; writes kernels/tuned/FAMILY.json
    dtm-tune --op match --tokens 196 --minutes 5  # one op and shape
    dtm-tune --dry-run --target sm_90 --op merge  # no GPU: rank by compiled resources

Every candidate is checked before it is timed; an entry changes only for a gain above the noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dtm_triton.kernels import tables
from dtm_triton.kernels.precision import INTERPRETED
from dtm_triton.measure import dry_run, machine, tuned_table
from dtm_triton.measure.candidates import Fields
from dtm_triton.measure.cases import Case, call, gpu_cases, make_inputs
from dtm_triton.measure.selection import add_case_arguments, chosen_cases
from dtm_triton.measure.trials import Trial, Verdict, search, subjects


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="dtm-tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_case_arguments(parser)
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after about this long (30)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing for each candidate (0.2)")
    parser.add_argument("--write", type=Path, help="the table to change, or its folder, instead of kernels/tuned")
    parser.add_argument("--dry-run", action="store_true", help="rank by compiled resources, on any machine")
    parser.add_argument("--target", choices=dry_run.MULTIPROCESSORS, default="sm_90", help="of a dry run (sm_90)")
    options = parser.parse_args(arguments)
    cases = chosen_cases(options, gpu_cases())
    if options.dry_run:
        if INTERPRETED:
            parser.error("set TRITON_INTERPRET=0: the interpreter compiles nothing")
        rank_all(cases, options.target, options.write and table_path(options.write, options.target))
        return
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU to tune on; --dry-run ranks settings by compiled resources")
    device = torch.device("cuda", torch.cuda.current_device())
    family = tables.family(device)
    path = table_path(options.write or tables.FOLDER, family)
    tune_all(cases, family, device, path, minutes=options.minutes, seconds=options.seconds)


def table_path(place: Path, family: str) -> Path:
    """The table that a file or folder means.

    >>> table_path(Path("results"), "sm_90").as_posix(), table_path(Path("results/mine.json"), "sm_90").as_posix()
    ('results/sm_90.json', 'results/mine.json')
    """
    return place if place.suffix == ".json" else place / f"{family}.json"


def tune_all(
    cases: list[Case], family: str, device: torch.device, path: Path, *, minutes: float, seconds: float
) -> list[Verdict]:
    """Tune what the cases ask settings for, write the table after each, and print what changed.

    The time is shared: what one subject leaves over goes to those after it.
    """
    end = time.monotonic() + 60 * minutes
    found = subjects(cases, family, device)
    print(f"{machine.device_name(device)} ({family}): {len(found)} settings to tune, {minutes:g} minutes", flush=True)
    verdicts: list[Verdict] = []
    for place, subject in enumerate(found):
        now = time.monotonic()
        print(f"\n[{place + 1}/{len(found)}] {subject.name}, timed by {subject.case.name}", flush=True)
        if now > end:
            print("  no time left", flush=True)
            continue
        progress = Progress(end)
        deadline = now + (end - now) / (len(found) - place)
        try:
            verdict = search(subject, family, device, seconds=seconds, deadline=deadline, report=progress.show)
        except AssertionError as error:
            print(f"  not tuned: {error}", flush=True)
            continue
        verdicts.append(verdict)
        print(f"  {summary(verdict)}", flush=True)
        facts = {"family": family, "source": tuned_table.MEASURED} | _facts(device)
        tuned_table.write(path, tuned_table.merged(tuned_table.read(path), facts, [_entry(verdict)]))
    print_changes(verdicts, path)
    return verdicts


class Progress:
    """Prints one line a candidate, with the time that is left."""

    def __init__(self, end: float) -> None:
        self.end = end

    def show(self, number: int, count: int, trial: Trial) -> None:
        """A line on what became of candidate `number` of `count`."""
        left = max(0, round(self.end - time.monotonic()))
        result = trial.problem or f"{trial.microseconds:.1f} us (spread {trial.spread:.1f})"
        print(f"  {number}/{count}  {left // 60}:{left % 60:02d} left  {text(trial.fields)}: {result}", flush=True)


def summary(verdict: Verdict) -> str:
    """One line on one subject."""
    failed = [trial for trial in verdict.trials if trial.problem]
    notes = "".join(
        f", {count} {what}" for count, what in ((len(failed), "failed"), (verdict.untried, "not tried")) if count
    )
    if not verdict.changed:
        return f"unchanged: {verdict.old_us:.1f} us ({len(verdict.trials)} tried{notes})"
    gain = 100 * (1 - verdict.new_us / verdict.old_us)
    times = f"{verdict.old_us:.1f} us -> {verdict.new_us:.1f} us, {gain:.0f} % less"
    return f"{text(verdict.before)} -> {text(verdict.after)}: {times} ({len(verdict.trials)} tried{notes})"


def print_changes(verdicts: list[Verdict], path: Path) -> None:
    """What changed, what failed, and where it is."""
    changed = [verdict for verdict in verdicts if verdict.changed]
    print(f"\n{len(changed)} of {len(verdicts)} entries of {path} changed", flush=True)
    for verdict in changed:
        print(f"  {verdict.subject.name}: {summary(verdict)}")
    for verdict in verdicts:
        for trial in verdict.trials:
            if trial.problem:
                print(f"  failed: {verdict.subject.name} {text(trial.fields)}: {trial.problem}")


def rank_all(cases: list[Case], target: str, path: Path | None) -> None:
    """Rank what the cases ask settings for by compiled resources, and print it."""
    print(f"{target}: ranked by compiled resources, not measured", flush=True)
    entries: list[tuned_table.Entry] = []
    cpu = torch.device("cpu")
    with dry_run.kernels_allowed():
        found = subjects(cases, target, cpu)
    for place, subject in enumerate(found):
        print(f"\n[{place + 1}/{len(found)}] {subject.name}, launched by {subject.case.name}", flush=True)
        run = call(subject.case, make_inputs(subject.case, cpu), "triton")
        ranking = dry_run.rank(subject, run, target, lambda number, count, _: show_count(number, count))
        usual = next(ranked for ranked in ranking if not ranked.fields)
        for position, ranked in enumerate(ranking, 1):
            print(f"  {position:3}  {ranked_text(ranked)}")
        if ranking[0].spills < usual.spills:  # more programs on a multiprocessor are no proof of speed; no spills are
            entries.append((subject.op, subject.bucket, ranking[0].fields, {"compiled": ranked_text(ranking[0])}))
    print(f"\nranked by compiled resources, not measured; {len(entries)} defaults spill where others do not")
    for op, bucket, fields, _ in entries:
        print(f"  {op} [{bucket}]: {text(fields)}")
    if path is not None:
        facts = {"family": target, "source": tuned_table.RANKED} | _facts(None)
        tuned_table.write(path, tuned_table.merged(tuned_table.read(path), facts, entries))


def show_count(number: int, count: int) -> None:
    """Progress of a dry run, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r  compiled {number}/{count}", end="\n" if number == count else "", file=sys.stderr, flush=True)


def ranked_text(ranked: dry_run.Ranked) -> str:
    """One candidate's figures in a line."""
    if ranked.problem:
        return f"{text(ranked.fields)}: {ranked.problem}"
    return (
        f"stack {ranked.stack} B, {ranked.loop_spills} spills in loops, {ranked.programs} programs and {ranked.warps} "
        f"warps a multiprocessor, {ranked.registers} registers, {ranked.shared} B shared: {text(ranked.fields)}"
    )


def text(fields: Fields) -> str:
    """Changed fields for a reader.

    >>> text({}), text({"num_warps": 4, "rows": 8})
    ('defaults', 'num_warps=4 rows=8')
    """
    return " ".join(f"{name}={value}" for name, value in fields.items()) or "defaults"


def _entry(verdict: Verdict) -> tuned_table.Entry:
    evidence = {"case": verdict.subject.case.name, "us": round(verdict.new_us, 2)}
    if verdict.changed:
        evidence |= {"before": text(verdict.before), "before_us": round(verdict.old_us, 2)}
    return verdict.subject.op, verdict.subject.bucket, verdict.after, evidence


def _facts(device: torch.device | None) -> dict[str, str]:
    facts = machine.describe(device or torch.device("cpu"))
    return {name: facts[name] for name in ("device", "torch", "triton", "date") if device or name != "device"}


if __name__ == "__main__":
    main()
