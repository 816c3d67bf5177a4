# `make look`, `make demo`, `make view` and `make test` do everything on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
DEMO_PEOPLE = --monocular-people 400 --monocular-timesteps 4 --multiview-people 120 --multiview-timesteps 2

# glibc would give every large buffer back to the kernel and take it anew, a sixth of a step's time.
export MALLOC_MMAP_THRESHOLD_ = 1073741824
export MALLOC_TRIM_THRESHOLD_ = 4294967296
export MALLOC_TOP_PAD_ = 268435456

# Multi-view people are scarce, as in the paper, and monocular tracking errs as one camera's does: it
# reports half of a head's turn, and takes heads for a fifth larger than they are. Cameras stand nearer
# and farther, so that their distance does not tell the source.
ABLATION_PEOPLE = --monocular-people 2000 --monocular-timesteps 2 --multiview-people 60 --multiview-timesteps 3 \
	--test-people 16 --reported-turn 0.5 --reported-size 1.2 --distance-spread 0.5
ABLATION = configs/ablation/sinks.py,configs/ablation/no_sinks.py,configs/ablation/only_mono.py,configs/ablation/only_multi.py

.PHONY: look demo view ablation test test-slow lint clean

demo: $(VENV)/.demo
	$(RUN) data_pipelines.prepare procedural --out data/procedural --size 64 $(DEMO_PEOPLE)
	$(RUN) flexavatar_jax.train --config configs/demo.py --workdir runs/demo
	$(RUN) flexavatar_jax.evaluate --workdir runs/demo
	@echo "The report is at runs/demo/report/index.html"

# A person that the weights in pretrained/ never saw, in the browser within a minute; Ctrl-C ends.
look: $(VENV)/.view
	$(RUN) data_pipelines.prepare procedural --out data/look --size 128 --monocular-people 1 \
		--monocular-timesteps 1 --multiview-people 1 --multiview-timesteps 1 --test-people 4
	@mkdir -p runs
	$(RUN) flexavatar_jax.avatar create data/look/procedural_test/test_00000 \
		--workdir pretrained/procedural --out runs/look.avatar
	$(RUN) flexavatar_jax.avatar view runs/look.avatar --workdir pretrained/procedural

# The first test person, to be turned and moved in the browser; Ctrl-C ends.
view: $(VENV)/.view runs/demo/test_00000.avatar
	$(RUN) flexavatar_jax.avatar view runs/demo/test_00000.avatar --workdir runs/demo

runs/demo/test_00000.avatar: runs/demo/metrics.json
	$(RUN) flexavatar_jax.avatar create data/procedural/procedural_test/test_00000 \
		--workdir runs/demo --out $@

runs/demo/metrics.json:
	$(MAKE) demo

# Hours on two cores; given again, it goes on where it was stopped.
ablation: $(VENV)/.demo
	$(RUN) data_pipelines.prepare procedural --out data/ablation --size 64 $(ABLATION_PEOPLE)
	$(RUN) flexavatar_jax.compare --seeds 0,1,2 --workdir runs/ablation --out docs/ablation \
		--configs $(ABLATION)

test: $(VENV)/.test
	$(RUN) pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test
	$(RUN) pytest -m slow

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: $(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python setup.py
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.view: $(VENV)/bin/python setup.py
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[view]"
	@touch $@ $(VENV)/.demo

$(VENV)/.test: $(VENV)/bin/python setup.py
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) runs data build *.egg-info
