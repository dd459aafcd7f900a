#!/usr/bin/env bash
# Installs bubblewrap, the sandbox that generated programs run in, if it is not there.
set -euo pipefail
command -v bwrap >/dev/null && exit 0
if ! command -v apt-get >/dev/null; then
    echo "bubblewrap (bwrap) is not installed: install it with your system's package manager" >&2
    exit 1
fi
as_root=$([ "$(id -u)" = 0 ] || echo sudo)
$as_root apt-get update --quiet=2
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes bubblewrap >/dev/null
