# PYTHON= the interpreter whose torch is used; TORCH= what to install where it has none; CASES= how many for fuzz.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CASES ?= 10000
export PYTHON TORCH

.PHONY: build demo test bench bench-compare fuzz format lint sanitize sanitize-gpu cuda-build clean

build:  # .venv, and the library in python/ ready to import
	scripts/build.sh
demo: build  # train a small Llama stock and patched, and compare
	.venv/bin/python examples/train_llama.py
test:  # ctest, pytest, and the transformers tests once more with the older transformers and with `kernels`
	scripts/test.sh
bench: build  # time every case on the device that is there; ARGS= options of benchmarks/run.py
	.venv/bin/python benchmarks/run.py --plots $(ARGS)
bench-compare: build  # what changed between two results: A=before.json B=after.json
	.venv/bin/python benchmarks/compare.py $(A) $(B)
fuzz: build  # random calls against the float64 oracle
	.venv/bin/python tests/python/fuzz.py --cases $(CASES)
format: build  # rewrite the sources in the project's style
	scripts/lint.sh --fix
lint: build  # formatting, ruff, mypy
	scripts/lint.sh
sanitize: build  # the C++ tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	scripts/sanitize.sh
sanitize-gpu: build  # compute-sanitizer's four tools over every kind of kernel; needs a GPU
	scripts/sanitize_gpu.sh
cuda-build:  # everything with a CUDA torch and nvcc; needs no GPU
	scripts/cuda_build.sh
clean:  # all that was built; the virtual environments stay
	rm -rf build build-* python/fused_rope/_C*.so python/fused_rope/_build.py python/fused_rope/include python/fused_rope/lib*
