#!/usr/bin/env bash
# Installs Slurm's daemons and commands, for a cluster of virtual nodes on this machine, if they are
# not there.
set -euo pipefail
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && exit 0
if ! command -v apt-get >/dev/null; then
    echo "Slurm (slurmctld, slurmd, munged) is not installed: install it with your system's package manager" >&2
    exit 1
fi
as_root=$([ "$(id -u)" = 0 ] || echo sudo)
$as_root apt-get update --quiet=2
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends \
    slurmctld slurmd slurm-client munge >/dev/null
