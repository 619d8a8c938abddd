#!/usr/bin/python3
"""Records what a guest asks of its disk while it boots and while it compiles.

    bench/traces/record.py WORK_DIRECTORY [NAME]...

Needs root, and the packages debootstrap, qemu-system-x86, nbdkit, busybox-static, e2fsprogs,
dpkg-dev. Takes about half an hour, because the guest's processor is emulated. README.md says what
is recorded and in which format. What is in WORK_DIRECTORY already is not built again.
"""

import glob
import os
import re
import shutil
import struct
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "tests", "interop"))

RELEASE = "bookworm"
# A small server: what a cloud image has, and a compiler.
PACKAGES = """systemd-sysv udev dbus kmod gcc libc6-dev make iproute2 openssh-server cron rsyslog
logrotate python3-minimal perl less vim-tiny man-db locales ca-certificates unattended-upgrades
chrony""".split()
# What is compiled: some thirty files of C.
SOURCE = "lua5.4"
DISK_BYTES = 2 << 30
# Behind the file system is room for markers: a read of its first 4 KiB says that what is
# recorded begins, of its second that it is over.
MARKER_BYTES = 1 << 20
MARKERS = DISK_BYTES - MARKER_BYTES
RUNS = ["boot-1", "boot-2", "compile-1", "compile-2"]
MODULES = """virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci
virtio_blk""".split()
# Memory enough that nothing is read twice for want of it.
MEMORY = "1024"
TIMEOUT_S = 1800

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
until test -b /dev/vda; do sleep 0.05; done
dd if=/dev/vda of=/dev/null bs=4096 count=1 skip=@BEGIN@ iflag=direct 2>/dev/null
mount -t ext4 -o ro /dev/vda /mnt
for dir in proc sys dev; do mount --move /$dir /mnt/$dir; done
exec switch_root /mnt /sbin/init
"""

DONE = """#!/bin/sh
# Runs when the boot is over; says so on the console, and does what the command line asks for.
mark() { dd if=/dev/vda of=/dev/null bs=4096 count=1 skip=$1 iflag=direct 2>/dev/null; }
echo "RECORD booted at $(cut -d' ' -f1 /proc/uptime)" >/dev/ttyS0
if grep -q record=compile /proc/cmdline; then
    sleep 20
    mark @BEGIN@
    cd /root/source/src
    make -s -j2 -f /root/build.mk >/root/make.log 2>&1 || echo "make failed" >/dev/ttyS0
    sync
    mark @END@
    result=$(./lua -e 'print(6 * 7)')
    echo "RECORD compiled: $result at $(cut -d' ' -f1 /proc/uptime)" >/dev/ttyS0
else
    mark @END@
fi
sync
echo "RECORD end" >/dev/ttyS0
systemctl poweroff
"""

MAKEFILE = """objects = $(patsubst %.c,%.o,$(filter-out luac.c,$(wildcard *.c)))
lua: $(objects)
\tgcc -o $@ $(objects) -lm
%.o: %.c
\tgcc -O2 -std=gnu99 -c -o $@ $<
"""

UNIT = """[Unit]
Description=Recording
After=multi-user.target ssh.service cron.service rsyslog.service
[Service]
Type=idle
ExecStart=/usr/local/sbin/record-done
[Install]
WantedBy=graphical.target multi-user.target
"""


def run(*command, **options):
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, **options)


def with_markers(text):
    begin = MARKERS // 4096
    return text.replace("@BEGIN@", str(begin)).replace("@END@", str(begin + 1))


def write(path, text, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, mode)


def kernel(work):
    """The unpacked package of Debian's kernel for cloud machines, and its version."""
    place = os.path.join(work, "kernel")
    if not glob.glob(os.path.join(place, "boot", "vmlinuz-*")):
        said = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], check=True,
                              capture_output=True, text=True).stdout
        package = re.search(r"Depends: (linux-image-\S+)", said).group(1)
        os.makedirs(place, exist_ok=True)
        run("apt-get", "-o", "APT::Sandbox::User=root", "download", package, cwd=place)
        run("dpkg", "-x", glob.glob(os.path.join(place, "*.deb"))[0], place)
    found = glob.glob(os.path.join(place, "boot", "vmlinuz-*"))[0]
    return place, os.path.basename(found).removeprefix("vmlinuz-")


