#!/usr/bin/env bash
# Turn a dense Llama into a graph of experts.
#
#   scripts/bootstrap_experts.sh MODEL OUT [E] [OPTIONS OF fedgraft bootstrap...]
#
# MODEL   directory or hub id of a dense Llama      OUT   folder of the new checkpoint      E   experts, 16
set -euo pipefail
if [[ $# -lt 2 || $1 == -* ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MODEL=$1 OUT=$2
shift 2
EXPERTS=16
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    EXPERTS=$1
    shift
fi
bash "$ROOT/scripts/install.sh"
exec "$ROOT/.venv/bin/fedgraft" bootstrap --model "$MODEL" --out "$OUT" --experts "$EXPERTS" "$@"
