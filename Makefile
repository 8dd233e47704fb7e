# make demo: a small random model in the original format, converted, answers about a picture.
# make test: all tests.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

demo: $(VENV)/.demo
	rm -rf runs/demo
	$(RUN) -m convert.random_hf runs/demo/original
	$(RUN) -m convert.to_jax runs/demo/original runs/demo/model --verify
	@echo "The weights are random, so the answer below is noise."
	$(RUN) sample.py --ckpt runs/demo/model --image examples/shapes.png \
	    --prompt "Which shapes do you see?" --max_new_tokens 48

test: $(VENV)/.test
	$(RUN) -m pytest

$(VENV)/.demo: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet -e ".[test]"
	touch $@

$(RUN):
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

.PHONY: demo test
