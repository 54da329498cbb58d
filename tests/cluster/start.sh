#!/usr/bin/env bash
# start.sh DIR: a Slurm cluster of two nodes on this machine, of Debian's packages. Everything it writes is in DIR, and
# clients find it by SLURM_CONF=DIR/slurm.conf; stop.sh DIR ends it. Exit code 77: it cannot be had here, and why.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
unavailable() { echo "$1" >&2; exit 77; }

[ "$(id -u)" = 0 ] || unavailable "only root can install and start a Slurm cluster"
missing=$(for program in slurmctld slurmd munged sinfo; do command -v $program >/dev/null || echo $program; done)
if [ "$missing" ]; then
    command -v apt-get >/dev/null || unavailable "Slurm is not installed, and this is no Debian"
    "$(dirname "$0")/../apt.sh" slurmctld slurmd slurm-client munge >"$dir/apt.log" 2>&1 ||
        unavailable "apt-get could not install Slurm: $(tail -n 1 "$dir/apt.log")"
fi

# cred_expire: how long a requeued job waits. KillWait: how long a job may ignore SIGTERM. Twice the CPUs that a queue of
# two fills, so that its bound is what holds it back; config_overrides: whether or not this machine has them.
host=$(hostname -s)
mkdir -p "$dir"/{state,n1,n2}
cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=20
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=4000
PartitionName=debug Nodes=ALL Default=YES MaxTime=2:00:00 State=UP
PartitionName=long Nodes=n1 MaxTime=INFINITE State=UP
END
# Nothing here uses control groups, and a container may have none: "disabled" came with 23.11, before it v1 does nothing.
version=$(slurmd -V | cut -d " " -f 2)
[ "$(printf "%s\n" 23.11 "$version" | sort -V | head -n 1)" = 23.11 ] && plugin=disabled || plugin=cgroup/v1
echo "CgroupPlugin=$plugin" >"$dir/cgroup.conf"

export SLURM_CONF=$dir/slurm.conf
[ -f "$dir/munge.key" ] || mungekey --create --keyfile "$dir/munge.key"
munged --force --key-file "$dir/munge.key" --socket "$dir/munge.socket" --pid-file "$dir/munged.pid" \
    --log-file "$dir/munged.log" --seed-file "$dir/munge.seed"
slurmctld
for node in n1 n2; do slurmd -N $node; done
for _ in $(seq 100); do
    [ "$(sinfo --noheader --partition debug --states idle --format %D 2>/dev/null)" = 2 ] && exit 0
    sleep 0.2
done
sinfo >&2 || true
grep -h error "$dir"/*.log >&2
exit 1
