# Needs Python 3.10 or newer and make; every target sets up what it needs in $(VENV) first.

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := Scripts
else
PYTHON ?= python3
BIN := bin
ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)
endif
VENV ?= .venv
ARGS ?=

PY := "$(VENV)/$(BIN)/python"
INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
LINTED := convlab tests tools notebooks

# A kernelspec in the user's home folder must not stand in for the one in $(VENV).
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help reproduce lab notebooks record verdicts readme test lint clean

help:
	@echo "make reproduce   the thread's analysis on this machine, about three minutes (ARGS=--quick: under one)"
	@echo "make lab         JupyterLab, opened at the first notebook"
	@echo "make notebooks   run the notebooks and write their outputs back (ARGS=02: only that one)"
	@echo "make record      all experiments, into data/"
	@echo "make verdicts    claim by claim: what the records say"
	@echo "make readme      remake the parts of README.md that come from the records"
	@echo "make test        lint, tests, then every notebook in quick mode"
	@echo "make lint        ruff: rules and format"
	@echo "make clean       remove .venv and the caches"
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  ARGS=options passed on"

reproduce record verdicts: $(VENV)/.installed-core
	$(PY) -m convlab $@ $(ARGS)

readme: $(VENV)/.installed-core
	$(PY) tools/readme.py $(ARGS)

lab: $(VENV)/.installed-notebooks
	$(PY) -m jupyterlab --ServerApp.ip=127.0.0.1 $(ROOT_FLAG) notebooks/00_start_here.ipynb $(ARGS)

notebooks: $(VENV)/.installed-notebooks
	$(PY) tools/notebooks.py run $(ARGS)

lint: $(VENV)/.installed-test
	$(PY) -m ruff check $(LINTED)
	$(PY) -m ruff format --check $(LINTED)

test: lint
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)
	$(PY) tools/notebooks.py test

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(d, True) for d in '.venv .pytest_cache .ruff_cache .hypothesis build dist'.split()]"

# A stamp is written last, so an installation that was interrupted is done again.
# The larger installations contain the smaller ones and stamp them too.
stamp = @$(PY) -c "import sys; [open(name, 'w').close() for name in sys.argv[1:]]" $(addprefix $(VENV)/.installed-,$(1))

$(VENV)/.installed-core: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e .
	$(call stamp,core)

$(VENV)/.installed-notebooks: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e ".[notebooks]"
	$(call stamp,core notebooks)

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e ".[notebooks,test,peers]"
	$(call stamp,core notebooks test)

$(VENV)/.created:
	@$(PYTHON) -c "" || (echo "There is no program '$(PYTHON)'; name a Python 3.10 or newer: make PYTHON=/path/to/python" && exit 1)
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('convlab needs Python 3.10 or newer and this is %d.%d; name another: make PYTHON=/path/to/python' % sys.version_info[:2])"
	@$(PYTHON) -c "import venv, ensurepip" || (echo "This Python has no venv module; on Debian and Ubuntu install the package python3-venv." && exit 1)
	$(PYTHON) -m venv "$(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check "pip>=22"
	@$(PY) -c "open('$@', 'w').close()"
