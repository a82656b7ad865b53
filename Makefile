# `make` alone lists the targets.

PYTHON ?= python3
PORT ?= 8000

# For `make image`: docker or podman with global flags, flags of its build and run, and cpu, gpu, rtx or ray.
CONTAINER ?= docker
BUILD_FLAGS ?=
RUN_FLAGS ?=
FLAVOUR ?= cpu

# For `make accept-gpu`: a published checkpoint, as a folder or a hub id.
MODEL ?=
COMMA := ,

VENV := .venv
BIN := $(VENV)/bin
# The server's tests have their own process, without compiler, Helm or training in its memory, as in use.
# The cores share the files of the other tests.
SHARED := --numprocesses auto --maxprocesses 4 --dist loadfile --ignore tests/server
# One stamp per installed lock, newer than the lock.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
DEPLOY := $(VENV)/.installed-deploy

# For `make accept-kit`: versions of the hosts' Python, with commas.
HOST_PYTHON ?= 3.12

# For `make soak`.
HOURS ?= 2
OUT ?= runs/soak

# For `make system-tools`.
SYSTEM_TOOLS := chromium prometheus
SUDO := $(if $(filter 0,$(shell id -u)),,sudo --non-interactive)

# For `make peers`. A .pth file adds our engine to each environment, after its own packages.
PEERS := litserve ray bentoml
PEER_litserve := litserve==0.2.19
PEER_ray := ray[serve]==2.60.0
PEER_bentoml := bentoml==1.4.35

# For `make openvino`: the rival of bench.latency --vs openvino.
OPENVINO := optimum-intel==2.2.0 optimum==2.3.0 openvino==2026.4.1 nncf==3.4.0 transformers==5.5.4 diffusers==0.39.0 torch==2.13.0

# For `make quality-proof`: the packages of the extras fid and clip, and their references. torchvision brings its own
# torch, after which come our packages; openai-clip needs pkg_resources of an older setuptools.
QUALITY := pytorch-fid==0.3.0 open-clip-torch==3.3.0 torch-fidelity==0.4.0 openai-clip==1.0.1 torchvision setuptools==80.9.0

.DEFAULT_GOAL := help
.PHONY: help run test lint check proof accept-gpu accept-kit chaos soak fuzz clients deploy-tools system-tools image image-check lock clean peers openvino quality-proof

help: ## lists these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(RUN) ## serves the tiny checkpoint on 127.0.0.1:8000 (PORT=N for another port)
	@exec $(BIN)/python -m server --port $(PORT)

test: $(DEV) ## runs every test that this machine can run
	@$(BIN)/python -m pytest $(SHARED)
	@$(BIN)/python -m pytest tests/server

lint: $(DEV) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint ## format, lint, types and tests, with the same Hypothesis examples in each run
	@# Hypothesis draws the same examples in each run here; `make test` draws new ones.
	$(BIN)/python -m pytest --hypothesis-profile ci $(SHARED)
	$(BIN)/python -m pytest --hypothesis-profile ci tests/server

proof: $(DEV) ## tests at full size: minutes to hours, many GiB of memory
	$(BIN)/python -m pytest -m slow

chaos: $(DEV) ## injects faults into real servers and prints the clients' results: minutes
	$(BIN)/python -m bench.robustness.chaos

accept-gpu: $(DEV) ## on a GPU host: builds, checks and measures engines, measures the server beside diffusers, writes bench/results (MODEL=NAME adds a checkpoint)
	$(BIN)/python -m pip install --quiet --constraint requirements-gpu.lock tensorrt
	@# Each file in its own process, because a kernel's error breaks CUDA for the rest of its process. Warnings of
	@# vendors on new cards are no errors here.
	@failed=0; for file in $$(grep -rlE '^(@|pytestmark = )pytest.mark.gpu' tests); do \
	  $(BIN)/python -m pytest -m gpu -W default $$file || failed=1; \
	done; \
	$(BIN)/python -m bench.acceptance.over_http $(if $(MODEL),--models $(MODEL)) || failed=1; \
	$(BIN)/python -m bench.acceptance $(if $(MODEL),--models tiny$(COMMA)$(MODEL)) && exit $$failed

