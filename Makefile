# `make train` runs the main job, `make test` the tests (`make test-long` those that are left out of it), `make lint` the
# style and the types, `make bench` the benchmarks, `make docs` makes the site in out/docs, `make notebooks` the notebooks;
# all set up .venv first.
.PHONY: train test test-long bench lint docs notebooks clean

PYTHON ?= python3
SETUP = .venv/.installed

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fomaml needs Python 3.10 or newer")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(SETUP)

train: $(SETUP)
	.venv/bin/python runs/mnist.py

PYTEST = .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(SETUP)
	$(PYTEST)

test-long: $(SETUP)
	$(PYTEST) -m long

bench: $(SETUP)
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	.venv/bin/python -m benchmarks $(BENCH)

lint: $(SETUP)
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: $(SETUP)
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	.venv/bin/python -m sphinx -W --keep-going -q docs out/docs

# The notebooks are written as plain Python; those that Jupyter opens are made of it, with what they show.
notebooks: $(SETUP)
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks]'
	cd examples/notebooks && for name in mnist own_pictures; do ../../.venv/bin/jupytext --to ipynb $$name.py && \
		../../.venv/bin/jupyter execute --inplace $$name.ipynb || exit 1; done

clean:
	rm -rf .venv out
