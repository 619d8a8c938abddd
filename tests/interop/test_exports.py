"""Many exports from one daemon, sources of other kinds, and what a destination does without one."""

import json
import os
import random
import shutil
import tempfile
import time
import unittest

import nbd

from harness import (MIB, PATIENCE_S, Disk, Hikkoshi, Process, Source, binary, free_port,
                     only_ours, run)


class DaemonCase(unittest.TestCase):
    """A directory, and daemons that end with the test."""

    def setUp(self):
        self.directory = tempfile.mkdtemp(prefix="hikkoshi-interop-")
        self.addCleanup(shutil.rmtree, self.directory)

    def path(self, name):
        return os.path.join(self.directory, name)

    def end(self, process):
        alive, status = process.alive(), process.stop()
        self.assertTrue(alive and status == 0, f"ended with {status}:\n{process.log()}")

    def source(self, kind):
        content = Disk.write(self.path("source.img"))
        source = Source(kind, self.path("source.img"), self.directory)
        self.addCleanup(source.stop)
        return source, content


@only_ours
class ManyExports(DaemonCase):
    COUNT = 40

    def setUp(self):
        super().setUp()
        self.socket, self.port = self.path("nbd.sock"), free_port()
        lines = [f'listen = ["unix:{self.socket}", "tcp://127.0.0.1:{self.port}"]',
                 f'control = "unix:{self.path("control")}"']
        for index in range(self.COUNT):
            image = self.path(f"disk{index}.img")
            with open(image, "wb") as file:
                file.write(bytes([index + 1]) * MIB)
            lines += ["[[export]]", f'name = "disk {index} é/%"', f'image = "{image}"']
            if index % 2:
                lines += ["read-only = true"]
        with open(self.path("daemon.toml"), "w") as file:
            file.write("\n".join(lines) + "\n")
        self.daemon = Process("daemon", [binary(), "serve", "--config", self.path("daemon.toml")],
                              self.directory)
        self.daemon.wait_for_listener(self.socket)
        self.addCleanup(self.end, self.daemon)

    def names(self):
        return [f"disk {index} é/%" for index in range(self.COUNT)]

    def test_all_are_listed(self):
        for uri in [f"nbd+unix:///?socket={self.socket}", f"nbd://127.0.0.1:{self.port}"]:
            listed = json.loads(run("nbdinfo", "--list", "--json", uri))["exports"]
            self.assertEqual([export["export-name"] for export in listed], self.names())
        text = run("qemu-nbd", "--list", "-k", self.socket)
        self.assertIn(f"exports available: {self.COUNT}", text)
        text = run("nbd-client", "-l", "127.0.0.1", self.port)
        self.assertIn("disk 0 é/%", text)

    def test_each_has_its_own_bytes_and_rights(self):
        for index, name in enumerate(self.names()):
            handle = nbd.NBD()
            handle.set_export_name(name)
            handle.connect_unix(self.socket)
            self.assertEqual(handle.pread(4096, 0), bytes([index + 1]) * 4096)
            self.assertEqual(handle.is_read_only(), bool(index % 2))

    def test_nobody_elses_name_is_served(self):
        for name in ["disk", "disk 0", "DISK 0 É/%", "disk 40 é/%"]:
            handle = nbd.NBD()
            handle.set_export_name(name)
            with self.assertRaises(nbd.Error):
                handle.connect_unix(self.socket)


@only_ours
class ReadAhead(DaemonCase):
    """What is read in a row is fetched before it is asked for."""

    PIECE = 64 * 1024

    def start(self):
        source, self.content = self.source("nbdkit")
        server = Hikkoshi(self.path("disk.img"), self.directory, source=source)
        self.addCleanup(self.end, server.process)
        self.client = nbd.NBD()
        self.client.connect_uri(server.uri)
        self.addCleanup(self.client.shutdown)
        return server

    def read(self, number):
        at = number * self.PIECE
        data = self.client.pread(self.PIECE, at)
        self.assertTrue(data == self.content[at:at + self.PIECE], f"wrong bytes at {at}")

    def wait_resident(self, server, pieces):
        deadline = time.monotonic() + PATIENCE_S
        while server.status()["resident_bytes"] < pieces * self.PIECE:
            self.assertLess(time.monotonic(), deadline, "nothing is fetched ahead")
            time.sleep(0.02)

    def test_a_stream_that_misses_nothing_is_noticed(self):
        server = self.start()
        for number in range(3):
            self.read(number)
        # From here on every piece is there before it is read, so the relocation hears of the
        # stream from the connection alone.
        for number in range(3, 64):
            self.wait_resident(server, number + 1)
            self.read(number)
        counters = server.status()["counters"]
        self.assertLessEqual(counters["reads_remote"], 3, counters)
        self.assertGreaterEqual(counters["reads_local"], 61, counters)

    def test_scattered_reads_fetch_nothing_ahead(self):
        server = self.start()
        numbers = random.Random(1).sample(range(700), 40)
        for number in numbers:
            self.read(number)
        self.assertEqual(server.status()["resident_bytes"], len(numbers) * self.PIECE)


@only_ours
class OtherSources(DaemonCase):
    def move(self, kind):
        """A whole move from a server of this kind, the source killed at the end."""
        source, content = self.source(kind)
        listen, control = self.path("nbd.sock"), f"unix:{self.path('control')}"
        daemon = Process("daemon", [binary(), "serve", self.path("disk.img"), "--listen",
                                    f"unix:{listen}", "--control", control, "--from", source.uri,
                                    "--handoff", "now"], self.directory)
        self.addCleanup(self.end, daemon)
        daemon.wait_for_listener(listen)
        uri = f"nbd+unix:///?socket={listen}"
        # Written while blocks arrive: it must win over what arrives.
        run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 64k", "-c", "flush", uri)
        content[MIB:MIB + 65536] = b"\x5a" * 65536
        run(binary(), "wait", "--control", control, "--timeout", f"{PATIENCE_S}s")
        status = json.loads(run(binary(), "status", "--json", "--control", control))
        status = status[0] if isinstance(status, list) else status
        self.assertEqual((status["state"], status["absent_bytes"]), ("local", 0))
        source.stop()
        run("nbdcopy", uri, self.path("copy.img"))
        for name in ["copy.img", "disk.img"]:
            with open(self.path(name), "rb") as file:
                self.assertTrue(file.read() == content, name)

    def test_from_nbdkit(self):
        self.move("nbdkit")

    def test_from_qemu_nbd(self):
        self.move("qemu-nbd")

    def test_from_nbd_server(self):
        self.move("nbd-server")
