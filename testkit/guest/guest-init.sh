#!/bin/busybox sh
# The first process of the guest's root file system: runs the workload until it has been told to
# finish, leaves a clean file system behind, and switches the machine off.

echo "WL root file system is up"
/sbin/workload /work /content.list / /dev/ttyS1
status=$?
sync
if [ "$status" = 0 ]; then
    # The root file system of a running system cannot be unmounted; read-only is as clean.
    mount -o remount,ro / && echo "WL unmounted" || echo "WL FAIL cannot remount read-only"
fi
echo "WL end"
poweroff -f
