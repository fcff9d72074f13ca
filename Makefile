# make demo: on the digits, block by block beside their controls, a ViT that reads them and a DiT that draws them;
# make test: tests, lint, format, types. make fuzz: thousands of damaged and odd inputs, of which tests try some.
# Both build .venv first. PYTHON names the interpreter to build it with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fuzz docs clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/diffusionblocks compare recipes/vit/digits.yaml --out runs/demo
	$(BIN)/diffusionblocks compare recipes/dit/digits.yaml --out runs/demo-dit --rows end-to-end-2-x3 diffusionblocks-branched

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadgroup

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
