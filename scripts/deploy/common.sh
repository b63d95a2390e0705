# Functions of the deployment scripts, which source this file: help, environment, one process per state folder.

ROOT=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}

fail() {
    echo "error: $*" >&2
    exit 2
}

# The comment at the start of the script.
print_help() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }

need_python() {
    [[ -x $PYTHON ]] || fail "expected a Python interpreter at '$PYTHON'; run scripts/install.sh first or set PYTHON"
}

# A module of the project, started in its folder.
helper() { (cd "$ROOT" && exec "$PYTHON" -m scripts.deploy.commands "$@"); }

# Value of an option that needs one: `value "$@"` with the option first.
value() {
    [[ $# -ge 2 ]] || fail "expected a value after $1, got none"
    printf '%s' "$2"
}

# The arguments in OPTIONS, with --option=value as two of them.
split_options() {
    local argument
    OPTIONS=()
    for argument in "$@"; do
        case $argument in
            --*=*) OPTIONS+=("${argument%%=*}" "${argument#*=}") ;;
            *) OPTIONS+=("$argument") ;;
        esac
    done
}

# Options of the connection to the SuperLink in CONNECTION, from SUPERLINK, ROOTS and INSECURE: TLS with root
# certificates, or none on loopback.
connection_options() {
    [[ -n $SUPERLINK ]] || fail "expected --superlink, got none"
    if [[ -n $INSECURE ]]; then
        [[ $SUPERLINK == 127.* || $SUPERLINK == localhost:* ]] ||
            fail "expected a --superlink on loopback with --insecure, got '$SUPERLINK'; set --root-certificates"
        CONNECTION=(--insecure)
    else
        [[ -r $ROOTS ]] ||
            fail "expected --root-certificates with a readable file, got '$ROOTS'; ask the operator for ca.crt"
        CONNECTION=(--root-certificates "$ROOTS")
    fi
}

# Whether --detach asks for the background, and this is not the script there.
detaches() { [[ -n $DETACH && -z ${FEDGRAFT_FOREGROUND:-} ]]; }

# End this script where the process of the state folder $1 runs already.
exit_if_running() {
    if is_running "$1"; then
        echo "already running: process $(<"$1/pid"), log: $1/log"
        exit 0
    fi
}

# Environment of Flower's processes: they install nothing, report nothing, keep to one thread each unless
# OMP_NUM_THREADS is set, and a proxy of the environment does not receive their connections over loopback; gRPC prefers
# no_grpc_proxy to no_proxy where it is set.
flower_environment() {
    local direct=${no_proxy:-${NO_PROXY:-}} loopback=127.0.0.1,localhost,::1
    export no_proxy="${direct:+$direct,}$loopback"
    if [[ -n ${no_grpc_proxy+set} ]]; then export no_grpc_proxy="${no_grpc_proxy:+$no_grpc_proxy,}$loopback"; fi
    export NO_PROXY=$no_proxy PATH="$(dirname "$PYTHON"):$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
    export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=${FLWR_SUPEREXEC_TASK_POLL_INTERVAL:-0.2}
    unset PYTHONPATH
}

# Whether a process holds the lock of the state folder $1.
is_running() { [[ -f $1/lock ]] && ! flock --nonblock --shared "$1/lock" true; }

# End the process of the state folder $1, and no other: SIGTERM, then SIGKILL after 20 s.
stop_process() {
    if ! is_running "$1"; then
        echo "nothing runs in $1"
        return
    fi
    local pid
    pid=$(<"$1/pid")
    kill -TERM "$pid"
    for ((tenths = 0; tenths < 200; tenths++)); do
        is_running "$1" || break
        sleep 0.1
    done
    if is_running "$1"; then kill -KILL "$pid"; fi
    echo "ended process $pid of $1"
}

# Replace this script with a command whose process holds the lock of the state folder $1.
run_process() {
    local folder=$1
    shift
    exec 9>>"$folder/lock"
    flock --nonblock 9 || fail "expected a free state folder, got '$folder', in use by process $(cat "$folder/pid")"
    echo $$ >"$folder/pid"
    # Flower's processes start in an empty folder, which comes before the app on Python's path.
    cd "$folder/empty"
    exec "$@"
}

# Run this script again in the background, with its log in the state folder $1, until the command $2... succeeds, for
# START_SECONDS (300) at most.
detach_until() {
    local folder=$1 log=$1/log
    shift
    FEDGRAFT_FOREGROUND=1 setsid bash "$0" "${ARGUMENTS[@]}" >"$log" 2>&1 </dev/null &
    local pid=$!
    local end=$((SECONDS + ${START_SECONDS:-300}))
    until "$@"; do
        if ((SECONDS > end)); then
            kill -TERM "$pid"
            echo "error: it did not start within ${START_SECONDS:-300} s (log: $log)" >&2
            exit 1
        fi
        if ! kill -0 "$pid" 2>/dev/null; then
            wait "$pid" || true
            echo "error: it ended at once: $(grep -v '^[[:space:]]*$' "$log" | tail -n 1) (log: $log)" >&2
            exit 1
        fi
        sleep 0.3
    done
    echo "process $pid, log: $log"
}
