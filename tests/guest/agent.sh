#!/bin/bash
# Runs the jobs the host sends, as the first process of the guest. A job is a directory /run/guest/jobs/N with a file
# called script; its output goes beside it, its status back through the port. Jobs run side by side.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C.UTF-8
export DM_DISABLE_UDEV=1 THINPOOL_GUEST=1
guest=/run/guest
# shellcheck disable=SC1091
. $guest/settings

mkdir -p /dev/pts /dev/shm /dev/disks /dev/mapper
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sf /proc/self/fd /dev/fd
ln -sf fd/0 /dev/stdin
ln -sf fd/1 /dev/stdout
ln -sf fd/2 /dev/stderr
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mkdir -p "/lib/modules/$release"
mount --bind "$modules" "/lib/modules/$release"
modprobe dm-mod
[ -c /dev/mapper/control ] || mknod /dev/mapper/control c 10 236
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
hostname guest
cd /

for port in /sys/class/virtio-ports/vport*; do
    [ "$(cat "$port/name")" = jobs ] && exec 3<>"/dev/${port##*/}"
done

run_job() {
    local place=$guest/jobs/$1
    setsid bash -euo pipefail "$place/script" </dev/null >"$place/out" 2>"$place/err" 3>&- &
    echo $! >"$place/pid"
    wait $!
    echo "$1 $?" >&3
}

echo "ready $$" >&3
while read -r word number <&3; do
    case $word in
    run) run_job "$number" & ;;
    kill) kill -KILL -- "-$(cat "$guest/jobs/$number/pid")" ;;
    halt) break ;;
    esac
done
sync
busybox poweroff -f
