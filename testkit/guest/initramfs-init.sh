#!/bin/busybox sh
# The initramfs: loads what a virtual machine needs, then does what the kernel's command line says:
#   hikkoshi.mode=disk               root file system on /dev/vda, and switch into it
#   hikkoshi.mode=nbd hikkoshi.host=ADDRESS hikkoshi.port=PORT
#                                    stay here, and use a disk with the kernel's NBD client

/bin/busybox mkdir -p /proc /sys /dev /mnt /run
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

die() {
    echo "WL FAIL initramfs: $*"
    poweroff -f
}

option() {
    tr ' ' '\n' </proc/cmdline | sed -n "s/^hikkoshi\.$1=//p"
}

for module in $(cat /modules/order); do
    insmod "/modules/$module.ko" || die "cannot load $module"
done

wait_for() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || die "gave up: $*"
        sleep 0.05
    done
}

case "$(option mode)" in
disk)
    wait_for test -b /dev/vda
    mount -t ext4 /dev/vda /mnt || die "cannot mount the root file system"
    for dir in proc sys dev; do mount --move "/$dir" "/mnt/$dir"; done
    exec switch_root /mnt /sbin/guest-init
    ;;
nbd)
    wait_for test -e /sys/class/net/eth0
    ip link set lo up
    ip link set eth0 up
    ip address add 10.0.2.15/24 dev eth0
    nbd-client "$(option host)" "$(option port)" /dev/nbd0 -b 512 || die "nbd-client failed"
    echo "WL connected, $(cat /sys/block/nbd0/size) sectors"
    mount -t ext4 /dev/nbd0 /mnt || die "cannot mount /dev/nbd0"
    echo "WL mounted"
    /mnt/sbin/workload /mnt/work /mnt/content.list /mnt /dev/ttyS1 || die "the workload failed"
    sync
    umount /mnt || die "cannot unmount"
    echo "WL unmounted"
    nbd-client -d /dev/nbd0 || die "cannot disconnect"
    echo "WL end"
    poweroff -f
    ;;
*)
    die "no such mode"
    ;;
esac
