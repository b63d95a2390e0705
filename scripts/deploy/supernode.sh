#!/usr/bin/env bash
# Start a SuperNode, a client of a federation with its own data, which connects to the SuperLink over TLS.
#
#   scripts/deploy/supernode.sh --superlink HOST:PORT --root-certificates FILE --key FILE [OPTIONS] KEY=VALUE...
#   scripts/deploy/supernode.sh --stop [--state DIR]
#
# KEY=VALUE           node configuration (configs/node_config.py), for instance
#                     partition-id=0 data-dir=/srv/data base=/models/llama memory-budget-mb=4000; checked before the start
# --superlink         address of the SuperLink
# --root-certificates ca.crt of the SuperLink's operator
# --key FILE          private key of `certificates.sh node`, whose public key the operator has registered
# --port PORT         loopback port between the processes of this node (a free one)
# --state DIR         folder of its log, apps and, unless cache-dir is set, cache (~/.local/state/fedgraft/supernode)
# --insecure          no TLS; with a SuperLink on loopback only
# --detach            return once the SuperLink has accepted the node; a second call does nothing
# --stop              end the SuperNode of the state folder
# --help              this text
#
# Runs in the foreground without --detach, for systemd and containers. It opens outgoing connections only, and listens
# on loopback alone. PYTHON names the interpreter that has flwr (.venv/bin/python).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARGUMENTS=("$@")
split_options "$@"
set -- "${OPTIONS[@]}"
SUPERLINK='' ROOTS='' KEY='' PORT='' INSECURE='' DETACH='' STOP='' SETTINGS=()
STATE=${XDG_STATE_HOME:-$HOME/.local/state}/fedgraft/supernode
while [[ $# -gt 0 ]]; do
    case $1 in
        --superlink) SUPERLINK=$(value "$@"); shift 2 ;;
        --root-certificates) ROOTS=$(value "$@"); shift 2 ;;
        --key) KEY=$(value "$@"); shift 2 ;;
        --port) PORT=$(value "$@"); shift 2 ;;
        --state) STATE=$(value "$@"); shift 2 ;;
        --insecure) INSECURE=1 && shift ;;
        --detach) DETACH=1 && shift ;;
        --stop) STOP=1 && shift ;;
        -h | --help) print_help && exit 0 ;;
        [a-z]*=*) SETTINGS+=("$1") && shift ;;
        *) fail "expected an option of --help or KEY=VALUE, got '$1'" ;;
    esac
done
STATE=$(realpath -m "$STATE")
ROOTS=${ROOTS:+$(realpath -m "$ROOTS")} KEY=${KEY:+$(realpath -m "$KEY")}
need_python
if [[ -n $STOP ]]; then
    stop_process "$STATE"
    exit 0
fi
connection_options
if [[ -n $KEY ]]; then
    [[ -r $KEY ]] || fail "expected --key with a readable private key, got '$KEY'; make one with certificates.sh node"
    [[ $(stat -c %a "$KEY") == ?00 ]] || fail "expected a private key for its owner alone; run: chmod 600 '$KEY'"
    CONNECTION+=(--auth-supernode-private-key "$KEY")
fi
umask 077
mkdir -p "$STATE/empty" "$STATE/home"
if detaches; then exit_if_running "$STATE"; fi
helper node-config "$STATE/node.toml" "cache-dir=$STATE/cache" "${SETTINGS[@]}"
accepted() { grep -q 'SuperNode ID:' "$STATE/log" 2>/dev/null; }
if detaches; then
    detach_until "$STATE" accepted
    exit 0
fi
PORT=${PORT:-$(helper ports 1)}
flower_environment
export FLWR_HOME=$STATE/home
run_process "$STATE" flower-supernode --superlink "$SUPERLINK" "${CONNECTION[@]}" --host 127.0.0.1 --port "$PORT" --node-config "$STATE/node.toml"
