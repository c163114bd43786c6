#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Installs what the interop tests need beside Rust and Node.js 20: the brokers (nats-server, redis-server, rabbitmq-server,
# mosquitto) and openssl from Debian's packages, and the NestJS peers from npm. Does nothing, quickly, when all of it is
# there. Needs root (or sudo) only to install packages.

set -eu
here=$(cd "$(dirname "$0")" && pwd)

fail() {
    echo "setup.sh: $*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "installing packages needs root: run '$*' as root and try again"
    fi
}

# Debian starts a service as soon as its package is installed. The tests start their own brokers, so a policy forbids that
# while apt-get runs, and is taken away again unless the machine had one already.
policy=/usr/sbin/policy-rc.d
remove_policy() {
    if [ -n "${made_policy:-}" ]; then as_root rm -f "$policy"; fi
}
trap remove_policy EXIT
trap 'exit 1' HUP INT TERM

install_packages() {
    command -v apt-get >/dev/null || fail "missing: $*; this is no Debian, install them by hand"
    if [ ! -e "$policy" ]; then
        made_policy=yes
        as_root sh -c "printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy"
    fi
    # A stale or empty package list fails the first try.
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" || {
        as_root apt-get update
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
    }
    if [ -d /run/systemd/system ]; then
        for package in "$@"; do
            case $package in
            nats-server | redis-server | mosquitto) as_root systemctl disable --now "$package" ;;
            # epmd comes with Erlang; a socket would start it again.
            rabbitmq-server) as_root systemctl disable --now rabbitmq-server epmd.socket epmd.service ;;
            esac
        done
    fi
}

# On Debian most brokers lie in /usr/sbin, which is not on every user's PATH.
PATH="$PATH:/usr/sbin:/sbin"

# Each is named like its package.
tools="nats-server redis-server rabbitmq-server mosquitto openssl"
missing=
for tool in $tools; do
    command -v "$tool" >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # a list of package names
    install_packages $missing
fi
for tool in $tools; do
    command -v "$tool" >/dev/null || fail "$tool is still missing"
done

command -v node >/dev/null || fail "Node.js is missing: install version 20 or later"
command -v npm >/dev/null || fail "npm is missing: install it with Node.js"
major=$(node -p 'process.versions.node.split(".")[0]')
[ "$major" -ge 20 ] || fail "Node.js $(node --version) is too old: NestJS 12 needs version 20 or later"

for peer in nest10 nest11 nest12; do
    stamp="$here/$peer/node_modules/.installed"
    wanted=$(sha256sum <"$here/$peer/package-lock.json")
    if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
        echo "$peer: up to date"
        continue
    fi
    echo "$peer: installing"
    (cd "$here/$peer" && npm ci --no-audit --no-fund --ignore-scripts --loglevel=error) || fail "npm ci failed in $here/$peer"
    echo "$wanted" >"$stamp"
done
