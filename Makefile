# `make train` and `make test` need Python >= 3.11 and nothing else: they create .venv and install into it.
.DEFAULT_GOAL := help
.PHONY: help install train test test-all lint format docs bench gpu clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
RANKS ?= 2
ARGS ?=
PART ?=
# The ranks of one machine share its cores; torchrun alone would give each rank one thread.
CORES = $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
train bench: export OMP_NUM_THREADS ?= $(shell echo $$(( ($(CORES) + $(RANKS) - 1) / $(RANKS) )))
# The ranks meet in a private file: `torchrun --standalone` opens a port to the network and unpickles what it reads there.
TORCHRUN = $(BIN)/torchrun --nproc-per-node $(RANKS) --rdzv-backend c10d --rdzv-conf store_type=file \
	--rdzv-endpoint "$$(mktemp -d)/rendezvous" --local-addr 127.0.0.1

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## create .venv and install bigvision into it (again when the dependencies changed)

# The first Python that runs, is new enough and can make virtual environments (a version manager's shim may be none of these).
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing bigvision into $(VENV): once, most of it is torch. A progress line at least every 15 s."
	@for python in python3 python3.13 python3.12 python3.11; do \
		if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			exec $$python -m venv $(VENV); \
		fi; \
	done; echo 'bigvision needs Python >= 3.11 with its venv module; none was found on PATH' >&2; exit 1
	@$(BIN)/python .ci/install.py
	@touch $@

train: $(STAMP)  ## train on two ranks, by default recipes/digits.yaml: make train ARGS="--train.epochs 2" RANKS=4
	@echo "Training on $(RANKS) ranks: launch/train.py $(ARGS) (the first lines follow when torch is imported)"
	@$(TORCHRUN) launch/train.py $(ARGS)
	@echo
	@echo "Next:"
	@echo "  open the page that is named above as report in a browser: curves, checkpoints, faults, classes, images"
	@echo "  $(BIN)/bigvision train --data.train imagefolder:FOLDER --data.val imagefolder:FOLDER   # your images: FOLDER/CLASS/*.jpg"
	@echo "  $(BIN)/bigvision train recipes/digits.yaml --print-config   # every setting, its value and where it comes from"
	@echo "  make test   # does everything work on this machine?"

# Three at a time, since ranks often wait for each other, with one thread each, in the order of tests/conftest.py; then what needs
# the machine to itself. ARGS may leave no test (pytest's exit code 5) for one of the two.
test test-all: export OMP_NUM_THREADS ?= 1
# Where it is set, each of the many programs that tests start would compile the package again.
test test-all: export PYTHONDONTWRITEBYTECODE :=
test: $(STAMP)  ## run the tests, without the long matrices
	@$(BIN)/python -m pytest -m "not long and not alone" -n 3 --dist loadfile --no-loadscope-reorder $(ARGS); first=$$?; \
	$(BIN)/python -m pytest -m "not long and alone" $(ARGS); second=$$?; \
	case $$first$$second in 00 | 05 | 50) ;; *) exit 1 ;; esac

test-all: $(STAMP)  ## run every test, or those of PART=tests/engine: hours; goes on where it was stopped
	@$(BIN)/python -m tests.parts $(PART) -- $(ARGS)

lint: $(STAMP)  ## check style, format and the types of the public API
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs  ## write the reference of all keys, and build the documents as a site in build/site
	$(BIN)/python -m tests.docs.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/docs: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	@touch $@

bench: $(STAMP)  ## measure steps beside their peers, on one rank and on two, checkpoints, the loader, imports, compilation, starts
	$(BIN)/python -m benchmarks.step_time $(ARGS)
	$(TORCHRUN) -m benchmarks.step_time $(ARGS)
	$(TORCHRUN) -m benchmarks.zero_time $(ARGS)
	$(TORCHRUN) -m benchmarks.pipeline_time $(ARGS)
	$(TORCHRUN) -m benchmarks.checkpoint_time $(ARGS)
	$(BIN)/python -m benchmarks.data_time $(ARGS)
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.optimizer_time
	$(BIN)/python -m benchmarks.compile_time
	$(BIN)/python -m benchmarks.drop_path_time
	$(BIN)/python -m benchmarks.recompute_time
	env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.start_time

# ARGS goes to the tests. One part of the benchmark alone: .venv/bin/python -m benchmarks.gpu --part resnet_50
gpu: $(STAMP)  ## on a machine with GPUs: the tests of CUDA (minutes), then training steps beside other loops (half an hour)
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "error: torch sees no CUDA device")'
	$(BIN)/python -m pytest tests/cuda $(ARGS)
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.optimizer_time --device cuda
	$(BIN)/python -m benchmarks.determinism_time --device cuda
	$(BIN)/python -m benchmarks.kernel_time --device cuda

clean:  ## remove .venv and caches; checkpoints stay
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