accept-kit: $(DEV) ## packs the code and the missing packages for a GPU host with PyTorch and no network into build/accept-kit, below 60 MB (HOST_PYTHON=3.12)
	$(BIN)/python -m bench.acceptance.kit --python $(HOST_PYTHON)

soak: $(DEV) ## hours of mixed traffic with faults on one server, to find growth (HOURS=2, OUT=runs/soak: a new folder)
	$(BIN)/python -m bench.load.soak --hours $(HOURS) --out $(OUT)

fuzz: $(DEV) ## sends seeded malformed requests, and those of schemathesis (in its own environment), to real servers
	$(BIN)/python -m venv .venvs/fuzz
	.venvs/fuzz/bin/python -m pip install --quiet schemathesis==4.32.5
	$(BIN)/python -m bench.robustness.fuzz --images 5000 --requests 5000 --sdapi 3000 --options 3000 --sessions 1000 --offers 1000 \
	  --schemathesis .venvs/fuzz/bin/schemathesis --examples 1700

clients: $(DEV) ## tests the server with the openai client, LiteLLM and webuiapi in their own environment
	$(BIN)/python -m venv .venvs/clients
	.venvs/clients/bin/python -m pip install --quiet openai==2.54.0 litellm==1.106.2 webuiapi==0.9.17
	$(BIN)/python -m pytest -m slow tests/server/http/routes/test_openai_clients.py tests/server/http/routes/test_sdapi.py

quality-proof: .venvs/quality/.installed ## compares FID, CLIP score and CMMD with their reference implementations, on seeded weights: minutes
	QUALITY_PROOF=1 .venvs/quality/bin/python -m pytest -s -m slow tests/bench/quality/metrics/test_reference.py

.venvs/quality/.installed: $(DEV) pyproject.toml
	$(PYTHON) -m venv .venvs/quality
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venvs/quality/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	.venvs/quality/bin/python -m pip install --quiet $(QUALITY)
	@touch $@

deploy-tools: $(DEPLOY) ## installs Helm and the schemas of Kubernetes and Grafana, so that the tests cover deploy/ too

system-tools: ## installs Chromium and Prometheus from Debian for the tests; root or sudo
	@$(SUDO) true || { echo "make system-tools needs root or sudo without a password; the tests skip without it"; exit 1; }
	$(SUDO) apt-get update -qq
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM_TOOLS)

image: ## builds the container image (CONTAINER=podman, FLAVOUR=gpu, BUILD_FLAGS="--build-arg ...")
	$(CONTAINER) build $(BUILD_FLAGS) --build-arg FLAVOUR=$(FLAVOUR) --tag sana-sprint-server:$(FLAVOUR) .

image-check: image ## builds the image and checks it: user, read-only root, health, drain, volumes
	$(PYTHON) deploy/check_image.py --image sana-sprint-server:$(FLAVOUR) --container "$(CONTAINER)" --run-flags="$(RUN_FLAGS)"

lock: $(BIN)/python ## pins the requirements of pyproject.toml; delete a line of a lock to upgrade that package
	$(BIN)/python deploy/lock.py

peers: $(PEERS:%=.venvs/peer-%/.installed) ## measures the server beside LitServe, Ray Serve and BentoML, each in its own environment
	$(BIN)/python -m bench.peers

.venvs/peer-%/.installed: $(DEV)
	$(PYTHON) -m venv .venvs/peer-$*
	.venvs/peer-$*/bin/python -m pip install --quiet "$(PEER_$*)"
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venvs/peer-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	@touch $@

openvino: ## installs optimum-intel in an environment of its own, for bench.latency --vs openvino
	$(PYTHON) -m venv .venvs/openvino
	.venvs/openvino/bin/python -m pip install --quiet $(OPENVINO)
	.venvs/openvino/bin/python -m pip uninstall --quiet --yes torchvision  # its CUDA build breaks transformers on a CPU

clean: ## removes the virtual environment, caches and build output
	rm -rf $(VENV) .venvs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

$(RUN): requirements.lock | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	@touch $@

$(DEV): requirements-dev.lock requirements.lock | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.lock
	@touch $(RUN) $@

$(DEPLOY): requirements-deploy.lock $(DEV)
	$(BIN)/python -m pip install --quiet --requirement requirements-deploy.lock
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "need Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1 || true)"; \
	  echo "install one and name it, for example: make run PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
