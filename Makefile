# `make demo` and `make test` need Python 3.11 or newer and make, nothing else; every other target builds on them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-all lint docs wheel benchmark study teacher clean

help:
	@echo "make demo       install, then teacher -> trajectories -> student -> tuned student -> report (five to six minutes on two cores with AVX-512)"
	@echo "make test       install, then lint, type check and tests"
	@echo "make test-all   the long tests too: browser, fuzzing, matrices"
	@echo "make docs       the documentation site in docs/site; a dead link fails"
	@echo "make wheel      a wheel in dist/, with the emoji teacher and all recipes"
	@echo "make benchmark  speed and memory, as ratios measured side by side"
	@echo "make study      the table of docs/results.md: every variant, three seeds (hours)"
	@echo "make teacher    rebuild the embedded emoji teacher from its sources (hours on two cores)"

# torch first: DeepSpeed's archive imports it while it is built, so nothing after it may build in isolation.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "mlcm-rl needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch setuptools wheel ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev,emoji,hanzi,kolors,label,onnx,quantised]'
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[deepspeed]' || echo 'DeepSpeed did not build: its tests will be skipped'
	touch $@

$(VENV)/documented: $(VENV)/installed
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/mlcm run recipes/emoji_demo.yaml
	$(BIN)/python recipes/emoji/check_demo.py runs/emoji_demo

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: test $(VENV)/documented
	$(PIP) install -q -c constraints.txt --only-binary :all: atheris || echo 'no atheris for this machine: its tests will be skipped'
	$(BIN)/python -m pytest -q -m slow --timeout 3600

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/documented
	$(BIN)/sphinx-build -q -W --keep-going -c docs . docs/site
	@echo docs/site/index.html

wheel: $(VENV)/installed
	$(PIP) wheel -q --no-deps --no-build-isolation -w dist .

benchmark: $(VENV)/installed
	$(BIN)/python tests/benchmarks/distillation.py
	$(BIN)/python tests/benchmarks/preference.py
	$(BIN)/python tests/benchmarks/before_after.py
	$(BIN)/python tests/benchmarks/teacher.py
	$(BIN)/python tests/benchmarks/store.py
	$(BIN)/python tests/benchmarks/quantised.py

study: $(VENV)/installed
	$(BIN)/python recipes/emoji/study/variants.py

teacher: $(VENV)/installed
	$(BIN)/python recipes/emoji/build/rebuild.py

clean:
	rm -rf $(VENV) build docs/site *.egg-info .pytest_cache .ruff_cache .mypy_cache
