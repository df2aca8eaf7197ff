# Every target sets up what it needs. A bare machine needs make and Python with pip, nothing else.
# `make` alone lists the targets.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed

# One thread per worker: the workers are what fills the cores.
RUN_TESTS = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Debian's python3 comes without ensurepip; pip can then put itself into the new environment.
MAKE_VENV = test -x $(1)/bin/pip || $(PYTHON) -m venv $(1) 2>/dev/null || { \
	$(PYTHON) -m venv --clear --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install -q pip; }

.DEFAULT_GOAL := help
.PHONY: help demo docs dist tiny tiny-text tiny-vision tiny-chat tiny-paint tiny-pivot test fuzz lint style bench gpu browser clean
.PHONY: conformance conformance-newest conformance-main tools clients compat compat-oldest compat-newest compat-main
.PHONY: environment-oldest environment-newest environment-main

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.12   the interpreter that $(VENV) is made from"
	@echo "  JOBS=8              test processes, 2 unless told"
	@echo "  ARGS='-k vision'    handed on to pytest, the conformance runner or the benchmark"

# torch goes first and alone: asked for by name without its pin, pip may take a newer build and gigabytes of
# GPU libraries with it.
$(READY): setup.cfg constraints.txt
	@echo "Setting up $(VENV): minutes the first time, seconds after"
	@$(call MAKE_VENV,$(VENV))
	@$(VENV)/bin/pip install -q -c constraints.txt torch
	@$(VENV)/bin/pip install -q -c constraints.txt -e '.[test,demo,ray]'
	@touch $@

demo: $(READY) ## Ask the embedded viscpm-tiny about a picture in both languages, and let it paint: no download
	$(VENV)/bin/viscpm-hf demo --terminal --output build

TINY := OMP_NUM_THREADS=1 $(PY) recipes/tiny
EMBEDDED := src/viscpm_hf/tiny_models

tiny: $(READY) ## Train viscpm-tiny from nothing and put it into the package: 2 CPU cores, about an hour
	$(MAKE) -j 2 tiny-chat tiny-paint tiny-pivot

tiny-text tiny-vision: tiny-%:
	$(TINY)/chat.py --stage $*

tiny-chat: tiny-text tiny-vision
	$(TINY)/chat.py --output $(EMBEDDED)/chat

tiny-paint: tiny-text
	$(TINY)/paint.py --output $(EMBEDDED)/paint

tiny-pivot: tiny-text tiny-vision
	$(TINY)/chat.py --pivot

test: $(READY) browser ## Run the tests, those of the demo page in a browser included
	$(call RUN_TESTS,$(VENV))

fuzz: $(READY) ## Read spoilt checkpoints and images for a minute; ARGS='--seconds 600' for longer
	$(PY) tests/fuzz.py $(ARGS)

browser: ## Install Chromium, which the tests of the demo page need, if apt can
	@command -v chromedriver >/dev/null || { \
		test "$$(id -u)" = 0 && apt-get -qq update && \
		apt-get -qq install --no-install-recommends chromium chromium-driver fonts-noto-cjk >/dev/null; } || \
		echo "There is no Chromium to be had: the tests of the demo page in a browser will be skipped"

docs: ## Build the documentation as a site into build/site; a broken link is an error
	@$(call MAKE_VENV,.venv-docs)
	@.venv-docs/bin/pip install -q -r docs/requirements.txt
	.venv-docs/bin/python docs/site.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict -q
	@echo "build/site/index.html"

