#!/usr/bin/env bash
# Run a federation as it is deployed, on this machine alone: one SuperLink (the server) and two SuperNodes
# (the clients) as processes of their own, talking over loopback. The job is submitted, followed to its end,
# and everything is stopped again. The exit status is the job's: 0 completed, 1 failed, 2 bad input.
#
#   scripts/deploy/local.sh GRAPH [ROUNDS] [KEY=VALUE...]
#   scripts/deploy/local.sh --resume LOG_DIR
#
# GRAPH     folder that `fedgraft bootstrap` wrote        ROUNDS   server rounds, 3 unless given
# KEY=VALUE any key of configs/default.toml
# --resume  continue the run of a log directory, with its settings; set CACHE_DIR (and DATA_DIR_0/_1) as for that run
#
# Environment, all optional:
#   FEDGRAFT_DATA   data sources separated by ';', shared by the clients, each taking its part
#   DATA_DIR_0/_1   private data of client 0 / 1 instead: only that SuperNode gets the folder
#   LOG_DIR         logs of the run (logs/local)          OUT      folder for the trained graph (none)
#   CACHE_DIR       state of the clients on disk, one folder each (removed at the end unless set)
#   TIMEOUT         time limit of the job in seconds (3600)
#   PYTHON          interpreter that has flwr (.venv/bin/python)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RESUME=
if [[ $# -eq 2 && $1 == --resume ]]; then
    RESUME=$(realpath -m "$2")
    LOG_DIR=$RESUME
    shift
fi
if [[ $# -lt 1 || $1 == -* ]]; then
    print_help >&2
    exit 2
fi
GRAPH=$(realpath -m "$1")
ROUNDS=${2:-3} # of a new run, as GRAPH
shift $(($# < 2 ? $# : 2))
LOG_DIR=$(realpath -m "${LOG_DIR:-$ROOT/logs/local}")
[[ $ROUNDS =~ ^[1-9][0-9]*$ ]] || fail "expected ROUNDS to be a number above 0, got '$ROUNDS'"
[[ -z $RESUME || -f $RESUME/state/settings.json ]] ||
    fail "expected the log directory of a run, found no '$RESUME/state/settings.json'"
need_python

WORK=$(mktemp -d)
CACHE_DIR=$(realpath -m "${CACHE_DIR:-$WORK/cache}")
# Of every process that this script starts.
export FEDGRAFT_JOB=fedgraft-local-$$-$RANDOM FLWR_HOME=$WORK/home TMPDIR=$WORK
exec_python() { cd "$ROOT" && exec "$PYTHON" "$@"; }
cleanup() {
    helper stop "$FEDGRAFT_JOB" || true
    rm -rf "$WORK"
}
trap cleanup EXIT
# The server saves the model of the rounds so far before everything is stopped; a second Ctrl-C ends at once.
trap 'trap "exit 130" INT; (exec_python fedgraft.py stop "$LOG_DIR") && ${RUN:+wait "$RUN"} || true; exit 130' INT
# What this script starts has a process group of its own, which Ctrl-C on the console does not reach.
apart() {
    set -m
    "$@" &
    set +m
}
trap 'exit 143' TERM
mkdir -p "$LOG_DIR" "$WORK/empty"
# Stops everything where this script is killed and cannot.
apart exec_python -m scripts.deploy.commands guard "$FEDGRAFT_JOB" $$ "$WORK"
disown
read -r LINK NODE_0 NODE_1 < <(helper ports 3)

flower() {
    local log=$1
    shift
    flower_environment
    cd "$WORK/empty" && exec "$@" >"$LOG_DIR/$log" 2>&1
}
launch() {
    apart flower "$@"
    disown
}
node() {
    local index=$1 port=$2 data_dir=$3
    local config="partition-id=$index num-partitions=2 cache-dir=\"$CACHE_DIR/client$index\""
    if [[ -n $data_dir ]]; then config+=" data-dir=\"$(realpath -m "$data_dir")\""; fi
    launch "supernode$index.log" flower-supernode --insecure --superlink "127.0.0.1:$LINK" \
        --host 127.0.0.1 --port "$port" --node-config "$config"
}
launch superlink.log flower-superlink --insecure --host 127.0.0.1 --port "$LINK"
node 0 "$NODE_0" "${DATA_DIR_0:-}"
node 1 "$NODE_1" "${DATA_DIR_1:-}"

# The app runs in another folder, so every path is made absolute.
absolute_sources() {
    local IFS=';' source sources=()
    for source in $1; do
        if [[ -e $source ]]; then source=$(realpath "$source"); fi
        sources+=("$source")
    done
    echo "${sources[*]}"
}
if [[ -n $RESUME ]]; then
    COMMAND=(resume "$RESUME")
else
    COMMAND=(submit --graph "$GRAPH" --rounds "$ROUNDS" --log-dir "$LOG_DIR")
    if [[ -n ${FEDGRAFT_DATA:-} ]]; then COMMAND+=(--set "data=$(absolute_sources "$FEDGRAFT_DATA")"); fi
    if [[ -n ${OUT:-} ]]; then COMMAND+=(--out "$(realpath -m "$OUT")"); fi
    for setting in "$@"; do COMMAND+=(--set "$setting"); done
fi
COMMAND+=(--superlink "127.0.0.1:$LINK" --insecure --timeout "${TIMEOUT:-3600}")
# In the background, so that a signal ends the wait at once and the trap above stops everything.
apart exec_python fedgraft.py "${COMMAND[@]}"
RUN=$!
wait "$RUN"
