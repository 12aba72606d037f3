# make reproduce   set up, run the notebooks, write tables and figures (FAST=1: a smoke run)
# make controls    every model with equal budgets beside its controls: half an hour on four GPUs; FAST=1 on a CPU
# make claims      every number of README and docs against the CSV cell that it names
# make ablation    the grids of rank, voxels, prior weight and learning rate: 450 trainings, 15 minutes on four H100
# make cfp CFP=…   the kit on real faces: embed the folder of CFP, run notebook 06 on it (needs npm and network once)
# make test        set up, run the tests
# make test-all    those too that need the maker of people, a cluster, InsightFace, PEFT, ONNX or a browser
# make lint        formatter, linter and type checker
# make lab         open JupyterLab
# make docs        these pages, the notebooks and the API as a site in build/site (needs npm and network once)
# make data        rebuild the shipped data set (needs npm and network); PEOPLE=20000: more people, a second each
#
# Another torch build:  make reproduce TORCH="torch --index-url URL-of-the-build"
# Your own environment: make reproduce VENV=path/of/a/venv

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
WORKERS ?= 2
PEOPLE ?= 1800
# Without compiling: bytecode is made of what is imported, when it is.
PIP    := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile

# A torch that is there already stays, unless TORCH is given.
KEEP_TORCH := $(if $(filter file,$(origin TORCH)),$(VENV)/bin/python -c "import torch" 2>/dev/null ||)

.PHONY: reproduce cfp cfp-folder controls claims ablation test test-all lint docs lab data clean

reproduce: $(VENV)/.kit
	$(VENV)/bin/python benchmarks/reproduce.py $(if $(FAST),--fast)

cfp: cfp-folder $(VENV)/.cfp
	$(VENV)/bin/python -m viewdiff_nb.faces.cfp "$(CFP)" runs/cfp --workers $(WORKERS)
	$(VENV)/bin/python benchmarks/reproduce.py notebooks/06_real_faces.ipynb

cfp-folder:
	@test -n "$(CFP)" || { echo "give CFP's folder, with Data and Protocol: make cfp CFP=folder (docs/real_faces.md)"; exit 2; }

controls: $(VENV)/.peft
	$(VENV)/bin/python benchmarks/controls.py $(if $(FAST),--effort fast)
	$(if $(FAST),,$(VENV)/bin/python benchmarks/draw_controls.py)

claims: $(VENV)/.kit
	$(VENV)/bin/python benchmarks/claims.py

ablation: $(VENV)/.kit
	$(VENV)/bin/python benchmarks/ablation.py $(if $(FAST),--fast)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto

test-all: $(VENV)/.test-all
	ALL=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto

lint: $(VENV)/.lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	$(VENV)/bin/python docs/site/build.py

lab: $(VENV)/.kit
	$(VENV)/bin/jupyter lab notebooks

data: $(VENV)/.heads
	PYTHONPATH=data $(VENV)/bin/python -m people.build data/heads --people $(PEOPLE) --workers $(WORKERS)
	PYTHONPATH=data $(VENV)/bin/python -m people.build data/heads_192 --people 400 --views 16 --seed 1 \
		--recogniser mobilefacenet192 --crops five@1
	PYTHONPATH=data $(VENV)/bin/python -m people.shoot_turntable data/turntable
	PYTHONPATH=data $(VENV)/bin/python -m people.build --sheet figures/heads_contact_sheet.png

clean:
	rm -rf runs/study runs/fast runs/interrupted runs/monitored build

# torch comes first, so that the build asked for is the one that everything else finds.
$(VENV)/.torch:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(KEEP_TORCH) $(PIP) $(TORCH)
	touch $@

$(VENV)/.kit: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	touch $@

$(VENV)/.cfp: $(VENV)/.kit
	$(PIP) --editable ".[cfp]"
	touch $@

$(VENV)/.peft: $(VENV)/.kit
	$(PIP) --editable ".[peft]"
	touch $@

$(VENV)/.heads: $(VENV)/.kit
	$(PIP) --editable ".[heads]"
	touch $@

$(VENV)/.test: $(VENV)/.kit
	$(PIP) --editable ".[test]"
	touch $@

$(VENV)/.docs: $(VENV)/.kit
	$(PIP) --editable ".[docs]"
	touch $@

$(VENV)/.lint: $(VENV)/.kit
	$(PIP) --editable ".[lint]"
	touch $@

# InsightFace asks for the OpenCV that needs the system's libGL; where there is none, the headless build does.
$(VENV)/.test-all: $(VENV)/.kit
	$(PIP) --editable ".[test-all]"
	$(VENV)/bin/python -c "import cv2" 2>/dev/null || $(PIP) --force-reinstall --no-deps opencv-python-headless
	touch $@
