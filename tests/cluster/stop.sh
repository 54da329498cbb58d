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
daemons=$(cat "$1"/slurmd-*.pid "$1"/slurmctld.pid "$1"/munged.pid 2>/dev/null)
alive() { for pid in $daemons; do kill -0 "$pid" 2>/dev/null && echo "$pid"; done; }
kill $daemons 2>/dev/null
for _ in $(seq 100); do
    [ -z "$(alive)" ] && exit 0
    sleep 0.1
done
kill -KILL $(alive)
