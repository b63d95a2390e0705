#!/usr/bin/env bash
# Make the keys and certificates of a federation: an own authority, the SuperLink's TLS certificate, keys of SuperNodes.
#
#   scripts/deploy/certificates.sh authority DIR
#   scripts/deploy/certificates.sh server DIR NAME...
#   scripts/deploy/certificates.sh node DIR NAME
#   scripts/deploy/certificates.sh register HOST:PORT CA KEY.pub...
#   scripts/deploy/certificates.sh connection NAME HOST:PORT CA
#
# authority   ca.key and ca.crt in DIR, valid for ten years; ca.crt goes to every site, ca.key stays
# server      server.key and server.pem in DIR for the host names and IP addresses NAME..., besides localhost; signed by the
#             authority of DIR, valid for DAYS (365); made again when names differ or 30 days are left
# node        private key DIR/NAME and public key DIR/NAME.pub of a SuperNode, made on the site itself; the private key never
#             leaves it, the public one goes to the operator of the SuperLink
# register    let the SuperNodes with these public keys connect to the SuperLink; run it where the port may be reached
# connection  name a SuperLink for `fedgraft --connection NAME` and `flwr` in config.toml of FLWR_HOME (~/.flwr)
# --help      this text
#
# Existing keys are kept; a second call changes nothing. Keys are elliptic curves: P-384, readable by their owner alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
umask 077

CURVE=(-newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes)

make_authority() {
    [[ $# -eq 1 ]] || fail "expected: certificates.sh authority DIR"
    mkdir -p "$1"
    if [[ -f $1/ca.key && -f $1/ca.crt ]]; then
        echo "kept $1/ca.crt"
        return
    fi
    [[ ! -e $1/ca.key && ! -e $1/ca.crt ]] || fail "expected ca.key and ca.crt in $1, got one of them; remove or add it"
    openssl req -x509 "${CURVE[@]}" -days 3650 -subj "/CN=FedGraft authority" -keyout "$1/.ca.key" -out "$1/.ca.crt" \
        -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign 2>/dev/null
    chmod 644 "$1/.ca.crt"
    mv "$1/.ca.key" "$1/ca.key"
    mv "$1/.ca.crt" "$1/ca.crt"
    echo "made $1/ca.crt"
}

make_server() {
    [[ $# -ge 2 ]] || fail "expected: certificates.sh server DIR NAME..."
    local folder=$1 name names=DNS:localhost,IP:127.0.0.1
    shift
    [[ -r $folder/ca.key && -r $folder/ca.crt ]] || fail "expected ca.key and ca.crt in $folder; run certificates.sh authority"
    for name in "$@"; do
        [[ $name != localhost && $name != 127.0.0.1 ]] || continue
        if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then names+=,IP:$name; else names+=,DNS:$name; fi
        [[ $name =~ ^[A-Za-z0-9.:*-]+$ ]] || fail "expected host names and IP addresses, got '$name'"
    done
    if [[ -f $folder/server.pem && $(cat "$folder/server.names" 2>/dev/null) == "$names" ]] &&
        openssl x509 -checkend $((30 * 86400)) -noout -in "$folder/server.pem" >/dev/null &&
        openssl verify -CAfile "$folder/ca.crt" "$folder/server.pem" >/dev/null 2>&1; then
        echo "kept $folder/server.pem for $names"
        return
    fi
    openssl req "${CURVE[@]}" -subj "/CN=FedGraft SuperLink" -keyout "$folder/.server.key" -out "$folder/.server.csr" 2>/dev/null
    printf '%s\n' "subjectAltName=$names" basicConstraints=critical,CA:FALSE keyUsage=critical,digitalSignature \
        extendedKeyUsage=serverAuth >"$folder/.server.ext"
    openssl x509 -req -in "$folder/.server.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -CAcreateserial \
        -days "${DAYS:-365}" -sha384 -extfile "$folder/.server.ext" -out "$folder/.server.pem" 2>/dev/null
    mv "$folder/.server.key" "$folder/server.key"
    mv "$folder/.server.pem" "$folder/server.pem"
    echo "$names" >"$folder/server.names"
    rm "$folder/.server.csr" "$folder/.server.ext"
    echo "made $folder/server.pem for $names"
}

make_node() {
    [[ $# -eq 2 && $2 =~ ^[A-Za-z0-9._-]+$ ]] || fail "expected: certificates.sh node DIR NAME"
    mkdir -p "$1"
    if [[ -f $1/$2 ]]; then
        [[ -f $1/$2.pub ]] || ssh-keygen -y -f "$1/$2" >"$1/$2.pub"
        echo "kept $1/$2.pub"
        return
    fi
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "$2" -f "$1/$2"
    echo "made $1/$2.pub"
}

register_nodes() {
    [[ $# -ge 3 ]] || fail "expected: certificates.sh register HOST:PORT CA KEY.pub..."
    local address=$1 roots=$2
    shift 2
    mapfile -t keys < <(realpath -m "$@")
    helper register "$address" "$(realpath -m "$roots")" "${keys[@]}"
}

name_connection() {
    [[ $# -eq 3 ]] || fail "expected: certificates.sh connection NAME HOST:PORT CA"
    helper connection "$1" "$2" "$(realpath -m "$3")"
}

case ${1:-} in
    authority) make_authority "${@:2}" ;;
    server) make_server "${@:2}" ;;
    node) make_node "${@:2}" ;;
    register) need_python && register_nodes "${@:2}" ;;
    connection) need_python && name_connection "${@:2}" ;;
    -h | --help) print_help ;;
    *) fail "expected authority, server, node, register, connection or --help, got '${1:-}'" ;;
esac
