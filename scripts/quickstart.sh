#!/usr/bin/env bash
# Install, then run all stages once on the embedded model: bootstrap, federated training, export, samples.
#
#   scripts/quickstart.sh [--fresh]       --fresh: repeat the stages that have results
#
# Results go to logs/quickstart, the graph to the user-cache folder (FEDGRAFT_CACHE), as default of runs that
# name no graph. Environment: see scripts/install.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
exec .venv/bin/python -m scripts.quickstart "$@"
