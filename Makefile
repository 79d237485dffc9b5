# Needs only Python >= 3.11 and make: every target makes the environment it needs in .venv by itself.
#
#   make run ARGS="--set train.steps=10"     arguments for `deconv run`
#   make test ARGS="-k store"                arguments for pytest
#   make PYTHON=/opt/python/bin/python3 run  another interpreter for .venv

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an install that was cut off has no stamp and is done again from nothing.
RUN_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test

.DEFAULT_GOAL := help
.PHONY: help run test test-fast lint bench clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/  make \1\t\2/p' Makefile

run: $(RUN_STAMP) ## Train, evaluate and register a language model: deconv run $(ARGS)
	@$(BIN)/deconv run $(ARGS)

test: $(TEST_STAMP) ## Run every test: pytest $(ARGS)
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(TEST_STAMP) ## Run the tests that need no servers, kill nothing and take seconds
	$(BIN)/python -m pytest -m 'not slow and not cluster and not fault' $(ARGS)

lint: $(TEST_STAMP) ## Check format, style and types; change nothing
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: $(TEST_STAMP) ## Measure speeds, some minutes: tests/benchmarks/{tokens,training_speed,generation}.py $(ARGS)
	@for name in tokens training_speed generation; do \
	  echo "$$name"; $(BIN)/python -m "tests.benchmarks.$$name" $(ARGS) || exit 1; done

clean: ## Remove .venv, caches and build folders; trained models in .deconv stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find deconv_model pipelines tests infra -name __pycache__ -type d -prune -exec rm -rf {} +

# Installs the project with the extras $(1) into .venv, then writes the stamps. A whole environment is brought up to
# date in place, anything else is made anew. Two makes at once take turns: the lock belongs to the open file 9 of this
# shell and ends with it, however it ends.
define install
set -e; \
for python in '$(PYTHON)' python3.13 python3.12 python3.11 none; do \
  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
done; \
if [ "$$python" = none ]; then \
  echo 'No Python 3.11 or newer found. Name one: make PYTHON=/path/to/python3 ...' >&2; exit 1; \
fi; \
exec 9>>constraints.txt; \
"$$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'; \
if [ -e $@ ] && [ ! pyproject.toml -nt $@ ] && [ ! constraints.txt -nt $@ ]; then exit 0; fi; \
if [ ! -e $(RUN_STAMP) ]; then "$$python" -m venv --clear $(VENV); fi; \
rm -f $(RUN_STAMP) $(TEST_STAMP); \
$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.$(1)'; \
touch $(RUN_STAMP) $@
endef

test_extras := [bench,test]

$(RUN_STAMP): pyproject.toml constraints.txt
	@$(call install)

$(TEST_STAMP): pyproject.toml constraints.txt
	@$(call install,$(test_extras))
