#!/usr/bin/env bash
# Installs Chromium, in which the tests look at the report page, if it is not there.
set -euo pipefail
command -v chromium >/dev/null && exit 0
if ! command -v apt-get >/dev/null; then
    echo "Chromium is not installed: install it with your system's package manager" >&2
    exit 1
fi
as_root=$([ "$(id -u)" = 0 ] || echo sudo)
$as_root apt-get update --quiet=2
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends \
    chromium fonts-dejavu-core >/dev/null
