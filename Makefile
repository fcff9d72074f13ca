# make demo: on the digits, block by block beside their baselines, a ViT that reads them and a DiT that draws them;
# make test: tests, lint, format, types. make test-fast: tests that train nothing, for the inner loop, in about a minute.
# make test-all: also every case of the tests of which make test runs as many as show each value of each parameter.
# make fuzz: thousands of damaged and odd inputs, of which tests try some.
# All build .venv first. PYTHON names the interpreter to build it with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
# Without bytecode every worker, and every process that a test starts, would compile all sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-vit demo-dit test test-fast test-all lint fuzz docs clean
.DELETE_ON_ERROR:

# Side by side, on a core each: models as small gain little from two.
demo: .venv/ready
	$(MAKE) --no-print-directory -j 2 demo-vit demo-dit

demo-vit demo-dit: export OMP_NUM_THREADS := 1
demo-vit: .venv/ready
	$(BIN)/diffusionblocks compare recipes/vit/digits.yaml --out runs/demo
demo-dit: .venv/ready
	$(BIN)/diffusionblocks compare recipes/dit/digits.yaml --out runs/demo-dit --quiet \
		--rows end-to-end-2-x3 diffusionblocks-branched

test: lint
	$(PYTEST) -m "not exhaustive"

test-fast: .venv/ready
	$(PYTEST) -m "not slow and not exhaustive"

test-all: lint
	$(PYTEST)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: .venv/ready
	$(BIN)/python tests/fuzz/long.py

# Pages in build/docs. Warnings of links stop the build by themselves, those of docstrings (griffe) are looked for here.
docs: .venv/docs
	@mkdir -p build
	$(BIN)/zensical build --strict --clean > build/docs.log 2>&1; status=$$?; cat build/docs.log; \
		test $$status = 0 && ! grep -q '^griffe:' build/docs.log

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .cache runs build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
