# make bench: gradient check, then the microbenchmark.  make test: every test.  Both set up .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: install bench check test lint docs example clean

install: $(VENV)/.installed

# constraints.txt pins the versions that CI runs with.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

bench: install
	$(RUN) -m bench

check: install
	$(RUN) -m siglip_kernels check

# As many processes as there are processors; one that has no test left takes over some of another's.
test: install
	$(RUN) -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# As a site, in build/site; a broken link is an error.
docs: install
	$(RUN) -m mkdocs build

example: install
	$(RUN) examples/train_digits.py

clean:
	rm -rf $(VENV) build dist bench/out *.egg-info .pytest_cache .mypy_cache .ruff_cache
