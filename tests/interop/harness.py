"""Starts the server under test, with or without a source, for tests of other people's clients.

A test class that inherits ServerCase and is marked with @each_setup runs once in every setup of
SETUPS: as a plain volume and as a destination of which nothing is here yet, over TCP and over
Unix sockets. What differs between servers is in the classes at the end; two of them are peers, so
that a test can be calibrated (`run.py --server nbdkit`): what a peer fails is not our invention.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB

# Generous: a loaded machine must not fail a test. Nothing waits this long when all is well.
PATIENCE_S = 60


class Disk:
    """The content of a disk: data with holes in between, the same in every run."""

    SIZE = 48 * MIB
    # Data at the very start and the very end, a hole in the middle, and small pieces whose
    # edges are aligned to no block size.
    DATA = [(0, 9 * MIB), (20 * MIB, 3 * MIB + 512), (32 * MIB + 7 * 512, 64 * KIB + 512),
            (47 * MIB, 1 * MIB)]

    @classmethod
    def write(cls, path):
        """Creates the disk at path, sparse, and gives its bytes."""
        content = bytearray(cls.SIZE)
        generator = random.Random(0x68696B6B)
        with open(path, "wb") as file:
            file.truncate(cls.SIZE)
            for offset, length in cls.DATA:
                data = generator.randbytes(length)
                content[offset:offset + length] = data
                file.seek(offset)
                file.write(data)
        return content


@dataclass(frozen=True)
class Setup:
    """How the server under test is set up."""

    name: str
    transport: str
    source: str | None

    @property
    def arriving(self):
        """Whether the disk is still elsewhere."""
        return self.source is not None


SETUPS = [
    Setup("plain_unix", "unix", None),
    Setup("plain_tcp", "tcp", None),
    Setup("arriving_from_nbdkit_unix", "unix", "nbdkit"),
    Setup("arriving_from_qemu_tcp", "tcp", "qemu-nbd"),
]


def each_setup(template):
    """Makes a class of tests run in every setup; the marked class itself runs in none."""
    module = sys.modules[template.__module__]
    for setup in SETUPS:
        name = f"{template.__name__}_{setup.name}"
        made = type(name, (template,), {"setup": setup, "__module__": template.__module__})
        setattr(module, name, made)
    return None


def free_port():
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A server process of ours: its log is kept, its end is waited for."""

    def __init__(self, name, command, directory, pass_fds=(), env=None):
        self.name = name
        self.command = [str(word) for word in command]
        self.log_path = os.path.join(directory, f"{name}.log")
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=pass_fds, env=env)

    @property
    def pid(self):
        return self.process.pid

    def alive(self):
        return self.process.poll() is None

    def log(self):
        with open(self.log_path, errors="replace") as log:
            return log.read()

    def wait_for_listener(self, address):
        """Waits until address (a port or a path) takes connections."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            if not self.alive():
                raise AssertionError(f"{' '.join(self.command)}\nended with "
                                     f"{self.process.returncode}:\n{self.log()}")
            try:
                connect(address).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{self.name} does not listen:\n{self.log()}")
                time.sleep(0.01)

    def stop(self):
        """Asks the process to end, and gives its exit status; None when it had to be killed."""
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def rss_bytes(self):
        """The memory that the process occupies now."""
        with open(f"/proc/{self.pid}/status") as status:
            found = re.search(r"^VmRSS:\s+(\d+) kB", status.read(), re.MULTILINE)
        return int(found.group(1)) * KIB


def connect(address, timeout=PATIENCE_S):
    """A connected socket to a TCP port on loopback or to a Unix socket."""
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    sock = socket.socket(family)
    try:
        # Blocking while it connects: a Unix socket that does not block is refused at once when
        # the server has many to accept.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", timeout, 0))
        sock.connect(("127.0.0.1", address) if isinstance(address, int) else address)
        sock.settimeout(timeout)
    except OSError:
        sock.close()
        raise
    return sock


def connect_patiently(address):
    """Waits until a server that is not our child takes connections."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return connect(address).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def run(*command, status=0, env=None, cwd=None, timeout=300, input=None):
    """Runs a client to its end and gives its standard output; any other status is a failure."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd,
                          timeout=timeout, input=input or "")
    if done.returncode != status:
        raise AssertionError(f"{' '.join(command)}\nended with {done.returncode}, "
                             f"not {status}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


class Source:
    """A standard NBD server that has the disk at the old site."""

    def __init__(self, kind, image, directory):
        if kind == "nbdkit":
            address = os.path.join(directory, "source.sock")
            self.uri = f"nbd+unix:///?socket={address}"
            command = ["nbdkit", "-f", "-U", address, "file", image]
        elif kind == "qemu-nbd":
            address = free_port()
            self.uri = f"nbd://127.0.0.1:{address}"
            command = ["qemu-nbd", "-f", "raw", "-t", "-e", 16, "-b", "127.0.0.1",
                       "-p", address, image]
        elif kind == "nbd-server":
            # Simple replies only, and no extents.
            address = free_port()
            self.uri = f"nbd://127.0.0.1:{address}/disk"
            config = os.path.join(directory, "nbd-server.conf")
            with open(config, "w") as file:
                file.write("[generic]\n  listenaddr = 127.0.0.1\n"
                           f"  port = {address}\n[disk]\n  exportname = {image}\n")
            # It goes into the background by itself: without that it serves one client only.
            self.pid_file = os.path.join(directory, "nbd-server.pid")
            run("nbd-server", "-C", config, "-p", self.pid_file)
            self.process = None
            connect_patiently(address)
            return
        else:
            raise ValueError(kind)
        self.process = Process(f"source-{kind}", command, directory)
        self.process.wait_for_listener(address)

    def stop(self):
        if self.process is not None:
            self.process.stop()
        elif os.path.exists(self.pid_file):
            with open(self.pid_file) as file:
                pid = int(file.read())
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                return
            # Not our child: its end can only be looked for.
            deadline = time.monotonic() + PATIENCE_S
            while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
                time.sleep(0.01)


class Server:
    """The server under test, serving one image."""

    def __init__(self, image, directory, transport="unix", source=None, export="",
                 read_only=False, extra=(), name="server"):
        self.export = export
        self.directory = directory
        if transport == "tcp":
            self.address = free_port()
            self.listen = f"tcp://127.0.0.1:{self.address}"
            self.uri = f"nbd://127.0.0.1:{self.address}/{export}"
        else:
            self.address = os.path.join(directory, f"{name}.sock")
            self.listen = f"unix:{self.address}"
            self.uri = f"nbd+unix:///{export}?socket={self.address}"
        self.control = os.path.join(directory, f"{name}.control")
        self.process = Process(name, self.command(image, source, read_only, list(extra)),
                               directory)
        self.process.wait_for_listener(self.address)

    def stop(self):
        return self.process.stop()


class Hikkoshi(Server):
    """The project's own binary."""

    ours = True

    def command(self, image, source, read_only, extra):
        command = [binary(), "serve", image, "--listen", self.listen,
                   "--control", f"unix:{self.control}"]
        if self.export:
            command += ["--export", self.export]
        if source is not None:
            command += ["--from", source.uri, "--handoff", "now", "--no-background"]
        if read_only:
            command += ["--read-only"]
        return command + extra

    def status(self):
        """What the daemon says of its only export."""
        return json.loads(run(binary(), "status", "--json", "--control", f"unix:{self.control}"))