def initramfs(work, place, version):
    path = os.path.join(work, "initramfs.cpio")
    root = os.path.join(work, "initramfs")
    shutil.rmtree(root, ignore_errors=True)
    for part in ["bin", "modules"]:
        os.makedirs(os.path.join(root, part))
    shutil.copy(shutil.which("busybox"), os.path.join(root, "bin", "busybox"))
    write(os.path.join(root, "init"), with_markers(INIT), 0o755)
    for module in MODULES:
        found = glob.glob(os.path.join(place, "lib/modules", version, "**", module + ".ko"),
                          recursive=True)
        shutil.copy(found[0], os.path.join(root, "modules", module + ".ko"))
    write(os.path.join(root, "modules", "order"), "\n".join(MODULES))
    names = subprocess.run(["find", "."], cwd=root, check=True, capture_output=True).stdout
    with open(path, "wb") as file:
        subprocess.run(["busybox", "cpio", "-o", "-H", "newc"], cwd=root, check=True, input=names,
                       stdout=file, stderr=subprocess.DEVNULL)
    return path


def disk(work, place, version):
    """The disk: a Debian with the services of a small server, booted once to settle."""
    path = os.path.join(work, "disk.img")
    if os.path.exists(path):
        return path
    root = os.path.join(work, "root")
    if not os.path.exists(os.path.join(root, "etc/debian_version")):
        run("debootstrap", "--variant=minbase", "--include=" + ",".join(PACKAGES), RELEASE, root)
    import suites
    os.environ["HIKKOSHI_INTEROP_DIR"] = os.path.join(work, "sources")
    source = suites.source(SOURCE)
    shutil.rmtree(os.path.join(root, "root/source"), ignore_errors=True)
    shutil.copytree(source, os.path.join(root, "root/source"), symlinks=True)
    shutil.copytree(os.path.join(place, "lib/modules"), os.path.join(root, "usr/lib/modules"),
                    dirs_exist_ok=True)
    run("chroot", root, "depmod", version)
    write(os.path.join(root, "etc/fstab"), "/dev/vda / ext4 errors=remount-ro 0 1\n")
    write(os.path.join(root, "etc/hostname"), "guest\n")
    write(os.path.join(root, "usr/local/sbin/record-done"), with_markers(DONE), 0o755)
    write(os.path.join(root, "etc/systemd/system/record-done.service"), UNIT)
    write(os.path.join(root, "root/build.mk"), MAKEFILE)
    # Debian's own build makes this one.
    write(os.path.join(root, "root/source/src/lua5.4-deb-multiarch.h"),
          '#define DEB_HOST_MULTIARCH "x86_64-linux-gnu"\n')
    run("chroot", root, "systemctl", "enable", "record-done.service")
    partial = path + ".partial"
    with open(partial, "wb") as file:
        file.truncate(DISK_BYTES)
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard",
        "-d", root, partial, f"{MARKERS // 1024}k")
    boot(work, "settle", ["file", partial], place, version)
    os.rename(partial, path)
    return path


def boot(work, name, plugin, place, version):
    """Boots from an nbdkit with this plugin, which logs every request; returns the log."""
    file = lambda suffix: os.path.join(work, f"{name}.{suffix}")
    for suffix in ["log", "sock", "console"]:
        if os.path.exists(file(suffix)):
            os.remove(file(suffix))
    server = subprocess.Popen(
        ["nbdkit", "-f", "-U", file("sock"), "--filter=log", *plugin, f"logfile={file('log')}"],
        stdin=subprocess.DEVNULL)
    try:
        while not os.path.exists(file("sock")):
            time.sleep(0.05)
        append = "root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 panic=-1"
        if name.startswith("compile"):
            append += " record=compile"
        started = time.time()
        subprocess.run(
            ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot",
             "-machine", "pc,accel=tcg", "-cpu", "max", "-smp", "1", "-m", MEMORY,
             "-serial", f"file:{file('console')}",
             "-kernel", os.path.join(place, "boot", "vmlinuz-" + version),
             "-initrd", os.path.join(work, "initramfs.cpio"), "-append", append,
             "-drive", f"file=nbd+unix:///?socket={file('sock')},format=raw,if=virtio,cache=none,"
             "discard=unmap"],
            check=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S)
        with open(file("console"), errors="replace") as console:
            said = [line.strip() for line in console if "RECORD" in line]
        print(f"{name}: {time.time() - started:.0f} s; {said}")
        compiled = any("RECORD compiled: 42" in line for line in said)
        if not any("RECORD end" in line for line in said) or (
                name.startswith("compile") and not compiled):
            raise SystemExit(f"{name} did not end; see {file('console')}")
    finally:
        server.terminate()
        server.wait()
    return file("log")


KINDS = {"Read": 0, "Write": 1, "Flush": 2, "Trim": 3, "Zero": 4}
LINE = re.compile(r"^(\S+ \S+) connection=\d+ (\.\.\.)?(\w+) id=(\d+) (.*)$")


