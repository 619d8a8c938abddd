#!/bin/busybox sh
# The first process of the guest's root file system: runs the workload until it has been told to
# finish, leaves a clean file system behind, and switches the machine off.

echo "WL root file system is up"

# A second disk is written in place, each run flushed. Nobody here checks it: QEMU's log tells what
# it must hold.
scribble() {
    at=0
    while :; do
        busybox dd if=/dev/urandom of=/dev/vdb bs=4096 count=5 seek=$((at % 4000)) conv=notrunc,fsync 2>/dev/null ||
            echo "WL FAIL cannot write to the second disk"
        at=$((at + 37))
        sleep 0.1
    done
}
if [ -b /dev/vdb ]; then
    scribble &
    scribbler=$!
fi

/sbin/workload /work /content.list / /dev/ttyS1
status=$?
[ -z "$scribbler" ] || kill "$scribbler"
sync
if [ "$status" = 0 ]; then
    # The root file system of a running system cannot be unmounted; read-only is as clean.
    mount -o remount,ro / && echo "WL unmounted" || echo "WL FAIL cannot remount read-only"
fi
echo "WL end"
poweroff -f
