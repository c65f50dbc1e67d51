#!/usr/bin/env bash
# A real Slurm on this one machine, for tests: a controller, two node daemons, and two partitions of which `high` preempts
# `low`. Needs Debian or what is like it, root, and for the first start the network: it installs slurm-wlm and munge.
#     tests/faults/slurm/setup.sh start [folder]     prints the line that makes this Slurm the shell's: export SLURM_CONF=...
#     tests/faults/slurm/setup.sh stop [folder]      ends all jobs and daemons
# The folder (default: /tmp/slurm-test) gets configuration, state and logs; nothing outside it is written but the packages.
set -euo pipefail

usage() {
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}
die() {
  echo "${0##*/}: $1" >&2
  exit 2
}

install_packages() {
  local tool missing=
  for tool in munged slurmctld slurmd srun; do
    command -v "$tool" >/dev/null || missing=$tool
  done
  [[ -n $missing ]] || return 0
  command -v apt-get >/dev/null || die "there is neither $missing nor apt-get here"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q >&2
  # the packages would start services of their own, which have no configuration
  local policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    # shellcheck disable=SC2064 # the path of now
    trap "rm -f $policy" EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
  fi
  apt-get install -q -y --no-install-recommends slurm-wlm munge >&2
}

# Tasks find their main process by its node's name. A name of their own for this machine is seen by the daemons and what they
# start, and by nobody else.
see_node_names() {
  { cat /etc/hosts && echo "127.0.0.1 ${nodes[*]}"; } >"$folder/hosts"
  # shellcheck disable=SC2016 # for the inner shell
  unshare --mount bash -c 'mount --bind "$0/hosts" /etc/hosts && exec "$@"' "$folder" "$@"
}

# Two cores are enough for all: CPUs are what Slurm is told, and bind nobody.
write_configuration() {
  local name port=16821 lines=
  for name in "${nodes[@]}"; do
    lines+="NodeName=$name NodeHostname=$name NodeAddr=127.0.0.1 Port=$((port++)) CPUs=8 RealMemory=1000 State=UNKNOWN"$'\n'
  done
  cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=${KILL_WAIT:-30}
MinJobAge=300
SlurmctldTimeout=60
SlurmdTimeout=60
InactiveLimit=0
CompleteWait=0
${lines}PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE_TIME:-0} State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
CONF
}

start() {
  [[ $(id -u) == 0 ]] || die "the daemons must be root's: they start jobs as their owners"
  [[ ! -e $folder/slurmctld.pid ]] || die "there is one in $folder already: $0 stop $folder"
  install_packages
  mkdir -p "$folder" && chmod 755 "$folder"
  mkdir -p "$folder"/{munge,state}
  chmod 755 "$folder/munge"
  write_configuration
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
  munged --force --socket "$folder/munge/socket" --key-file "$folder/munge/key" --pid-file "$folder/munge/pid" \
    --log-file "$folder/munge/log" --seed-file "$folder/munge/seed"
  export SLURM_CONF=$folder/slurm.conf
  slurmctld -c
  local name
  for name in "${nodes[@]}"; do
    mkdir -p "$folder/spool-$name"
    see_node_names slurmd -N "$name"
  done
  for _ in {1..60}; do
    [[ $(sinfo -h -p high -o %D -t idle 2>/dev/null) != "${#nodes[@]}" ]] || break
    sleep 0.5
  done
  [[ $(sinfo -h -p high -o %D -t idle) == "${#nodes[@]}" ]] || die "the nodes did not come up: see the logs in $folder"
  echo "export SLURM_CONF=$folder/slurm.conf"
}

# end <file with the process id> <name>
end() {
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  if [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$2"* ]]; then
    kill "$pid"
    for _ in {1..100}; do
      [[ -e /proc/$pid ]] || break
      sleep 0.1
    done
    [[ ! -e /proc/$pid ]] || kill -9 "$pid"
  fi
  rm -f "$1"
}

stop() {
  export SLURM_CONF=$folder/slurm.conf
  [[ -e $SLURM_CONF ]] || die "there is none in $folder"
  scancel --quiet --state=PENDING 2>/dev/null || true
  scancel --quiet --signal=KILL --full 2>/dev/null || true
  scancel --quiet 2>/dev/null || true
  for _ in {1..60}; do
    [[ -n $(squeue -h 2>/dev/null) ]] || break
    sleep 0.5
  done
  end "$folder/slurmctld.pid" slurmctld
  local file
  for file in "$folder"/slurmd-*.pid; do
    end "$file" slurmd
  done
  end "$folder/munge/pid" munged
}

(($# >= 1 && $# <= 2)) || usage
nodes=(slurm-test1 slurm-test2)
folder=${2:-/tmp/slurm-test}
[[ $folder == /* ]] || folder=$PWD/$folder
case $1 in
  start) start ;;
  stop) stop ;;
  *) usage ;;
esac
