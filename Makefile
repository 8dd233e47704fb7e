# make demo: trains the small model (STEPS=n for a short run), then asks it about two pictures.
# make test: all tests; FLAGS="..." are flags of pytest.
PYTHON ?= python3
VENV ?= .venv
STEPS ?=
FLAGS ?=
RUN := $(VENV)/bin/python

demo: $(VENV)/.demo
	$(RUN) train.py --config=configs/tiny.py $(if $(STEPS),--config.steps=$(STEPS) --workdir=runs/short)
	$(RUN) sample.py --ckpt $(if $(STEPS),runs/short,runs/tiny) --image examples/question.png \
	    --prompt "How many shapes do you see?"
	$(RUN) sample.py --ckpt $(if $(STEPS),runs/short,runs/tiny) --image examples/grounding.png \
	    --prompt "Locate <|ref|>the green square<|/ref|> in the given image." \
	    --draw runs/boxes.png

test: $(VENV)/.test
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(FLAGS)

$(VENV)/.demo: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet -e ".[plots]"
	touch $@

$(VENV)/.test: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet -e ".[test]"
	touch $@

$(RUN):
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

.PHONY: demo test
