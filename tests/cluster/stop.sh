#!/usr/bin/env bash
# stop.sh DIR: end the cluster that start.sh DIR started, its jobs first. Nothing of it survives.
set -uo pipefail
export SLURM_CONF=$1/slurm.conf
scancel --full --signal KILL --user "$(id -un)" 2>/dev/null
scancel --user "$(id -un)" 2>/dev/null
for _ in $(seq 100); do
    [ -z "$(squeue --noheader 2>/dev/null)" ] && break
    sleep 0.1
done
for file in "$1"/slurmd-*.pid "$1"/slurmctld.pid "$1"/munged.pid; do
    pid=$(cat "$file" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null
done
exit 0
