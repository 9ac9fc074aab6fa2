# Every target makes what it needs: the interpreter is found, .venv made and filled, then the work starts.
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu sass hlo lint format box-model goldens env env-test clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: env  ## serve the model in the box to several prompts at once, on the CPU
	@$(PY) -m jpd.demo

test: env-test  ## run the CPU tests
	$(PY) -m pytest -n 2 $(ARGS)

test-gpu: env-test  ## run the numeric tests on a GPU (needs jpd[cuda12] or jpd[cuda13] in .venv)
	JAX_PLATFORMS=cuda $(PY) -m pytest tests/test_parity.py tests/engine tests/ops tests/pallas_kernels tests/native/test_memory.py tests/native/test_overlap_gpu.py tests/overlap/test_gpus.py tests/semi_pd/test_storage.py $(ARGS)

sass: .venv-sass/.jpd  ## compile the GPU kernels for an H200, without one; none may spill registers
	.venv-sass/bin/python -m tests.pallas_kernels.sass $(ARGS)

hlo: .venv-sass/.jpd  ## compile whole steps for an H200, without one, and look for other libraries' calls and copies
	.venv-sass/bin/python -m pytest tests/engine/test_pallas_step.py tests/engine/test_early_attention.py tests/engine/test_stored_steps.py tests/overlap/test_peers.py tests/parallel/test_rank_program.py tests/native/test_overlap.py $(ARGS)

lint: env-test  ## check style, format and the import contract; all three, whichever fails
	failed=0; \
	$(PY) -m ruff check . || failed=1; \
	$(PY) -m ruff format --check . || failed=1; \
	.venv/bin/lint-imports || failed=1; \
	exit $$failed

format: env-test  ## reformat and apply safe lint fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

box-model: env  ## train the model in the box again
	$(PY) -m jpd.box.train

goldens: env-test  ## make the test goldens again (needs torch in .venv)
	$(PY) -m tests.goldens.make_goldens

env:
	@.ci/setup

env-test:
	@.ci/setup test

# ptxas and the compiler of the CUDA plugin, without the libraries that only a GPU needs.
.venv-sass/.jpd: .ci/constraints.txt pyproject.toml
	python=$$(.ci/find-python) && "$$python" -m venv --clear .venv-sass
	.venv-sass/bin/python -m pip install -c $< -e '.[test]'
	.venv-sass/bin/python -m pip install -c $< --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc
	touch $@

clean:  ## remove .venv, .venv-sass and caches
	rm -rf .venv .venv-sass .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find jpd pallas_kernels native tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
