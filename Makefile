# Everything CI runs is a target here. `make demo` needs Python 3.11 or newer and a C++17 compiler, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE := engines/smollm2
# Tests compare with transformers, which needs torch; the CPU build is enough.
TORCH ?= torch==2.13.0
# The same calls every time, so that whatever lands depends neither on luck nor on how fast the machine is; FUZZ_SEED=
# draws others.
FUZZ_TURNS ?= 4000
FUZZ_SEED ?= 1
QUESTION ?= Explain in two sentences why the sky is blue.

# Tests start hundreds of processes, each of which would compile all modules that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint fuzz format wheel clean

demo: $(ENGINE)/engine.json
	$(BIN)/slipstream generate $(ENGINE) "$(QUESTION)" --temperature 0 --max-tokens 128 --stats

$(ENGINE)/engine.json: $(VENV)/installed
	$(BIN)/slipstream build "$$($(BIN)/python examples/fetch_smollm2.py)" -o $(ENGINE)

test: $(VENV)/test-installed
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(PYTEST)

lint: $(VENV)/test-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer, on calls that are right or hostile.
fuzz: $(VENV)/test-installed
	$(BIN)/python tests/plugins/cpu/fuzz.py $(FUZZ_TURNS) $(FUZZ_SEED)

format: $(VENV)/test-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# dist/: an sdist and, made from it, one wheel for every Python, on any Linux of glibc 2.28 or newer. What would not load
# there is refused by auditwheel, with the names of the symbols.
wheel: $(VENV)/test-installed
	rm -rf build/wheel dist
	$(BIN)/python -m build --outdir build/wheel
	PATH="$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --strip --only-plat --plat manylinux_2_28_$$(uname -m) \
	    --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist

SOURCES := pyproject.toml setup.py $(wildcard plugins/*.py plugins/cpu/*.py) $(shell find plugins -name "*.cpp" -o -name "*.h" -o -name "__init__.py")

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

# Not after the other: that would compile the plugins twice.
$(VENV)/test-installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build dist engines src/slipstream.egg-info plugins/*.so
