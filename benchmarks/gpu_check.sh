#!/usr/bin/env bash
# What `make gpu-check` runs on a machine with a GPU: tests, checkers, tuning, and the benchmarks of training and of the
# kernels, in under 9 minutes, with whatever Python is there ($PYTHON), nothing installed and nothing fetched. Logs and
# data go to $RESULTS.
# A failing step does not stop the others; the exit code says whether any failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-gpu-results}
export PYTHONPATH=. PYTHONUNBUFFERED=1
failed=0
mkdir -p "$RESULTS" || exit 1
: > "$RESULTS/summary.txt"

say() { echo "$*" | tee -a "$RESULTS/summary.txt"; }

# step NAME SECONDS LOG COMMAND...: run it, at most so long, and say in one line how it went.
step() {
  local name=$1 limit=$2 log=$RESULTS/$3 start=$SECONDS code verdict
  shift 3
  echo "== $name: $*" | tee -a "$log"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >> "$log" 2>&1
  code=$?
  case $code in
    0) verdict=ok ;;
    124 | 137) verdict="FAILED: over its limit of $limit s" failed=1 ;;
    *) verdict="FAILED with exit code $code" failed=1 ;;
  esac
  say "$name: $verdict in $((SECONDS - start)) s ($(tail -n 1 "$log" | cut -c 1-160))"
}

$PYTHON - << 'CODE' 2>&1 | tee -a "$RESULTS/summary.txt" || { say "gpu-check: stopped, no GPU to check on"; exit 1; }
import platform
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("gpu-check: PyTorch sees no GPU on this machine")
import triton

print(f"{torch.cuda.get_device_name()}: Python {platform.python_version()}, torch {torch.__version__}, "
      f"Triton {triton.__version__}, CUDA {torch.version.cuda}")
CODE

rm -f "$RESULTS"/{tests,bench}.log
workers=$($PYTHON -c "import xdist" 2> /dev/null && echo "-n 6")
# shellcheck disable=SC2086  # no workers, no words
step tests 160 tests.log $PYTHON -m pytest -q -p no:cacheprovider -rfE --durations 5 $workers tests/gpu tests \
  --ignore tests/train --ignore tests/measure --ignore tests/kernels/test_resources.py \
  --ignore tests/tiny.py --ignore tests/processes.py --ignore tests/killing.py --ignore tests/attending.py \
  --ignore tests/attended.py --ignore tests/families.py --ignore tests/finetuned.py --ignore tests/shrunk.py \
  --ignore tests/test_architecture.py --ignore tests/test_readme.py
if sanitizer=$(command -v compute-sanitizer); then
  step "small calls" 40 tests.log $PYTHON -m dtm_triton.measure.small_calls # compiles what the checkers run
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 40 tests.log \
      "$sanitizer" --tool $tool --error-exitcode 9 $PYTHON -m dtm_triton.measure.small_calls
  done
else
  say "memcheck, racecheck: skipped, compute-sanitizer is not on the PATH"
fi
step tuning 90 bench.log $PYTHON -m dtm_triton.measure.tune --op match --minutes 1.25 --write "$RESULTS"
step training 65 bench.log $PYTHON -m dtm_triton.train.bench --device cuda --batch 128 --repetitions 4 --out "$RESULTS"
step benchmark 100 bench.log $PYTHON -m dtm_triton.measure.bench --device cuda --seconds 0.2 --minutes 1.4 --data "$RESULTS"
if [ $failed = 0 ]; then say "gpu-check: all steps passed"; else say "gpu-check: a step FAILED"; fi
exit $failed
