# PYTHON= the interpreter whose torch is used; TORCH= what to install if it has none; CASES= the number of fuzz cases;
# WHEELS= part of the lines of scripts/wheels.txt to build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CASES ?= 10000
export PYTHON TORCH WHEELS

.PHONY: build demo test bench bench-cliffs bench-compare figures docs fuzz format lint sanitize sanitize-gpu cuda-build clean

build:  # create .venv and build the library into python/, ready to import
	scripts/build.sh
demo:  # train a small Llama, original and patched, compare, and time the operator
	scripts/build.sh --demo
	.venv/bin/python examples/train_llama.py
test:  # run ctest and pytest, without the tests marked slow
	scripts/test.sh
.PHONY: test-all
test-all: test  # run the slow tests too, with an older transformers and with `kernels`
	scripts/test.sh --slow
bench: build  # time every case on the available device; ARGS= options of benchmarks/run.py
	.venv/bin/python benchmarks/run.py --plots $(ARGS)
bench-cliffs: build  # draw the fraction of a clone over head_dim, rotary_dim, offsets, sequences and axes
	.venv/bin/python benchmarks/cliffs.py $(ARGS)
bench-compare: build  # compare two results: A=before.json B=after.json
	.venv/bin/python benchmarks/compare.py $(A) $(B)
figures: build  # draw the pictures of benchmarks/results/h200.json and update the documents' tables
	.venv/bin/python benchmarks/plots.py benchmarks/results/h200.json
	.venv/bin/python benchmarks/table.py --update
docs: build  # build the documentation site into build/docs
	scripts/docs.sh
fuzz: build  # compare random calls with the float64 oracle
	.venv/bin/python tests/python/fuzz.py --cases $(CASES)
format: build  # format the sources
	scripts/lint.sh --fix
lint: build  # check formatting, ruff, words, mypy and the workflows
	scripts/lint.sh
sanitize: build  # run the C++ tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	scripts/sanitize.sh
sanitize-gpu: build  # run compute-sanitizer's four tools on every kind of kernel; needs a GPU
	scripts/sanitize_gpu.sh
cuda-build:  # build with a CUDA torch and nvcc; needs no GPU
	scripts/cuda_build.sh
.PHONY: wheels
wheels:  # build the wheels of scripts/wheels.txt into dist/ and test each in a fresh environment
	scripts/wheels.sh
.PHONY: hub
hub:  # write the sources in the layout of the Kernels Hub's builder into build/hub
	$(PYTHON) scripts/hub.py
clean:  # remove build output; keep the virtual environments
	rm -rf build build-* dist .venv-wheels python/fused_rope/_C*.so python/fused_rope/_build.py python/fused_rope/include python/fused_rope/lib*
