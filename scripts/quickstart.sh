#!/usr/bin/env bash
# Install, then run the whole job once on the embedded model: bootstrap, federate, export, look.
#
#   scripts/quickstart.sh [--fresh]       --fresh: do again what an earlier run has done already
#
# Results go to logs/quickstart, the graph also to the user-cache folder (FEDGRAFT_CACHE), from where runs without
# a named graph take it. Environment: see scripts/install.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
exec .venv/bin/python -m scripts.quickstart "$@"
