#!/usr/bin/env bash
# Usage: tests/cluster/slurm.sh start|stop|env
# A real Slurm on this machine, from Debian's packages: a controller and the nodes n1 and n2, each a slurmd of its own.
# start installs what is missing; env prints what a client needs; stop ends all of it and removes the folder.
# Needs root. Exits with 3 and a reason where a cluster cannot be had.
#
#   CLM_DIST_SLURM=/tmp/clm-dist-slurm    its folder: configuration, logs, sockets, state
set -euo pipefail

DIR="${CLM_DIST_SLURM:-/tmp/clm-dist-slurm}"
NODES=(n1 n2)
KILL_WAIT=5                                                   # seconds from TERM to KILL
PORT=$((21000 + $(printf %s "$DIR" | cksum | cut -d' ' -f1) % 400 * 20))  # clusters in other folders have others
CGROUP="clm-dist-$PORT"
MARK="# clm-dist $DIR"
export PATH="$PATH:/usr/sbin:/sbin" SLURM_CONF="$DIR/slurm.conf"

say() { echo "slurm.sh: $*" >&2; }
refuse() { say "$*"; exit 3; }

install_packages() {
  local needed=() name packages=(munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client)
  for name in "${packages[@]}"; do command -v "${name%%:*}" > /dev/null || needed+=("${name#*:}"); done
  [[ ${#needed[@]} -gt 0 ]] || return 0
  command -v apt-get > /dev/null || refuse "there is no ${needed[*]}, and no apt-get to install it with"
  say "installing ${needed[*]}"
  local policy=/usr/sbin/policy-rc.d made="" ok=""  # which keeps the packages from starting daemons of their own
  if [[ ! -e $policy ]]; then printf '#!/bin/sh\nexit 101\n' > $policy; chmod 755 $policy; made=yes; fi
  export DEBIAN_FRONTEND=noninteractive
  if { apt-get update -q && apt-get install -y -q --no-install-recommends "${needed[@]}"; } > "$DIR/apt.log" 2>&1; then ok=yes; fi
  if [[ -n $made ]]; then rm -f $policy; fi
  [[ -n $ok ]] || { tail -n 5 "$DIR/apt.log" >&2; refuse "apt-get could not install ${needed[*]}"; }
}

# Production clusters track processes by cgroups, with which a signal reaches a task and nothing below it. Where the freezer
# of cgroup v1 can be had, this one does too: a part of it is bound to a folder of ours.
track_processes() {
  mkdir -p "$DIR/cgroup/freezer" "$DIR/mounted"
  local freezer=/sys/fs/cgroup/freezer
  if [[ ! -e $freezer/tasks ]]; then
    freezer="$DIR/mounted"
    mount -t cgroup -o freezer none "$freezer" 2> /dev/null || freezer=""
  fi
  if [[ -n $freezer ]] && mkdir -p "$freezer/$CGROUP" 2> /dev/null && mount --bind "$freezer/$CGROUP" "$DIR/cgroup/freezer" 2> /dev/null; then
    printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no "CgroupMountpoint=$DIR/cgroup" ConstrainCores=no > "$DIR/cgroup.conf"
    echo proctrack/cgroup
  else
    say "no freezer cgroup here: signals reach more processes than on a production cluster"
    echo proctrack/linuxproc
  fi
}

configure() {
  local host i=0 tracking node where
  host="$(hostname -s)"
  tracking="$(track_processes)"
  printf '127.0.0.1 localhost %s\n' "$host" > "$DIR/hosts"
  cat > "$SLURM_CONF" << END
ClusterName=clm-dist
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$DIR/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/%n.pid
SlurmdSpoolDir=$DIR/spool-%n
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/%n.log
ProctrackType=$tracking
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=$KILL_WAIT
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
GresTypes=gpu
END
  for node in "${NODES[@]}"; do
    i=$((i + 1))
    where=$host
    [[ -z $PRIVATE ]] || where=$node
    printf '127.0.0.%s %s %s\n' $((10 + i)) "$node" "$MARK" >> "$DIR/hosts"
    echo "NodeName=$node NodeHostname=$where NodeAddr=127.0.0.$((10 + i)) Port=$((PORT + i)) CPUs=64 RealMemory=500000 Gres=gpu:8" >> "$SLURM_CONF"
    mkdir -p "$DIR/spool-$node"
  done
  echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >> "$SLURM_CONF"
  for i in 0 1 2 3 4 5 6 7; do [[ -c "$DIR/gpu$i" ]] || mknod "$DIR/gpu$i" c 1 3; done  # clones of /dev/null are its GPUs
  echo "Name=gpu File=$DIR/gpu[0-7] Flags=nvidia_gpu_env" > "$DIR/gres.conf"
}

# A slurmd with the name of its node, and hosts of its own, where the kernel allows; else all are called as this machine is.
on_node() {
  local node=$1
  shift
  if [[ -z $PRIVATE ]]; then "$@"; return; fi
  # shellcheck disable=SC2016  # of the inner shell
  unshare --mount --uts -- sh -c 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"' "$node" "$DIR/hosts" "$@"
}

start() {
  [[ "$(id -u)" == 0 ]] || refuse "needs root, to run a cluster's daemons"
  mkdir -p "$DIR/state"
  chmod 755 "$DIR"
  install_packages
  if idle; then return; fi
  end_daemons
  PRIVATE=""
  if unshare --mount --uts -- sh -c 'hostname x && mount --bind /etc/hosts /etc/hosts' 2> /dev/null; then PRIVATE=yes; fi
  configure
  [[ -n $PRIVATE ]] || grep -F "$MARK" "$DIR/hosts" >> /etc/hosts
  (umask 077; head -c 128 /dev/urandom > "$DIR/munge.key")
  munged --socket="$DIR/munge.sock" --key-file="$DIR/munge.key" --pid-file="$DIR/munged.pid" --log-file="$DIR/munged.log" \
    --seed-file="$DIR/munge.seed" >> "$DIR/start.log" 2>&1
  on_node "$(hostname -s)" slurmctld -f "$SLURM_CONF" >> "$DIR/start.log" 2>&1
  for node in "${NODES[@]}"; do on_node "$node" slurmd -f "$SLURM_CONF" -N "$node" >> "$DIR/start.log" 2>&1; done
  for _ in $(seq 100); do
    if idle; then return; fi
    sleep 0.3
  done
  tail -n 20 "$DIR"/*.log >&2
  end_daemons
  refuse "the nodes did not come up; the lines above are of $DIR/*.log"
}

idle() {
  [[ -f "$SLURM_CONF" && -f "$DIR/slurmctld.pid" ]] || return 1
  [[ "$(timeout 5 sinfo --noheader --Node --format %T 2> /dev/null | grep -cE '^(idle|mixed|allocated|completing)$')" == "${#NODES[@]}" ]]
}

end_daemons() {
  local name pid end=$((SECONDS + KILL_WAIT + 10))
  if [[ -f "$DIR/slurmctld.pid" ]]; then
    timeout 10 squeue --noheader --format %A 2> /dev/null | xargs --no-run-if-empty timeout 10 scancel 2> /dev/null || true
    while ((SECONDS < end)) && [[ -n "$(timeout 3 squeue --noheader 2> /dev/null)" ]]; do sleep 0.2; done
  fi
  for name in slurmctld "${NODES[@]}" munged; do
    pid="$(cat "$DIR/$name.pid" 2> /dev/null)" || continue
    if grep -qF "$DIR" "/proc/$pid/cmdline" 2> /dev/null; then
      kill "$pid" 2> /dev/null || true
      for _ in $(seq 50); do [[ -d "/proc/$pid" ]] || break; sleep 0.1; done
    fi
    rm -f "$DIR/$name.pid"
  done
  if grep -qF "$MARK" /etc/hosts; then grep -vF "$MARK" /etc/hosts > "$DIR/hosts.before" || true; cat "$DIR/hosts.before" > /etc/hosts; fi
  for name in "/sys/fs/cgroup/freezer/$CGROUP" "$DIR/mounted/$CGROUP"; do
    if [[ -d $name ]]; then find "$name" -depth -type d -exec rmdir {} + 2> /dev/null || true; fi
  done
  umount "$DIR/cgroup/freezer" 2> /dev/null || true
  umount "$DIR/mounted" 2> /dev/null || true
}

case "${1:-}" in
  start) start ;;
  stop) end_daemons; rm -rf "$DIR" ;;
  env) echo "SLURM_CONF=$SLURM_CONF" ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
