# make run   creates the environment if need be and runs the quick suite (PROFILE=cifar10 for another, ARGS for options)
# make check  runs the linters and the tests that are not marked slow: under 3 minutes on two cores
# make test  creates the environment if need be and passes the tests
PYTHON ?= python3
PROFILE ?= quick
BIN := .venv/bin

.PHONY: run lint check test notebooks setup api format audit reference figures diagrams pages

run: setup
	$(BIN)/vitbench run $(PROFILE) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python docs/rooms.py --check

check: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not slow" tests $(ARGS)

test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile tests --ignore tests/project/test_notebooks.py $(ARGS)
	$(BIN)/pytest --nbmake tests/project/test_notebooks.py notebooks/00_start_here.ipynb $(ARGS)

# make notebooks  runs every lesson by itself under nbmake; `make test` runs them all by papermill, and the first by nbmake
notebooks: setup
	$(BIN)/pytest --nbmake notebooks $(ARGS)

setup: .venv/.done

.venv/.done: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("vitbench needs Python 3.11 or newer and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# make api  writes the pages of the package's names, from their docstrings: open results/api/index.html
api: setup
	$(BIN)/pdoc --docformat google --output-directory results/api vitbench $(filter-out %__main__ %__init__ %on_device,$(subst /,.,$(basename $(wildcard vitbench/*.py vitbench/*/*.py vitbench/*/*/*.py))))

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make audit  asks for known weaknesses of every package of the lock (needs the network); an answer that is not whole is no answer
AUDIT := .venv-audit
audit: $(AUDIT)/bin/pip-audit
	@status=0; $(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement requirements.lock \
		> $(AUDIT)/found 2> $(AUDIT)/said || status=$$?; \
	if grep -q 'known vulnerabilit' $(AUDIT)/said; then cat $(AUDIT)/found; grep 'known vulnerabilit' $(AUDIT)/said; exit $$status; fi; \
	echo "audit: no whole answer from the advisory service ($$(tail -1 $(AUDIT)/said | cut -c1-160)); try again where it can be reached"; exit 1

$(AUDIT)/bin/pip-audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet pip-audit

# make reference FROM=results/runs/digits AS=digits-quick  keeps a run's rows, environments, and the figures made of rows
reference:
	mkdir -p results/reference/$(AS)/figures
	cp -r $(FROM)/records.jsonl $(FROM)/environments results/reference/$(AS)/
	for rows in $(wildcard $(FROM)/figures/*.csv); do cp $${rows%.csv}.* results/reference/$(AS)/figures/; done

# make figures  draws the pages' figures again, from committed rows alone
figures: setup
	$(BIN)/python -m docs.figures

# make diagrams  draws the lessons' diagrams of ideas again, and puts them into the lessons (ARGS=--check shows what would change)
diagrams: setup
	$(BIN)/python -m docs.diagrams $(ARGS)

# make pages  makes README, REVIEWING and the pages of results from the templates in docs/pages and committed rows (ARGS=--check shows what would change)
pages: setup
	$(BIN)/python -m docs.render $(ARGS)
