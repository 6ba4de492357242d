#!/bin/sh
# Open JupyterLab on the quick start; called by `make lab`. Arguments go on to `jupyter lab`.
set -eu
cd "$(dirname "$0")/.."
bin=${COURSE_VENV:-.venv}/bin
# Saved plots are HTML, which JupyterLab shows only in notebooks that you trust; these are the course's own.
"$bin/jupyter" trust nbs/*.ipynb >/dev/null || true   # without it the plots appear when the cells are run
# Jupyter will not start for root (containers, cloud machines) unless told to. It listens on this machine only.
[ "$(id -u)" != 0 ] || set -- --allow-root "$@"
exec "$bin/jupyter" lab --ServerApp.root_dir="$PWD" --LabApp.default_url=/lab/tree/nbs/quickstart.ipynb "$@"