class Nbdkit(Server):
    """A peer, for calibration. Of a source it knows nothing: it serves a copy."""

    ours = False

    def command(self, image, source, read_only, extra):
        at = ["-i", "127.0.0.1", "-p", self.address]
        if not isinstance(self.address, int):
            at = ["-U", self.address]
        return ["nbdkit", "-f", *at, "-e", self.export, *(["-r"] if read_only else []),
                "file", image]


class QemuNbd(Server):
    """A peer, for calibration. Of a source it knows nothing: it serves a copy."""

    ours = False

    def command(self, image, source, read_only, extra):
        at = ["-b", "127.0.0.1", "-p", self.address]
        if not isinstance(self.address, int):
            at = ["-k", self.address]
        return ["qemu-nbd", "-f", "raw", "-t", "-e", "0", "--discard=unmap", *at,
                "-x", self.export, *(["-r"] if read_only else []), image]


SERVERS = {"hikkoshi": Hikkoshi, "nbdkit": Nbdkit, "qemu-nbd": QemuNbd}


def server_class():
    """The server under test; run.py sets it."""
    return SERVERS[os.environ.get("HIKKOSHI_INTEROP_SERVER", "hikkoshi")]


def binary():
    """The binary under test."""
    path = os.environ.get("HIKKOSHI_BIN")
    if not path:
        raise AssertionError("HIKKOSHI_BIN does not name the binary: run `cargo xtask interop`")
    return path


def only_ours(test):
    """Marks a test of what only our server has."""
    return unittest.skipUnless(server_class().ours, "only our server has this")(test)


class ServerCase(unittest.TestCase):
    """A test with one server, started anew for each test and looked after to its end."""

    setup = SETUPS[0]
    export = ""
    read_only = False
    extra = ()
    # Tests with a large payload bring a disk of their own.
    disk = Disk

    def setUp(self):
        # Not below the project: Unix socket paths are short.
        self.directory = tempfile.mkdtemp(prefix="hikkoshi-interop-")
        self.addCleanup(shutil.rmtree, self.directory)
        self.image = os.path.join(self.directory, "disk.img")
        self.source = None
        if self.setup.arriving and server_class().ours:
            source_image = os.path.join(self.directory, "source.img")
            self.content = self.disk.write(source_image)
            self.source = Source(self.setup.source, source_image, self.directory)
            self.addCleanup(self.source.stop)
        else:
            self.content = self.disk.write(self.image)
        self.server = server_class()(self.image, self.directory, self.setup.transport,
                                     self.source, self.export, self.read_only, self.extra)
        self.addCleanup(self.end_server)
        self.uri = self.server.uri

    def end_server(self):
        """The server must have survived the test, and must end when it is asked to."""
        alive = self.server.process.alive()
        status = self.server.stop()
        log = self.server.process.log()
        self.assertTrue(alive, f"the server died with status {status}:\n{log}")
        self.assertIsNotNone(status, f"the server did not end after SIGTERM:\n{log}")
        if server_class().ours:
            self.assertEqual(status, 0, f"exit status after SIGTERM:\n{log}")
            self.assertNotIn("panicked", log)

    def path(self, name):
        return os.path.join(self.directory, name)

    def assert_same_bytes(self, actual, expected, what="content"):
        """Compares long byte strings and tells where they differ first."""
        if bytes(actual) == bytes(expected):
            return
        self.assertEqual(len(actual), len(expected), f"{what}: length")
        first = next(i for i in range(len(actual)) if actual[i] != expected[i])
        self.fail(f"{what} differs from byte {first}: {bytes(actual[first:first + 16]).hex()} "
                  f"instead of {bytes(expected[first:first + 16]).hex()}")

    def assert_file(self, path, expected):
        with open(path, "rb") as file:
            self.assert_same_bytes(file.read(), expected, path)
