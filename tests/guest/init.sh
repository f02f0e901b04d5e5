#!/bin/sh
# The guest's first process: the host's root directory, read-only over 9p, under a layer that takes what is written.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
    $b insmod "$module" || echo "guest: cannot load $module"
done
options=trans=virtio,version=9p2000.L,msize=262144
$b mount -t 9p -o $options,ro,cache=loose hostroot /lower || exec $b poweroff -f
$b mount -t tmpfs -o size=60% tmpfs /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /new || exec $b poweroff -f
$b mkdir -p /new/run /new/dev /new/proc /new/sys
$b mount -t tmpfs tmpfs /new/run
for place in proc sys dev; do
    $b mount -o move /$place /new/$place
done
$b mkdir /new/run/guest
$b mount -t 9p -o $options,cache=none guest /new/run/guest || exec $b poweroff -f
exec $b switch_root /new /bin/bash /run/guest/agent.sh