def requests(log):
    """The requests between the markers: [begin, end, kind, offset, length], times in microseconds."""
    open_requests, all_requests = {}, []
    marks = {MARKERS: None, MARKERS + 4096: None}
    with open(log) as lines:
        for line in lines:
            match = LINE.match(line.strip())
            if not match or match.group(3) not in KINDS:
                continue
            stamp, answer, name, number, rest = match.groups()
            clock, micros = stamp.split(".")
            now = int(time.mktime(time.strptime(clock, "%Y-%m-%d %H:%M:%S"))) * 1_000_000
            now += int(micros)
            if answer:
                open_requests.pop(number)[1] = now
                continue
            place = dict(word.split("=", 1) for word in rest.split() if "=" in word)
            offset = int(place.get("offset", "0"), 16)
            request = [now, None, KINDS[name], offset, int(place.get("count", "0"), 16)]
            open_requests[number] = request
            all_requests.append(request)
            # The last of its kind counts: what compiles has booted before. (Others read in the
            # markers' place too, looking for the signatures of file systems.)
            if offset in marks and request[4] == 4096 and request[2] == 0:
                marks[offset] = len(all_requests) - 1
    begin, end = marks.values()
    if begin is None or end is None or end <= begin:
        raise SystemExit(f"{log}: the markers are {begin} and {end}")
    inner = [r for r in all_requests[begin + 1:end] if r[1] is not None]
    return all_requests[begin][1], inner


def varint(number):
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def zigzag(number):
    return number << 1 if number >= 0 else (-number << 1) - 1


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def save(path, magic, count, body):
    data = magic + struct.pack("<QI", DISK_BYTES, count) + body
    with open(path, "wb") as file:
        file.write(data + struct.pack("<I", crc32c(data)))
    print(f"{path}: {len(data) + 4} bytes, {count} entries")


def encode(began, found):
    """Each request after the one whose answer came last before it began, and the time between."""
    body = bytearray()
    previous_end = 0
    answers = []
    for index, (begin, end, kind, offset, length) in enumerate(found):
        before = [a for a in answers if a[0] <= begin]
        # Those that answered earlier than the last one cannot be the last for anyone later.
        last = max(before, default=(began, -1))
        answers = [a for a in answers if a[0] > begin or a == last]
        back = 0 if last[1] < 0 else index - last[1]
        body += bytes([kind])
        body += varint(zigzag(offset // 512 - previous_end)) + varint(length // 512)
        body += varint(back) + varint(max(begin - last[0], 0))
        previous_end = (offset + length) // 512
        answers.append((end, index))
    return bytes(body)


def describe(name, began, found):
    kinds = {kind: [r for r in found if r[2] == kind] for kind in KINDS.values()}
    read = {s for r in kinds[0] for s in range(r[3] // 4096, -(-(r[3] + r[4]) // 4096))}
    print(f"{name}: {len(found)} requests in {(found[-1][1] - began) / 1e6:.1f} s: "
          + ", ".join(f"{len(kinds[number])} {kind.lower()} of "
                      f"{sum(r[4] for r in kinds[number]) / 1e6:.1f} MB"
                      for kind, number in KINDS.items())
          + f"; {len(read) * 4096 / 1e6:.1f} MB read at least once")


def disk_map(path):
    """Where the disk has data, with gaps of less than 64 KiB closed."""
    extents = []
    fd = os.open(path, os.O_RDONLY)
    at = 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        if extents and start - extents[-1][1] < 65536:
            extents[-1][1] = at
        else:
            extents.append([start, at])
    os.close(fd)
    body, previous = bytearray(), 0
    for start, end in extents:
        body += varint((start - previous) // 4096) + varint((end - start) // 4096)
        previous = end
    print(f"data on the disk: {sum(e - s for s, e in extents) / 1e6:.0f} MB")
    save(os.path.join(HERE, "disk.map"), b"HKKEXT01", len(extents), bytes(body))


def main():
    work = os.path.abspath(sys.argv[1])
    names = sys.argv[2:] or RUNS
    os.makedirs(work, exist_ok=True)
    place, version = kernel(work)
    initramfs(work, place, version)
    image = disk(work, place, version)
    disk_map(image)
    for name in names:
        # Each run begins with the same disk; what the guest writes is forgotten.
        log = boot(work, name, ["--filter=cow", "file", image], place, version)
        began, found = requests(log)
        describe(name, began, found)
        save(os.path.join(HERE, name + ".trace"), b"HKKTRC01", len(found), encode(began, found))


if __name__ == "__main__":
    main()
