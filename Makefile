# make demo      install into .venv and watch the bundled model rank pictures
# make test      the tests
# make test-browser  the tests of the Space in a real Chromium, which must be installed; leaves pictures in outputs/browser
# make test-vllm the tests that need the real vLLM, which runs on the CPU in an environment of its own (2.5 GB)
# make test-nightly  all of these, those too that take minutes each
# make test-data the rules of the example's data, on the real data (fetches and renders them first: needs npm)
# make quality   style of the code
# make build     sdist and wheel, into dist/

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

.PHONY: demo test test-browser test-vllm test-nightly test-data quality build clean

demo: $(VENV)/.installed
	$(VENV)/bin/vretrver demo $(ARGS)

# Models in tests are so small that a second thread only waits for the first; a second process does not.
test: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not nightly" $(ARGS)

test-browser: $(VENV)/.installed-test-browser
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -o addopts=-ra tests/browser $(ARGS)

test-vllm: $(VENV)-vllm/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/vllm_cpu -m "not nightly" $(ARGS)

test-nightly: $(VENV)/.installed-test $(VENV)-vllm/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/vllm_cpu $(ARGS)

test-data: $(VENV)/.installed-test
	$(VENV)/bin/python recipes/emoji/build_data.py
	EMOJI_DATA=$(CURDIR)/recipes/emoji/data $(VENV)/bin/python -m pytest tests/test_recipes_emoji_data.py \
		tests/test_recipes_emoji_samples.py tests/test_recipes_emoji_tasks.py tests/test_recipes_emoji_scenes.py $(ARGS)

quality: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

build: $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet build
	$(VENV)/bin/python -m build

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist outputs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Installed again whenever the requirements change.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

$(VENV)/.installed-test-browser: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test-browser]"
	touch $@

$(VENV)-vllm/.installed: pyproject.toml tests/vllm_cpu/environment.sh
	PYTHON=$(PYTHON) tests/vllm_cpu/environment.sh $(VENV)-vllm
