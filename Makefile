# Every target works on a fresh machine with Python 3.11+ and pip: the first one that runs makes .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench fuzz types gpu-test gpu-bench clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/compose demo --out runs/demo --force

# Two groups at a time, for two cores; each prints what it found when it is done, and the next one starts. New folders are in "rest".
IN_presets := tests/routers/presets
IN_routers := tests/routers --ignore=tests/routers/presets
IN_models := tests/engine tests/evaluation tests/fewshot tests/demo
IN_commands := tests/cli tests/benchmarks
IN_index := tests/hub_index tests/hostile
IN_rest := tests $(addprefix --ignore=tests/,routers engine evaluation fewshot demo cli benchmarks hub_index hostile)
GROUPS := presets routers rest index models commands

test: .venv/installed
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going $(addprefix test-,$(GROUPS))

$(addprefix test-,$(GROUPS)): test-%: .venv/installed
	$(BIN)/python -P -m pytest -q -p no:cacheprovider $(IN_$*)

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory types

# mypy sees the namespace through a folder of links, because four of its packages lie beside compose/ (pyproject's package-dir).
types: .venv/installed
	rm -rf build/view && mkdir -p build/view/compose
	ln -s $(CURDIR)/compose/* build/view/compose/
	for package in routers retriever kernels hub_index; do ln -s $(CURDIR)/$$package build/view/compose/$$package; done
	cd build/view && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml compose

bench: .venv/installed
	$(BIN)/python benchmarks/run.py --out benchmarks/results

# Hostile input, fifty times what the tests run: an hour or so. SEED=2 makes another run.
SEED ?= 1
fuzz: .venv/installed
	$(BIN)/python -P benchmarks/hostile.py --mutations 1000000 --examples 50000 --texts 150000 --repeats 500 --seed $(SEED)

gpu-test: .venv/installed
	$(BIN)/python -P -m pytest -q -m gpu tests/gpu tests/engine/test_diagnostics.py tests/engine/test_paging.py

gpu-bench: .venv/installed
	mkdir -p runs
	$(BIN)/python benchmarks/gpu/ops.py --device cuda --out runs/gpu_ops.jsonl
	$(BIN)/python benchmarks/gpu/slices.py --device cuda --out runs/gpu_slices.jsonl
	$(BIN)/python benchmarks/gpu/llama.py --device cuda --out runs/gpu_llama.jsonl
	$(BIN)/python benchmarks/gpu/paging.py --device cuda --out runs/gpu_paging.jsonl

clean:
	rm -rf .venv build dist runs *.egg-info
