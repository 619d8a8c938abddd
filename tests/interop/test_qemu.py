"""QEMU's tools: qemu-img and qemu-io."""

import json
import os

from harness import KIB, MIB, ServerCase, each_setup, run


@each_setup
class QemuImg(ServerCase):
    def test_info(self):
        info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", self.uri))
        self.assertEqual(info["virtual-size"], len(self.content))

    def test_map_hides_no_data(self):
        position = 0
        for extent in json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", self.uri)):
            start, length = extent["start"], extent["length"]
            self.assertEqual(start, position)
            position += length
            if extent["zero"]:
                self.assertFalse(any(self.content[start:start + length]),
                                 f"data at {start} is called zero")
        self.assertEqual(position, len(self.content))

    def convert(self, *options):
        run("qemu-img", "convert", *options, "-f", "raw", "-O", "raw", self.uri,
            self.path("copy.img"))
        self.assert_file(self.path("copy.img"), self.content)

    def test_convert_from(self):
        self.convert()

    def test_convert_from_with_many_requests(self):
        self.convert("-m", 16, "-W")

    def test_convert_from_without_sparseness(self):
        self.convert("-S", 0)

    def test_compare(self):
        expected = self.path("expected.img")
        with open(expected, "wb") as file:
            file.write(self.content)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", self.uri, expected)
        with open(expected, "r+b") as file:
            file.seek(20 * MIB + 5)
            file.write(bytes([self.content[20 * MIB + 5] ^ 1]))
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", self.uri, expected, status=1)

    def push(self, *options):
        new = bytearray(len(self.content))
        for offset, length in [(1 * MIB, 5 * MIB), (40 * MIB + 2560, MIB + 512)]:
            new[offset:offset + length] = os.urandom(length)
        path = self.path("new.img")
        with open(path, "wb") as file:
            file.write(new)
        run("qemu-img", "convert", "-n", *options, "-f", "raw", "-O", "raw", path, self.uri)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", self.uri, path)
        run("nbdcopy", self.uri, self.path("back.img"))
        self.assert_file(self.path("back.img"), new)

    def test_convert_to(self):
        self.push()

    def test_convert_to_with_many_requests(self):
        self.push("-m", 16, "-W")

    def test_convert_to_without_the_cache(self):
        self.push("-t", "none")

    def test_bench_of_writes_with_flushes(self):
        run("qemu-img", "bench", "-f", "raw", "-w", "-c", 2000, "-d", 32, "-s", 4096,
            "--flush-interval", 64, "--pattern", 0x5A, self.uri)
        run("qemu-io", "-f", "raw", "-c", f"read -P 0x5a 0 {2000 * 4096}", self.uri)


@each_setup
class QemuIo(ServerCase):
    def script(self, *lines):
        commands = [word for line in lines for word in ("-c", line)]
        text = run("qemu-io", "-f", "raw", *commands, self.uri)
        # qemu-io ends with status 0 although a pattern did not match.
        for complaint in ["Pattern verification failed", "failed:"]:
            self.assertNotIn(complaint, text)
        return text

    def test_writes_read_back(self):
        self.script("write -P 0x11 0 64k", "write -P 0x22 4k 4k", "write -P 0x33 12345 777",
                    "read -P 0x11 0 4k", "read -P 0x22 4k 4k", "read -P 0x33 12345 777",
                    "read -P 0x11 13122 1k", "flush")

    def test_writes_inside_a_sector_keep_its_rest(self):
        self.script("write -P 0x44 100 10", f"write -P 0x55 {20 * MIB + 4095} 2", "flush")
        run("nbdcopy", self.uri, self.path("back.img"))
        expected = bytearray(self.content)
        expected[100:110] = b"\x44" * 10
        expected[20 * MIB + 4095:20 * MIB + 4097] = b"\x55" * 2
        self.assert_file(self.path("back.img"), expected)

    def test_zeroes_and_discards(self):
        self.script("write -P 0x66 2M 1M", "write -z 2M 64k", "write -z -u 2200k 64k",
                    "discard 2400k 128k",
                    "read -P 0 2M 64k", "read -P 0 2200k 64k", "read -P 0x66 2112k 88k",
                    "read -P 0x66 2900k 100k", "flush")

    def test_force_unit_access(self):
        self.script("write -f -P 0x77 1M 256k", "write -f -z 1M 4k", "read -P 0 1M 4k",
                    "read -P 0x77 1028k 252k")

    def test_many_in_flight(self):
        lines = [f"aio_write -P {1 + index % 250} {index * 16}k 16k" for index in range(200)]
        checks = [f"read -P {1 + index % 250} {index * 16}k 16k" for index in range(200)]
        self.script(*lines, "aio_flush", *checks)

    def test_reads_across_data_and_holes(self):
        # Every boundary of the disk's content, read on its own and compared here.
        self.script("read 8M 2M", f"read {9 * MIB - 3} 6", f"read {len(self.content) - 512} 512",
                    f"read -P 0 {9 * MIB} {11 * MIB}")

    def test_past_the_end(self):
        size = len(self.content)
        for command in [f"read {size - 512} 1k", f"write {size - 512} 1k", f"read {size} 512"]:
            run("qemu-io", "-f", "raw", "-c", command, self.uri, status=1)


@each_setup
class QemuIoReadOnly(ServerCase):
    read_only = True

    def test_a_write_is_refused(self):
        run("qemu-io", "-f", "raw", "-c", "write 0 4k", self.uri, status=1)
        run("qemu-io", "-r", "-f", "raw", "-c", f"read 0 {64 * KIB}", self.uri)
