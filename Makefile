# The front door. `make` alone lists what there is.
# COURSE_VENV: the environment's folder. LAB_ARGS, TEST_ARGS: more words for `jupyter lab` and for pytest. NBS: notebooks to run.
COURSE_VENV ?= .venv
LAB_ARGS ?=
TEST_ARGS ?=
NBS ?=
PY = $(COURSE_VENV)/bin/python
SETUP = COURSE_VENV="$(COURSE_VENV)" sh tools/setup.sh

.PHONY: help lab test export run gates readme lock bench clean

help:
	@echo "make lab     install into $(COURSE_VENV) (once) and open the quick start in JupyterLab"
	@echo "             more arguments: make lab LAB_ARGS=\"--no-browser --port 8890\""
	@echo "make test    install what tests need and run every test"
	@echo "             only some: make test TEST_ARGS=\"nbs/00_core.ipynb tests/test_install.py\""
	@echo "make export  clean the notebooks and write the modules of vlmcourse/ from them"
	@echo "make run     run notebooks and save their outputs: make run NBS=nbs/00_core.ipynb"
	@echo "make gates   check the conventions of the notebooks and of the package"
	@echo "make readme  write README.md from nbs/index.ipynb"
	@echo "make bench   print how long imports take"
	@echo "make lock    work out requirements.lock anew (needs uv)"
	@echo "make clean   remove $(COURSE_VENV)"

lab:
	@$(SETUP)
	@COURSE_VENV="$(COURSE_VENV)" sh tools/lab.sh $(LAB_ARGS)

test:
	@$(SETUP) test
	@HF_HUB_OFFLINE=1 $(PY) -m pytest $(TEST_ARGS)

export:
	@$(SETUP)
	@$(PY) -c "from nbdev.clean import nbdev_clean; nbdev_clean()"
	@$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export()"

run:
	@$(SETUP) test
	@HF_HUB_OFFLINE=1 $(PY) tools/run_nbs.py --write $(NBS)

gates:
	@$(SETUP) test
	@$(PY) tools/gates.py

readme:
	@$(SETUP)
	@$(PY) tools/make_readme.py

bench:
	@$(SETUP)
	@$(PY) tools/bench_import.py

lock:
	uv pip compile --universal --upgrade --python-version 3.11 --all-extras --no-header --no-annotate --no-emit-index-url pyproject.toml -o requirements.lock

clean:
	@if [ -e "$(COURSE_VENV)/pyvenv.cfg" ]; then rm -rf "$(COURSE_VENV)"; else echo "$(COURSE_VENV) is no Python environment"; fi
