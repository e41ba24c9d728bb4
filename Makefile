# make demo, make test: each makes its own environment in .venv first. PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/cuda_on_cpu tests/arm64 -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# A process for each core, one thread in each: a small tensor's ops wait for a second thread longer than they gain.
# Where nvcc is, the CUDA module must have been built too.
REQUIRE := cpu,triton$(if $(shell command -v nvcc),$(shell echo ,)cuda)

.PHONY: help demo test test-all test-avx2 sweeps bench lint format sanitize clean
help:
	@echo "make demo    align a tiny model end to end on the CPU (about 3 minutes), report in runs/demo"
	@echo "make test    every feature, in at most 8 minutes on 2 cores; the slowest tests are printed"
	@echo "make test-all  that and the long sweeps, each with its time; test-avx2  the numerical tests as on an AVX2 CPU"
	@echo "make sanitize  the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench   speed against eager, torch.compile and peers; table and JSON in bench/results"
	@echo "make lint    ruff, mypy, clang-format     make format   let ruff and clang-format rewrite"

demo: $(VENV)/trainer.stamp
	$(BIN)/rlhf demo --output_dir runs/demo

PYTEST := RLHF_KERNELS_REQUIRE=$(REQUIRE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: $(VENV)/dev.stamp
	$(PYTEST) -m "not sweep" --durations=20

test-all: test sweeps

# What `make test` leaves out, and the random tests with all of their cases.
sweeps: $(VENV)/dev.stamp
	RLHF_KERNELS_ALL_CASES=1 $(PYTEST) -m "sweep or random" --durations=0 --durations-min=5

# What torch, oneDNN and MKL do on a CPU without AVX-512, on one that has it; where rounding differs, tests may not.
# Without Triton's interpreter, 40 % of the time: its kernels run in numpy, the products around them are the others'.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
NUMERICAL := tests/test_linear.py tests/test_linear_losses.py tests/test_linear_system.py tests/test_contract_bits.py \
  tests/test_logits.py tests/test_losses.py tests/test_preference.py tests/trainer/base/test_distributed.py \
  tests/trainer/verification tests/trainer/test_verify.py
test-avx2: $(VENV)/dev.stamp
	$(AVX2) RLHF_KERNELS_ISA=x86-64-v3 $(PYTEST) -m "not sweep" -k "not triton" $(NUMERICAL)

# A second copy of the package with an instrumented module; the editable install stays as it is.
SANITIZED := $(abspath build/sanitized)
SANITIZERS = $(foreach library,asan ubsan stdc++,$(shell gcc -print-file-name=lib$(library).so))
# The native backend's tests, and test_memory, which calls every kernel for every instruction set. Of the contracts
# those with random calls and with threads: the others ask autograd and torch.compile about the same kernels. Left out
# is what forks or compiles, and one slow test in two of its three dtypes.
INSTRUMENTED_FILES := $(filter-out tests/test_contract_%,$(wildcard tests/test_*.py)) \
  tests/test_contract_random.py tests/test_contract_repeat.py
INSTRUMENTED := (cpu or x86) and not (triton or reference or dataloader or fork or compile or opcheck or environment \
  or peak_memory or (accuracy_of_full_kl and not float32))
sanitize: $(VENV)/dev.stamp
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r rlhf_kernels $(SANITIZED) && rm -f $(SANITIZED)/rlhf_kernels/*.so
	PATH="$(abspath $(BIN)):$$PATH" && cmake -S . -B $(SANITIZED)/cmake -G Ninja -DRLHF_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DRLHF_NATIVE_DIR=$(SANITIZED)/rlhf_kernels \
	  -DRLHF_NATIVE_NAME=_native.so && cmake --build $(SANITIZED)/cmake
	PYTHONPATH=$(SANITIZED) LD_PRELOAD="$(SANITIZERS)" OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	  $(BIN)/pytest -n auto -m "not sweep" -k "$(INSTRUMENTED)" $(INSTRUMENTED_FILES)

bench: $(VENV)/bench.stamp
	$(BIN)/python bench/compare.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rlhf-kernels needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# One environment, three sets of extras; editable, so that Python sources need no reinstall.
$(VENV)/trainer.stamp: $(SOURCES) | $(VENV)/bin/python
	$(PIP) -e '.[trainer]'
	@touch $@
$(VENV)/dev.stamp: $(VENV)/trainer.stamp
	$(PIP) -e '.[trainer,dev]'
	@touch $@
$(VENV)/bench.stamp: $(VENV)/trainer.stamp
	$(PIP) -e '.[trainer,dev,bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rlhf_kernels/_native*.so rlhf_kernels/_cuda*.so
