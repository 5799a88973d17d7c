# The first of these that is 3.11 or newer makes .venv.
PYTHON ?= python3 python3.13 python3.12 python3.11
# cpu, cuda or tpu: which lock. What .venv was made from, unless you say.
ACCEL ?= $(or $(shell cat .venv/accel 2>/dev/null),cpu)
CONFIG ?= configs/countdown_tiny.py
UV ?= uv

accel := $(ACCEL)
ifeq ($(filter cpu cuda tpu,$(accel)),)
$(error ACCEL is cpu, cuda or tpu, not '$(accel)')
endif
ifeq ($(accel),cpu)
export JAX_PLATFORMS ?= cpu
endif
# Containers often set it, and then every process compiles the 1,400 modules it imports anew.
unexport PYTHONDONTWRITEBYTECODE

# The compiler's memory in pages of 2 MB: a twentieth less time. Other libcs do not read it.
huge_pages = glibc.malloc.hugetlb=1

# The interpreter behind a name, also behind a virtual environment's; nothing if it is too old.
new_enough = $(shell $(1) -c "import os, sys; sys.version_info >= (3, 11) and \
  print(os.path.realpath(sys._base_executable))" 2>/dev/null)
python = $(or $(firstword $(foreach name,$(PYTHON),$(call new_enough,$(name)))),$(error \
  r1jax needs Python 3.11 or newer; none of these is: $(PYTHON) (set PYTHON=/path/to/one)))
# Empty where .venv was made from this lock and, if PYTHON was given, by that Python.
stale = $(strip $(shell cmp -s launch/locks/$(accel).lock .venv/installed.lock || echo lock) \
  $(if $(filter file,$(origin PYTHON)),,$(filter-out $(shell cat .venv/python 2>/dev/null),$(python))))

compile = $(UV) pip compile pyproject.toml --group dev --universal --python-version 3.11 --quiet \
  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate $(ARGS)

.PHONY: help setup train test lock clean

help:
	@echo 'make setup   make .venv from its lock   (ACCEL=cpu, cuda or tpu; PYTHON=python3.12)'
	@echo 'make train   set up and train           (CONFIG=configs/debug.py; ARGS="--set a.b=1")'
	@echo 'make test    set up and check format, lint, types and tests   (ARGS="-k countdown")'
	@echo 'make lock    resolve the three locks anew with uv   (ARGS=--upgrade: newest versions)'
	@echo 'make clean   remove .venv and the caches; runs/ stays'

setup:
	@$(if $(stale),launch/setup.sh $(accel) $(python),:)

train: setup
	.venv/bin/python -m r1jax.train --config $(CONFIG) $(ARGS)

test: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/basedpyright
	GLIBC_TUNABLES=$(huge_pages) .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 \
	  --dist worksteal $(ARGS)

lock:
	$(compile) --output-file launch/locks/cpu.lock
	$(compile) --constraints launch/locks/cpu.lock --extra cuda --output-file launch/locks/cuda.lock
	$(compile) --constraints launch/locks/cpu.lock --extra tpu --output-file launch/locks/tpu.lock

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist r1jax.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
