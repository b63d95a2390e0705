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

RESUME=
if [[ $# -eq 2 && $1 == --resume ]]; then
    RESUME=$(realpath -m "$2")
    LOG_DIR=$RESUME
    shift
fi
if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
GRAPH=$(realpath -m "$1")
ROUNDS=${2:-3} # of a new run, as GRAPH
shift $(($# < 2 ? $# : 2))
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
LOG_DIR=$(realpath -m "${LOG_DIR:-$ROOT/logs/local}")
if [[ ! $ROUNDS =~ ^[1-9][0-9]*$ ]]; then
    echo "error: expected ROUNDS to be a number above 0, got '$ROUNDS'" >&2
    exit 2
fi
if [[ -n $RESUME && ! -f $RESUME/state/settings.json ]]; then
    echo "error: expected the log directory of a run, found no '$RESUME/state/settings.json'" >&2
    exit 2
fi
if [[ ! -x $PYTHON ]]; then
    echo "error: expected a Python interpreter at '$PYTHON'; run scripts/quickstart.sh first or set PYTHON" >&2
    exit 2
fi

WORK=$(mktemp -d)
CACHE_DIR=$(realpath -m "${CACHE_DIR:-$WORK/cache}")
JOB=fedgraft-local-$$-$RANDOM
exec_python() { cd "$ROOT" && exec env FEDGRAFT_JOB="$JOB" FLWR_HOME="$WORK/home" TMPDIR="$WORK" "$PYTHON" "$@"; }
processes() { (exec_python -m scripts.deploy.commands "$@"); }
fedgraft() { (exec_python fedgraft.py "$@"); }
cleanup() {
    processes stop "$JOB" || true
    rm -rf "$WORK"
}
trap cleanup EXIT
# The server saves the model of the rounds so far before everything is stopped; a second Ctrl-C ends at once.
trap 'trap "exit 130" INT; fedgraft stop "$LOG_DIR" && ${RUN:+wait "$RUN"} || true; exit 130' INT
# What this script starts has a process group of its own, which Ctrl-C on the console does not reach.
apart() {
    set -m
    "$@" &
    set +m
}
trap 'exit 143' TERM
mkdir -p "$LOG_DIR" "$WORK/empty"
# Stops everything where this script is killed and cannot.
apart exec_python -m scripts.deploy.commands guard "$JOB" $$ "$WORK"
disown
read -r LINK NODE_0 NODE_1 < <(processes ports 3)

# Flower's processes start in an empty folder, install nothing, report nothing and keep to one thread each; a proxy of
# the environment does not receive their connections over loopback.
DIRECT=${no_proxy:-${NO_PROXY:-}}
DIRECT=${DIRECT:+$DIRECT,}127.0.0.1,localhost,::1
flower() {
    local log=$1
    shift
    cd "$WORK/empty" && exec env -u PYTHONPATH \
        PATH="$(dirname "$PYTHON"):$PATH" FLWR_HOME="$WORK/home" FEDGRAFT_JOB="$JOB" OMP_NUM_THREADS=1 \
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.2 no_proxy="$DIRECT" NO_PROXY="$DIRECT" \
        no_grpc_proxy="${no_grpc_proxy:+$no_grpc_proxy,}$DIRECT" "$@" >"$LOG_DIR/$log" 2>&1
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
