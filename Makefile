# `make demo` trains the digits demo, `make test` runs the tests; both make .venv first, and skip what is current.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint help
help:
	@echo "make demo       install into .venv and train on the embedded digits (about 3 minutes after installing)"
	@echo "make test       install into .venv and run the tests"
	@echo "make test-slow  the long tests as well"
	@echo "make lint       ruff"

$(VENV)/installed: setup.py hf_mixup/__init__.py
	@echo "==> Making $(VENV) and installing hf_mixup with its dependencies (PyTorch is large: some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --progress-bar on -e ".[dev]" | grep -v -e 'already satisfied' -e 'is ignored'
	@$(BIN)/python -c "import torch, torchvision; print('==> Installed: torch', torch.__version__, '+ torchvision', torchvision.__version__)"
	@touch $@

demo: $(VENV)/installed
	@echo "==> Training a small ResNet on the embedded digits with mixup + cutmix"
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  training_scripts/run_mixup.py --output_dir runs/demo --overwrite_output_dir
	@echo "==> Look at runs/demo/gallery.png and runs/demo/README.md"

test: $(VENV)/installed
	@echo "==> Running the tests, in two processes (about 15 minutes on two cores)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
