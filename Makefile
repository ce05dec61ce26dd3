# Two commands are enough: `make reproduce` and `make test`. Each sets itself up on a fresh machine (Python >= 3.11 and make).
# Without make (Windows): python -m venv .venv, activate it, pip install -c constraints.txt -e ".[make,gpu,cluster,data,captions,notebooks,dev]", then python -m memkit reproduce.

PYTHON ?= python3
VENV   ?= .venv
PROFILE ?= smoke
BIN    := $(VENV)/bin
PIP_ARGS := -c constraints.txt -e .[make,gpu,cluster,data,captions,notebooks,dev]
READY  := $(VENV)/.ready

.PHONY: help setup reproduce gpu-reproduce test lab export readme bench gpu-bench clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "memkit needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
	@touch $(READY)

setup: $(READY) ## create the environment in .venv (skipped when up to date)

reproduce: $(READY) ## run the paper notebooks and what they need, or the rest of it: figures/$(PROFILE)/. Also: IDS="fig_…" JOBS=n
	$(BIN)/python -m memkit reproduce $(IDS) --profile $(PROFILE) $(if $(JOBS),--jobs $(JOBS))

gpu-reproduce: $(READY) ## the same at the sizes of one GPU: figures/gpu/
	$(BIN)/python -m memkit reproduce $(IDS) --profile gpu $(if $(JOBS),--jobs $(JOBS))

test: $(READY) ## run every notebook and pytest
	$(BIN)/python -m memkit test

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb

export: $(READY) ## notebooks -> memkit/, cleaned
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

readme: $(READY) ## nbs/index.ipynb -> README.md
	$(BIN)/python -c "from memkit.report import write_readme; write_readme()"

bench: $(READY) ## measure; results are appended to benchmarks/results.jsonl
	for script in $(filter-out benchmarks/bench_lfd_batch.py benchmarks/bench_kills.py,$(wildcard benchmarks/bench_*.py)); do $(BIN)/python $$script || exit 1; done

gpu-bench: $(READY) ## the rows of the benchmarks that need a CUDA GPU
	$(BIN)/python benchmarks/bench_retrieval.py --device cuda --max-gb 4
	$(BIN)/python benchmarks/bench_lfd_batch.py --device cuda
	$(BIN)/python benchmarks/bench_dit.py --device cuda
	$(BIN)/python benchmarks/bench_decode.py --device cuda
	$(BIN)/python benchmarks/bench_lfd_equality.py

clean: ## remove the environment
	rm -rf $(VENV)
