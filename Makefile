# make setup | demo | test | nightly | reliability | bench | lint | lock | wheels | sbom

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.ready
TORCH := torch==2.13.0

export MLFLOW_DISABLE_TELEMETRY := true
export DAGSTER_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1

# The CUDA packages of a Linux torch: left out of the lock, since which of them are wanted depends on the build of torch.
CUDA := bindings pathfinder toolkit
NVIDIA := cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx
OUTSIDE_LOCK := torch triton $(CUDA:%=cuda-%) $(NVIDIA:%=nvidia-%)

.PHONY: setup demo test nightly reliability bench lint lock wheels sbom

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml Makefile .ci/setup
	@.ci/setup '$(TORCH)'
	@touch $@

demo: setup
	@$(BIN)/alignflow demo

test: setup lint
	@$(BIN)/python -m pytest -n 2

# An extra on top of what is set up, which no locked version gives way to.
with_extra = . .ci/pip-settings && $(BIN)/uv pip install --quiet --constraint <(grep -v '^ ' requirements.lock | sed 's/ *\\$$//') --editable '.[$(1)]'

# Tests that take minutes; the extra brings Ray, S3 and Selenium. Browser tests want Debian's chromium and chromium-driver, network tests iproute2.
nightly: setup
	@$(call with_extra,nightly)
	@$(BIN)/python -m pytest -n 2 -m nightly

# The figures of docs/reliability.md, the long ones included, as a table at the end.
reliability: setup
	@$(BIN)/python -m pytest -n 2 -m 'nightly or not nightly' tests/test_reliability.py tests/test_hostile.py tests/test_audit.py tests/test_no_metadata.py \
		tests/test_cancel.py tests/test_layers.py tests/test_mutations.py tests/test_tracking.py tests/test_workers.py tests/test_walk.py \
		tests/test_ui.py tests/test_network.py

# Ratios against peers measured in the same run (docs/performance.md); the extra brings the peers. BENCH_ARGS="--only solver metrics --json FILE".
bench: setup
	@$(call with_extra,bench)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/mypy alignflow_core pipelines

# Universal (every platform and Python >= 3.11), with the hashes of every file of a release, naming no index; torch is pinned above.
# Extra indexes and find-links are left out: they may know only some of a release's files.
lock: setup
	@. .ci/pip-settings && env -u UV_INDEX -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --upgrade \
		--no-emit-index-url --no-emit-find-links --constraints <(echo '$(TORCH)') $(OUTSIDE_LOCK:%=--no-emit-package %) \
		--no-annotate --custom-compile-command 'make lock' --quiet --output-file requirements.lock

# For a machine without a network (README): the files of every package that 'make setup' installs, in wheels/.
wheels: setup
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --dest wheels --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --dest wheels '$(TORCH)' uv

# The locked packages as a CycloneDX bill of materials; needs no network.
sbom: setup
	@$(BIN)/python -m pipelines.sbom > sbom.cdx.json
	@echo sbom.cdx.json
