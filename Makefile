# Two commands: `make demo` pre-trains a ViT on real images, `make test` runs every test. Both set up .venv first.
# On a machine with a GPU `make gpu-check` tests, tunes and measures with the Python that is there: see its script.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

RESULTS ?= gpu-results

.PHONY: demo test gpu-check clean

demo: $(STAMP)
	$(BIN)/python -m dtm_triton.train.demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --durations 10

gpu-check:
	PYTHON="$(PYTHON)" RESULTS="$(RESULTS)" benchmarks/gpu_check.sh

# Debian's python3 may come without ensurepip; its pip then fills the environment from outside.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[train,test]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info runs
