"""The test suites of libnbd and of nbd, as far as they apply.

Of libnbd's `make -C interop check`, two tests are run against us by putting us in qemu-nbd's
place; the others want TLS, qcow2, dirty bitmaps, inetd, nbdkit's or nbd-server's own options.
Of nbd's `make -C tests/run check`, those apply that are not about nbd-server's configuration, but
for integrityhuge: it sends up to 48 MiB in one request, and 32 MiB is what a client may count on.
"""

import os
import struct
import unittest

import suites
from harness import MIB, SETUPS, ServerCase, each_setup, only_ours, run

HERE = os.path.dirname(os.path.abspath(__file__))


class CountingDisk:
    """The content that libnbd's tests expect: each 8 bytes are their own offset (big endian)."""

    SIZE = 64 * MIB

    @classmethod
    def write(cls, path):
        content = struct.pack(f">{cls.SIZE // 8}Q", *range(0, cls.SIZE, 8))
        with open(path, "wb") as file:
            file.write(content)
        return content


class SmallCountingDisk(CountingDisk):
    SIZE = 8 * MIB


class EmptyDisk:
    """Nothing but a hole."""

    SIZE = 64 * MIB

    @classmethod
    def write(cls, path):
        with open(path, "wb") as file:
            file.truncate(cls.SIZE)
        return bytes(cls.SIZE)


class NbdTestDisk(EmptyDisk):
    SIZE = 50 * MIB


class LibnbdCase(ServerCase):
    """A program from libnbd's sources, run against a Unix socket."""

    def program(self, path, *arguments):
        top = suites.libnbd(os.path.join(HERE, "qemu-nbd-wrapper"))
        run(os.path.join(top, path), *(arguments or [self.server.address]))


UNIX_SETUPS = [setup for setup in SETUPS if setup.transport == "unix"]


def each_unix_setup(template):
    """each_setup, for programs that know only Unix sockets."""
    each_setup(template)
    for setup in SETUPS:
        if setup not in UNIX_SETUPS:
            del globals()[f"{template.__name__}_{setup.name}"]


@each_unix_setup
class LibnbdParallel(LibnbdCase):
    disk = CountingDisk

    def test_aio_parallel(self):
        self.program("tests/aio-parallel")


@each_unix_setup
class LibnbdSynchronous(LibnbdCase):
    disk = SmallCountingDisk

    def test_synch_parallel(self):
        self.program("tests/synch-parallel")


@each_unix_setup
class LibnbdLoad(LibnbdCase):
    disk = EmptyDisk

    def test_aio_parallel_load(self):
        self.program("tests/aio-parallel-load")

    def test_threaded_reads_and_writes(self):
        self.program("examples/threaded-reads-and-writes")

    def test_batched_read_write(self):
        self.program("examples/batched-read-write")


@each_unix_setup
class LibnbdStructured(LibnbdCase):
    def test_strict_structured_reads(self):
        self.program("examples/strict-structured-reads")


@only_ours
class LibnbdInterop(unittest.TestCase):
    """Tests of libnbd that start qemu-nbd themselves, and get us."""

    def interop(self, name):
        top = suites.libnbd(os.path.join(HERE, "qemu-nbd-wrapper"))
        run(os.path.join(top, "interop", name), cwd=os.path.join(top, "interop"), timeout=60)

    def test_interop_qemu_nbd(self):
        self.interop("interop-qemu-nbd")

    def test_socket_activation_qemu_nbd(self):
        self.interop("socket-activation-qemu-nbd")


class NbdTesterCase(ServerCase):
    """nbd-tester-client: it asks by EXPORT_NAME and speaks simple replies."""

    disk = NbdTestDisk
    # The tester needs a name.
    export = "disk"

    def nbd_tester(self, *options):
        program, _ = suites.nbd_tester_client()
        where = ["-u", self.server.address]
        if isinstance(self.server.address, int):
            where = ["127.0.0.1", self.server.address]
        run(program, "-N", self.export, *options, *where)

    def trace(self, name):
        return os.path.join(suites.nbd_tester_client()[1], name)


@each_setup
class NbdTester(NbdTesterCase):
    def test_reads(self):
        self.nbd_tester()

    def test_writes(self):
        self.nbd_tester("-w")

    def test_writes_and_flushes(self):
        self.nbd_tester("-w", "-f")

    def test_handshake(self):
        self.nbd_tester("-h")

    def test_oversized_requests(self):
        self.nbd_tester("-o")

    def test_integrity(self):
        self.nbd_tester("-i", "-t", self.trace("integrity-test.tr"))


@each_setup
class NbdTesterReadOnly(NbdTesterCase):
    read_only = True

    def test_reads(self):
        self.nbd_tester()

    def test_writes_are_refused(self):
        # -F: the test must end in an error.
        self.nbd_tester("-w", "-F")
