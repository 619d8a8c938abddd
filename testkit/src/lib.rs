//! Oracle disks, link emulation and the QEMU harness for tests and benches.
