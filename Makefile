# `make demo` trains the digits demo, `make test` runs the tests; both make .venv first, and skip what is current.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-oldest test-oldest-all lint docs docs-tables new-method help
help:
	@echo "make demo       install into .venv and train on the embedded digits (about two minutes after installing)"
	@echo "make test       install into .venv and run the tests"
	@echo "make test-slow  the long tests as well, and test-oldest-all"
	@echo "make test-oldest  some tests with the oldest versions that setup.py allows"
	@echo "make test-oldest-all  all tests of make test with them"
	@echo "make lint       ruff, and mypy over the public API"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make docs-tables  write the tables of README.md and docs/ again, from the files of measurements"
	@echo "make new-method NAME=checkermix  make the files of a new method"

$(VENV)/installed: setup.py hf_mixup/__init__.py
	@echo "==> Making $(VENV) and installing hf_mixup with its dependencies (PyTorch is large: some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --progress-bar on -e ".[dev]" | grep -v -e 'already satisfied' -e 'is ignored'
	@$(BIN)/python -c "import torch, torchvision; print('==> Installed: torch', torch.__version__, '+ torchvision', torchvision.__version__)"
	@touch $@

demo: $(VENV)/installed
	@echo "==> Training a small ResNet on the embedded digits with mixup + cutmix"
	$(BIN)/hf-mixup train --output_dir runs/demo --overwrite_output_dir
	@echo "==> Look at runs/demo/gallery.png and runs/demo/README.md"

test: $(VENV)/installed
	@echo "==> Running the tests, in two processes (about 15 minutes on two cores)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(VENV)/installed
	@$(BIN)/python -m pip install --quiet -e ".[oracles]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow"
	$(MAKE) test-oldest-all

# the oldest versions that setup.py allows, laid over the installed ones
OLDEST := .venv-oldest
$(OLDEST)/installed: setup.py
	@echo "==> Laying the oldest versions into $(OLDEST)"
	@rm -rf $(OLDEST)
	@$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) transformers==5.17.0 "huggingface-hub==1.31.*" "accelerate==1.7.*" timm==1.0.23 \
	  datasets==4.8.4 "dill<0.3.9" "multiprocess<0.70.17" "fsspec==2024.9.0" "httpx<1" httpcore h11 anyio requests urllib3 charset-normalizer
	@touch $@

test-oldest: $(VENV)/installed $(OLDEST)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2 tests/test_versions.py tests/test_collator.py tests/test_structure.py \
	  "tests/test_data.py::test_augmentation_on_the_device_is_the_same[{}-pad]"

test-oldest-all: $(VENV)/installed $(OLDEST)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/docs-installed: setup.py $(VENV)/installed
	@echo "==> Installing what builds the documentation"
	@$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

# warnings are errors: mkdocs.yml is strict
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "==> Open build/site/index.html"

docs-tables: $(VENV)/installed
	$(BIN)/python docs/tools/facts.py

new-method: $(VENV)/installed
	@test -n "$(NAME)" || { echo "make new-method needs a name: make new-method NAME=checkermix"; exit 2; }
	$(BIN)/python docs/tools/new_method.py $(NAME)
