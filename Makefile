# Each target sets up what it needs in .venv. PYTHON chooses the interpreter (3.11 to 3.13), CUDA the DALI build.
PYTHON ?= python3
CUDA ?= cuda13
RUN ?= runs/demo
RESULTS ?= runs/gpu
GPU_PYTHON ?= python3
STAGE ?= 1
BIN := .venv/bin
INSTALLED := .venv/.installed
OLD_TRITON := .venv/triton-3.6.0

.PHONY: install demo test test-slow fuzz lint bench bench-compare bench-save static tables gpu clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "needs Python 3.11 to 3.13")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(CUDA),test,dev]'
	touch $@

# Rendered words, a small MAE teacher, LMIM with it, the report: a few minutes on two cores.
demo: $(INSTALLED)
	test -e $(RUN)/data/data.mdb || $(BIN)/lmim data render --output $(RUN)/data
	$(BIN)/lmim pretrain --objective mae --preset tiny --data $(RUN)/data --output $(RUN)/mae \
		--steps 300 --batch-size 32 --optim.lr 1e-3 --optim.warmup-steps 30
	$(BIN)/lmim pretrain --objective lmim --preset tiny --data $(RUN)/data --output $(RUN)/lmim \
		--teacher $(RUN)/mae --steps 200 --batch-size 32 --optim.lr 1e-3 --optim.warmup-steps 30
	$(BIN)/lmim report $(RUN)/lmim
	@echo "Open $(RUN)/lmim/report.html in a browser."

# A process a core; `-n 0` shows output at once and stops in a debugger.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# csrc under sanitizers: 200,000 mutated images, 10,000 mutated databases.
fuzz: $(INSTALLED)
	PYTHONPATH=.:tests/data $(BIN)/python tests/csrc/fuzz.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Every operation against its floor and its rivals, on whatever this machine has.
bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,min,max,rounds

# Fails where an operation got more than 10 % slower than in the saved run on this device; saves the first run only.
bench-compare: $(INSTALLED)
	$(BIN)/python -m benchmarks.compare

bench-save: $(INSTALLED)
	$(BIN)/python -m benchmarks.compare --save

# Compiles every kernel configuration for three GPUs (none needed) into benchmarks/results, with the installed
# Triton and with the oldest one that we allow.
static: $(INSTALLED) $(OLD_TRITON)
	$(BIN)/python -m benchmarks.static --arch all --beside $(OLD_TRITON) --results benchmarks/results

$(OLD_TRITON):
	$(BIN)/pip install --quiet --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

# docs/BENCHMARKS.md from benchmarks/results.
tables: $(INSTALLED)
	$(BIN)/python -m benchmarks.tables

# A stage of what needs a CUDA device, with this machine's own Python, into RESULTS, within about three minutes:
# 1 right and how fast, 2 against rivals, 3 all checks, 4 launch configurations. COMMIT names the commit of a copy
# that is no checkout; LIMIT=600 gives the stage ten minutes; DRY=1 rehearses it on a CPU.
gpu:
	$(if $(COMMIT),LMIM_FAST_COMMIT=$(COMMIT)) $(GPU_PYTHON) -m benchmarks.gpu $(RESULTS) --stage $(STAGE) \
		$(if $(LIMIT),--seconds $(LIMIT)) $(if $(DRY),--dry-run)

clean:
	rm -rf .venv build *.egg-info lmim_fast/*.so
