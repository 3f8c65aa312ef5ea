# Everything CI runs is a target here. `make demo` needs Python 3.11 or newer and a C++17 compiler, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE := engines/smollm2
# Tests compare with transformers, which needs torch; the CPU build is enough.
TORCH ?= torch==2.13.0
FUZZ_SECONDS ?= 60
# The same calls every time, so that whatever lands does not depend on luck; FUZZ_SEED= draws others.
FUZZ_SEED ?= 1
QUESTION ?= Explain in two sentences why the sky is blue.

.PHONY: demo test lint fuzz format clean

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
	$(BIN)/python tests/plugins/cpu/fuzz.py $(FUZZ_SECONDS) $(FUZZ_SEED)

format: $(VENV)/test-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml setup.py $(wildcard plugins/*.py plugins/cpu/*.py) $(shell find plugins -name "*.cpp" -o -name "*.h" -o -name "__init__.py")
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/test-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build engines src/slipstream.egg-info plugins/*.so
