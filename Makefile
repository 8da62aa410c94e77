# make demo: denoise a real sample. make test: all tests. Both set up .venv from requirements.lock first.
PYTHON ?= python3
UV_VERSION = 0.13.9
# wheels that lie on this machine, such as a CPU build of torch, go before the registry's
export UV_FIND_LINKS = $(PIP_FIND_LINKS)

.PHONY: demo test lint lock peers clean

demo: .venv/ready
	.venv/bin/python workflows/demo/demo.py demo

# two files at a time: many tests wait, and those that compute do so in one thread
test: .venv/ready
	.venv/bin/python -m pytest tests --numprocesses 2 --dist loadfile

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python -r requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
	touch $@

# other tools that ours is timed beside, in a folder of their own for PYTHONPATH: they name Pythons older than they run on
peers: .peers/ready
.peers/ready: .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --target .peers --upgrade --no-deps \
		--ignore-requires-python vEMden==0.2 FiReTiTiPyLib==1.5.7 horology==1.4.1 natsort==8.4.0 monai==1.6.1
	touch $@

# the extras that are tested, in one resolve; torch without its build's name, so that each machine takes the build it has
lock: .venv/ready
	.venv/bin/uv pip compile --quiet pyproject.toml --extra test --extra lint --python-version 3.11.7 --no-emit-find-links \
		--no-annotate --custom-compile-command "make lock" --output-file requirements.lock
	sed -i 's/^\(torch==[0-9.]*\)+cpu$$/\1/' requirements.lock

clean:
	rm -rf .venv .peers demo
