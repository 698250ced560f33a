# Two hosts on this machine, nodea and nodeb, with real SLURM, sshd and pdsh; sourced by check.sh. Needs root.
# Each has network, process, UTS, IPC and mount namespaces, and a /tmp, /run and /dev/shm of its own. $root and $lab are shared.
# Nothing outside the namespaces changes: the network between them ends with their first processes.
# shellcheck shell=bash disable=SC2154

packages=(slurm-wlm munge pdsh openssh-server iproute2)

# What is missing for them, a line; nothing if all is there.
missing() {
    local command
    [ "$(id -u)" = 0 ] || echo "root (this is $(id -un))"
    for command in slurmctld slurmd munged pdsh sshd ip nsenter; do
        PATH=$PATH:/usr/sbin command -v "$command" >/dev/null || echo "$command (apt-get install ${packages[*]})"
    done
    unshare --net --uts --ipc --pid --fork --mount-proc true 2>/dev/null || echo "namespaces (unshare fails)"
}

configure() {
    mkdir -p "$lab"/{conf,ssh,slurm,log,out,dev}
    chmod 755 "$lab"
    head -c 64 /dev/urandom >"$lab/conf/munge.key"
    chown munge "$lab/conf/munge.key"
    chmod 400 "$lab/conf/munge.key"
    ssh-keygen -q -t ed25519 -N '' -f "$lab/ssh/host"
    ssh-keygen -q -t ed25519 -N '' -f "$lab/ssh/user"
    cp "$lab/ssh/user.pub" "$lab/ssh/authorized_keys"
    printf '127.0.0.1 localhost\n10.77.0.1 nodea\n10.77.0.2 nodeb\n10.77.0.9 nowhere\n' >"$lab/conf/hosts"
    printf 'Host *\n IdentityFile %s\n UserKnownHostsFile /dev/null\n StrictHostKeyChecking no\n LogLevel ERROR\n' \
        "$lab/ssh/user" >"$lab/conf/ssh_config"
    cat >"$lab/conf/sshd_config" <<END
HostKey $lab/ssh/host
PermitRootLogin yes
AuthorizedKeysFile $lab/ssh/authorized_keys
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile /run/sshd.pid
END
    # In a network namespace slurmd needs cgroup/v1.
    echo "CgroupPlugin=cgroup/v1" >"$lab/conf/cgroup.conf"
    local gpu
    for gpu in 0 1 2 3 4 5 6 7; do [ -e "$lab/dev/gpu$gpu" ] || mknod "$lab/dev/gpu$gpu" c 1 3; done
    echo "NodeName=nodea,nodeb Name=gpu File=$lab/dev/gpu[0-7]" >"$lab/conf/gres.conf"
    cat >"$lab/conf/slurm.conf" <<END
ClusterName=lab
SlurmctldHost=nodea(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=$lab/slurm/state
SlurmdSpoolDir=$lab/slurm/spool.%h
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdLogFile=$lab/log/slurmd.%h.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
MinJobAge=3600
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=5,sched_min_interval=0
InactiveLimit=0
SlurmdTimeout=60
GresTypes=gpu
AccountingStorageType=accounting_storage/none
NodeName=nodea NodeAddr=10.77.0.1 CPUs=64 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
NodeName=nodeb NodeAddr=10.77.0.2 CPUs=64 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=nodea,nodeb Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=nodea,nodeb MaxTime=INFINITE State=UP PriorityTier=10
END
    mkdir -p "$lab/slurm/state"
}

# PID 1 of a host.
host() {
    local name=$1 folder number=0
    mount --make-rprivate /
    hostname "$name"
    mount -t tmpfs tmpfs /run
    mkdir -p /run/keep /run/sshd
    # /tmp is hidden; what is shared and lies there comes back.
    for folder in "${shared[@]}"; do
        mkdir "/run/keep/$number"
        mount --bind "$folder" "/run/keep/$number"
        number=$((number + 1))
    done
    mount -t tmpfs tmpfs /tmp
    chmod 1777 /tmp
    mount -t tmpfs tmpfs /dev/shm
    number=0
    for folder in "${shared[@]}"; do
        mkdir -p "$folder"
        mount --bind "/run/keep/$number" "$folder"
        number=$((number + 1))
    done
    mount --bind "$lab/conf/hosts" /etc/hosts
    mount --bind "$lab/conf/ssh_config" /etc/ssh/ssh_config
    ip link set lo up
    touch /run/up
    until ip -o -4 addr show dev eth0 2>/dev/null | grep -q 10.77; do sleep 0.1; done
    mkdir -p /run/munge
    chown munge /run/munge
    cp "$lab/conf/munge.key" /run/munge/key
    chown munge /run/munge/key
    setpriv --reuid munge --regid munge --clear-groups munged --key-file=/run/munge/key --log-file=/run/munge/log \
        --pid-file=/run/munge/pid --seed-file=/run/munge/seed --socket=/run/munge/munge.socket.2 --force
    /usr/sbin/sshd -f "$lab/conf/sshd_config" -E "$lab/log/sshd.$name.log"
    [ "$name" != nodea ] || slurmctld
    slurmd
    touch /run/ready
    while :; do
        sleep 3600 &
        wait
    done
}

# up: both hosts, linked; sets pid[nodea] and pid[nodeb], the first processes as seen from here.
declare -A pid outer
up() {
    local name
    export -f host
    shared=("$lab" "$root" "$(readlink -f "$root/.venv")")
    export lab root SLURM_CONF="$lab/conf/slurm.conf" PATH="$PATH:/usr/sbin"
    for name in nodea nodeb; do
        setsid nice -n 19 unshare --net --uts --ipc --mount --pid --fork --mount-proc --kill-child bash -c \
            "$(declare -p shared); host $name" >"$lab/log/$name.boot" 2>&1 </dev/null &
        outer[$name]=$!
        until pid[$name]=$(pgrep -P "${outer[$name]}") && nsenter -t "${pid[$name]}" -m test -e /run/up; do sleep 0.1; done
    done
    nsenter -t "${pid[nodea]}" -n ip link add eth0 type veth peer name eth0 netns "${pid[nodeb]}"
    nsenter -t "${pid[nodea]}" -n ip addr add 10.77.0.1/24 dev eth0
    nsenter -t "${pid[nodeb]}" -n ip addr add 10.77.0.2/24 dev eth0
    for name in nodea nodeb; do
        nsenter -t "${pid[$name]}" -n ip link set eth0 up
    done
    for name in nodea nodeb; do
        until nsenter -t "${pid[$name]}" -m test -e /run/ready; do sleep 0.1; done
    done
    until on nodea sinfo -h -t idle -o %D 2>/dev/null | grep -qx 2; do sleep 0.5; done
}

# on HOST COMMAND ...: runs a command on a host, in the project's folder.
on() {
    local name=$1
    shift
    nsenter -t "${pid[$name]}" -a env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 SLURM_CONF="$SLURM_CONF" OMP_NUM_THREADS=1 \
        bash -c 'cd "$1"; shift; exec nice -n 19 "$@"' - "$root" "$@"
}

down() {
    local name
    for name in "${!pid[@]}"; do kill -KILL "${pid[$name]}" 2>/dev/null || true; done
    wait 2>/dev/null || true
}
