#!/usr/bin/env bash
# Start a SuperLink, the server of a federation, with TLS and SuperNode authentication.
#
#   scripts/deploy/superlink.sh --certificates DIR [--host HOST] [--port PORT] [--state DIR] [--detach]
#   scripts/deploy/superlink.sh --stop [--state DIR]
#
# --certificates DIR  folder with ca.crt, server.pem and server.key of `certificates.sh`
# --host HOST         address to listen at (127.0.0.1); 0.0.0.0 for all: read docs/deployment.md first, since whoever
#                     reaches the port and is not held back by a firewall can start runs
# --port PORT         port (9093)
# --state DIR         folder of its database, log and apps (~/.local/state/fedgraft/superlink)
# --no-node-authentication  accept any SuperNode
# --isolation process server apps are started by superexec.sh: they outlast a restart of the SuperLink (subprocess)
# --insecure          no TLS and no SuperNode authentication; with a loopback host only
# --detach            return once it answers; a second call finds it running and does nothing
# --stop              end the SuperLink of the state folder
# --help              this text
#
# Runs in the foreground without --detach, for systemd and containers. Nodes and runs are in the database, which
# survives a restart. PYTHON names the interpreter that has flwr (.venv/bin/python).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ARGUMENTS=("$@")
split_options "$@"
set -- "${OPTIONS[@]}"
CERTIFICATES='' HOST=127.0.0.1 PORT=9093 INSECURE='' DETACH='' STOP='' AUTHENTICATION=1 ISOLATION=subprocess
STATE=${XDG_STATE_HOME:-$HOME/.local/state}/fedgraft/superlink
while [[ $# -gt 0 ]]; do
    case $1 in
        --certificates) CERTIFICATES=$(value "$@"); shift 2 ;;
        --host) HOST=$(value "$@"); shift 2 ;;
        --port) PORT=$(value "$@"); shift 2 ;;
        --state) STATE=$(value "$@"); shift 2 ;;
        --isolation) ISOLATION=$(value "$@"); shift 2 ;;
        --no-node-authentication) AUTHENTICATION='' && shift ;;
        --insecure) INSECURE=1 && shift ;;
        --detach) DETACH=1 && shift ;;
        --stop) STOP=1 && shift ;;
        -h | --help) print_help && exit 0 ;;
        *) fail "expected an option of --help, got '$1'" ;;
    esac
done
STATE=$(realpath -m "$STATE")
CERTIFICATES=${CERTIFICATES:+$(realpath -m "$CERTIFICATES")}
need_python
if [[ -n $STOP ]]; then
    stop_process "$STATE"
    exit 0
fi
[[ $PORT =~ ^[0-9]+$ ]] || fail "expected --port as a number, got '$PORT'"
[[ $ISOLATION == process || $ISOLATION == subprocess ]] ||
    fail "expected --isolation process or subprocess, got '$ISOLATION'"
CONNECTION=(--isolation "$ISOLATION")
if [[ -n $INSECURE ]]; then
    [[ $HOST == 127.* || $HOST == localhost || $HOST == ::1 ]] ||
        fail "expected a loopback --host with --insecure, got '$HOST'; make certificates with certificates.sh"
    CONNECTION+=(--insecure)
else
    [[ -n $CERTIFICATES ]] || fail "expected --certificates, got none; make them with certificates.sh"
    for name in ca.crt server.pem server.key; do
        [[ -r $CERTIFICATES/$name ]] || fail "expected a readable $CERTIFICATES/$name; make it with certificates.sh"
    done
    CONNECTION+=(--ssl-ca-certfile "$CERTIFICATES/ca.crt" --ssl-certfile "$CERTIFICATES/server.pem")
    CONNECTION+=(--ssl-keyfile "$CERTIFICATES/server.key")
    if [[ -n $AUTHENTICATION ]]; then CONNECTION+=(--enable-supernode-auth); fi
fi
umask 077
mkdir -p "$STATE/empty" "$STATE/home"
case $HOST in
    0.0.0.0) REACHED=127.0.0.1:$PORT ;;
    *:*) REACHED=[$HOST]:$PORT ;;
    *) REACHED=$HOST:$PORT ;;
esac
answers() {
    if [[ -n $INSECURE ]]; then helper healthy "$REACHED"; else helper healthy "$REACHED" "$CERTIFICATES/ca.crt"; fi
}
if detaches; then
    exit_if_running "$STATE"
    detach_until "$STATE" answers
    exit 0
fi
flower_environment
export FLWR_HOME=$STATE/home
run_process "$STATE" flower-superlink "${CONNECTION[@]}" --host "$HOST" --port "$PORT" --database "$STATE/superlink.db"
