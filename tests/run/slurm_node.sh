#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests: needs root and Debian's slurm-wlm and munge.
#   slurm_node.sh start FOLDER   writes FOLDER/slurm.conf, starts the daemons, waits until the node is idle
#   slurm_node.sh stop FOLDER
set -euo pipefail
what=$1 folder=$2
conf=$folder/slurm.conf

stop() {
    for pid in "$folder"/*.pid; do [ -s "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true; done
}

if [ "$what" = stop ]; then stop; exit; fi

mkdir -p "$folder/state" "$folder/spool" /run/munge
host=$(hostname -s)
cat > "$conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END

[ -s /etc/munge/munge.key ] || dd if=/dev/urandom bs=1 count=1024 of=/etc/munge/munge.key status=none
chown munge: /etc/munge/munge.key /run/munge
chmod 400 /etc/munge/munge.key
munge -n >/dev/null 2>&1 || runuser -u munge -- munged --pid-file "/run/munge/munged.pid"
slurmctld -f "$conf"
slurmd -f "$conf"
for _ in $(seq 60); do
    state=$(SLURM_CONF=$conf sinfo -h -o %T 2>/dev/null || true)
    [ "$state" = idle ] && exit
    sleep 0.5
done
echo "the node is ${state:-not there}, not idle; see $folder/*.log" >&2
stop
exit 1
