#!/usr/bin/env bash
# Create .venv and install FedGraft in it; do nothing if requirements and extras are unchanged.
#
#   scripts/install.sh [EXTRA]        EXTRA: test, clustering, gguf, plots, privacy, real or ui; several joined by commas
#
# Environment, all optional:
#   PYTHON           interpreter that creates the environment (python3.11, else a python3 of that version)
#   FEDGRAFT_TORCH   requirement by which pip installs torch (torch==2.13.0), e.g. a wheel of another build,
#                    or the same requirement followed by pip options that point to an index of such builds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRA=${1:-}
TORCH=${FEDGRAFT_TORCH:-torch==2.13.0}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: expected Python 3.11 or 3.12 on the PATH, found none; install it or set PYTHON" >&2
    return 2
}

stamp_of() { cat pyproject.toml constraints.txt <(echo "$TORCH $1") | cksum | tr -d ' '; }

# An installation with the test extra also serves where no extra is asked for.
for extra in "$EXTRA" test; do
    if [[ -e .venv/.fedgraft-$(stamp_of "$extra") && -x .venv/bin/fedgraft ]]; then exit 0; fi
done
interpreter=$(find_python)
[[ -x .venv/bin/python ]] || "$interpreter" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
echo "installing into .venv (a few minutes the first time)" >&2
# torch first and by itself: as a dependency of others pip would choose its own build.
# shellcheck disable=SC2086
pip install --quiet $TORCH >&2
pip install --quiet --constraint constraints.txt --editable ".${EXTRA:+[$EXTRA]}" >&2
rm -f .venv/.fedgraft-*
touch ".venv/.fedgraft-$(stamp_of "$EXTRA")"
