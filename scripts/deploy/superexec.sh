#!/usr/bin/env bash
# Start a SuperExec, which starts the server apps of a SuperLink on the same machine: runs outlast the SuperLink's restart.
#
#   scripts/deploy/superexec.sh --superlink HOST:PORT --root-certificates FILE [--state DIR] [--detach]
#   scripts/deploy/superexec.sh --stop [--state DIR]
#
# --superlink         address of the SuperLink, started with `superlink.sh --isolation process`
# --root-certificates ca.crt of `certificates.sh`
# --state DIR         folder of its log and apps (~/.local/state/fedgraft/superexec)
# --insecure          no TLS; with a SuperLink on loopback only
# --detach            return once it runs; a second call does nothing
# --stop              end the SuperExec of the state folder
# --help              this text
#
# Runs in the foreground without --detach, for systemd. It may start before the SuperLink, for which it waits. PYTHON
# names the interpreter that has flwr (.venv/bin/python).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARGUMENTS=("$@")
split_options "$@"
set -- "${OPTIONS[@]}"
SUPERLINK='' ROOTS='' INSECURE='' DETACH='' STOP=''
STATE=${XDG_STATE_HOME:-$HOME/.local/state}/fedgraft/superexec
while [[ $# -gt 0 ]]; do
    case $1 in
        --superlink) SUPERLINK=$(value "$@"); shift 2 ;;
        --root-certificates) ROOTS=$(value "$@"); shift 2 ;;
        --state) STATE=$(value "$@"); shift 2 ;;
        --insecure) INSECURE=1 && shift ;;
        --detach) DETACH=1 && shift ;;
        --stop) STOP=1 && shift ;;
        -h | --help) print_help && exit 0 ;;
        *) fail "expected an option of --help, got '$1'" ;;
    esac
done
STATE=$(realpath -m "$STATE")
ROOTS=${ROOTS:+$(realpath -m "$ROOTS")}
need_python
if [[ -n $STOP ]]; then
    stop_process "$STATE"
    exit 0
fi
connection_options
umask 077
mkdir -p "$STATE/empty" "$STATE/home"
started() { grep -q 'Starting Flower SuperExec' "$STATE/log" 2>/dev/null; }
if detaches; then
    exit_if_running "$STATE"
    detach_until "$STATE" started
    exit 0
fi
flower_environment
export FLWR_HOME=$STATE/home
run_process "$STATE" flower-superexec --runtime-api-address "$SUPERLINK" "${CONNECTION[@]}"
