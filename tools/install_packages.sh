#!/usr/bin/env bash
# Installs Debian packages, unless all the commands that are wanted of them are there:
#   tools/install_packages.sh "COMMAND ..." PACKAGE...
set -euo pipefail
missing=()
for command in $1; do
    command -v "$command" >/dev/null || missing+=("$command")
done
shift
[ ${#missing[@]} -gt 0 ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "${missing[*]}: not installed; install it with your system's package manager" >&2
    exit 1
fi
as_root=$([ "$(id -u)" = 0 ] || echo sudo)
$as_root apt-get update --quiet=2
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends \
    "$@" >/dev/null