dist: ## Build wheel and source distribution, and try the wheel in an empty environment
	@$(call MAKE_VENV,.venv-dist)
	@.venv-dist/bin/pip install -q build twine
	rm -rf dist build/lib
	.venv-dist/bin/python -m build -q
	.venv-dist/bin/twine check --strict dist/*
	rm -rf .venv-wheel
	@$(call MAKE_VENV,.venv-wheel)
	@.venv-wheel/bin/pip install -q -c constraints.txt torch
	@.venv-wheel/bin/pip install -q -c constraints.txt dist/*.whl
	cd dist && ../.venv-wheel/bin/viscpm-hf demo --terminal --output ../build

lint: $(READY) ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

style: $(READY) ## Mend style and formatting in place
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

conformance: $(READY) ## Run transformers' own tests on our classes (TRANSFORMERS=checkout adds generation; DIFFUSERS=checkout: diffusers')
	$(PY) $(if $(DIFFUSERS),tests/conformance/run_diffusers.py --diffusers $(DIFFUSERS),tests/conformance/run.py $(if $(TRANSFORMERS),--transformers $(TRANSFORMERS))) $(ARGS)

bench: $(READY) ## Measure speed: benchmarks/chat.py, or BENCH=name for another
	$(PY) benchmarks/$(or $(BENCH),chat).py $(ARGS)

# Without the network, and with an interpreter that has everything: make gpu READY= PY=python3
gpu: $(READY) ## Measure on an H100 or H200 what needs one, in at most nine minutes; ARGS=--dry-run tries it on the CPU
	$(PY) benchmarks/gpu.py $(ARGS)

# The ends of the range that setup.cfg allows, each in an environment of its own. Only torch is pinned there;
# the rest is what pip gives a new user today, so these are brought up to date on every run. Without gradio, which
# would hold back pillow, and without Ray: their tests leave themselves out.
# One end after the other and both to the end: a failure at the first doesn't hide the second.
compat: ## Run the tests with the oldest and the newest transformers and diffusers allowed (CORE=1: a core of them)
	@failed=0; for end in oldest newest; do $(MAKE) --no-print-directory compat-$$end || failed=1; done; exit $$failed

# What a release of transformers or diffusers can break, without what is tested with the tested set anyway.
CORE_TESTS = tests/modeling tests/pipelines tests/siblings tests/conversion/test_export.py tests/test_auto.py \
	tests/test_chat.py tests/test_parity.py tests/test_version.py tests/test_ways_of_generating.py

UPGRADE = install -q --upgrade --upgrade-strategy eager -c .venv-$*/torch.txt
OLDEST := $(shell sed -nE 's/^ *(transformers|diffusers)>=([0-9.]+),.*/\1==\2/p' setup.cfg)
MAIN := git+https://github.com/huggingface/transformers git+https://github.com/huggingface/diffusers

compat-oldest compat-newest compat-main: compat-%: environment-%
	$(call RUN_TESTS,.venv-$*) $(if $(CORE),$(CORE_TESTS))

conformance-newest conformance-main: conformance-%: environment-%
	.venv-$*/bin/python tests/conformance/run.py $(if $(TRANSFORMERS),--transformers $(TRANSFORMERS)) $(ARGS)

environment-oldest environment-newest environment-main: environment-%:
	@echo "Bringing .venv-$* up to date"
	@$(call MAKE_VENV,.venv-$*)
	@grep '^torch==' constraints.txt >.venv-$*/torch.txt
	@.venv-$*/bin/pip $(UPGRADE) torch
	@.venv-$*/bin/pip $(UPGRADE) -e '.[test]' $(if $(filter oldest,$*),$(OLDEST))
	@# After our package, not beside it: main is worth a try even when its version has left our range.
	@$(if $(filter main,$*),.venv-$*/bin/pip $(UPGRADE) $(MAIN))
	@.venv-$*/bin/pip list 2>/dev/null | grep -iE '^(torch|transformers|diffusers|tokenizers|huggingface.hub) '

tools: ## Run other people's tools on us (TRL, lm-eval, lmms-eval, outlines, DeepSpeed, ONNX, ExecuTorch) in .venv-tools
	@echo "Bringing .venv-tools up to date"
	@$(call MAKE_VENV,.venv-tools)
	@.venv-tools/bin/pip install -q -c constraints.txt torch
	@.venv-tools/bin/pip install -q -c constraints.txt -e '.[test,tools,executorch]'
	@# DeepSpeed compiles what is used, for the torch that is there.
	@DS_BUILD_OPS=0 .venv-tools/bin/pip install -q -c constraints.txt --no-build-isolation deepspeed
	@# Without all that it names for other models: torchvision and, with it, another torch.
	@.venv-tools/bin/pip install -q -c constraints.txt --no-deps lmms-eval
	$(call RUN_TESTS,.venv-tools) tests/tools

clients: ## Ask our server with other people's clients (LangChain, LiteLLM, LlamaIndex, PydanticAI) in .venv-clients
	@echo "Bringing .venv-clients up to date"
	@$(call MAKE_VENV,.venv-clients)
	@grep '^torch==' constraints.txt >.venv-clients/torch.txt
	@.venv-clients/bin/pip install -q -c .venv-clients/torch.txt torch
	@# torch alone is pinned: LlamaIndex asks for an older openai than the tested set has.
	@.venv-clients/bin/pip install -q -c .venv-clients/torch.txt -e '.[test,clients]'
	$(call RUN_TESTS,.venv-clients) tests/serving/test_clients.py

clean: ## Remove caches and build products; the environments stay (rm -r .venv* removes them)
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .conformance-cache benchmarks/.scratch
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
