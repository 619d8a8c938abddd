"""Clients that lie, hang up, dawdle and flood. The server lives, stays small, and serves others.

Raw sockets: no library would send this.
"""

import os
import random
import resource
import socket
import struct
import threading
import time

import nbd

from harness import KIB, MIB, ServerCase, connect, each_setup

OPTION_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = \
    1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, SERVER, INFO_REPLY = 1, 2, 3
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = \
    (1 << 31 | code for code in (1, 2, 3, 6, 9))

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)

# What a server may grow by while it is being annoyed, beyond what it had before.
GROWTH_LIMIT = 256 * MIB


def option(number, payload=b"", length=None):
    """An option as a client sends it; its length can be made to lie."""
    length = len(payload) if length is None else length
    return struct.pack(">QII", OPTION_MAGIC, number, length) + payload


def name_payload(name=b"", infos=()):
    """The payload of INFO and GO."""
    return (struct.pack(">I", len(name)) + name + struct.pack(">H", len(infos))
            + b"".join(struct.pack(">H", info) for info in infos))


def meta_payload(name=b"", queries=()):
    """The payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return (struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
            + b"".join(struct.pack(">I", len(query)) + query for query in queries))


def request(command, offset=0, length=0, flags=0, cookie=1, payload=b"", magic=REQUEST_MAGIC):
    """A request as a client sends it."""
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length) + payload


CLIENT_FLAGS = struct.pack(">I", 3)

# Whole conversations, each of which is cut off after every one of its bytes.
CONVERSATIONS = {
    "export_name": CLIENT_FLAGS + option(EXPORT_NAME) + request(READ, 0, 512),
    "go": CLIENT_FLAGS + option(STRUCTURED) + option(SET_META, meta_payload(
        queries=[b"base:allocation"])) + option(GO, name_payload(infos=[3]))
        + request(READ, 0, 4096) + request(DISC),
    "list": CLIENT_FLAGS + option(LIST) + option(INFO, name_payload()) + option(ABORT),
    "write": CLIENT_FLAGS + option(GO, name_payload())
        + request(WRITE, 4096, 64, payload=bytes(64)) + request(WRITE_ZEROES, 0, 512)
        + request(FLUSH),
}


class RawClient:
    """A client that sends whatever it is told to, and reads replies."""

    def __init__(self, address, timeout=60):
        self.sock = connect(address, timeout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def greet(self):
        greeting = self.read(18)
        magic, option_magic, flags = struct.unpack(">8sQH", greeting)
        assert magic == b"NBDMAGIC" and option_magic == OPTION_MAGIC and flags & 3 == 3, greeting
        self.send(CLIENT_FLAGS)

    def send(self, data):
        self.sock.sendall(data)

    def send_and_end(self, data):
        """Sends and says that nothing follows; the server may have closed before."""
        try:
            self.sock.sendall(data)
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def read(self, length):
        data = bytearray()
        while len(data) < length:
            piece = self.sock.recv(length - len(data))
            if not piece:
                raise EOFError(f"closed after {len(data)} of {length} bytes")
            data += piece
        return bytes(data)

    def option_reply(self):
        magic, number, kind, length = struct.unpack(">QIII", self.read(20))
        assert magic == REPLY_MAGIC, hex(magic)
        return number, kind, self.read(length)

    def ask(self, number, payload=b""):
        """Sends an option; gives the kinds of all replies to it, up to the last."""
        self.send(option(number, payload))
        kinds = []
        while True:
            answered, kind, _ = self.option_reply()
            assert answered == number, (answered, number)
            kinds.append(kind)
            if kind == ACK or kind >> 31:
                return kinds

    def go(self):
        self.greet()
        kinds = self.ask(GO, name_payload())
        assert kinds[-1] == ACK, kinds

    def simple_reply(self):
        magic, error, cookie = struct.unpack(">IIQ", self.read(16))
        assert magic == SIMPLE_REPLY_MAGIC, hex(magic)
        return error, cookie

    def at_end(self):
        """Whether the server closes, however it does."""
        try:
            while True:
                if not self.sock.recv(65536):
                    return True
        except ConnectionError:
            return True
        except TimeoutError:
            return False


class HostileCase(ServerCase):
    def setUp(self):
        super().setUp()
        self.rss_before = self.server.process.rss_bytes()
        self.good = nbd.NBD()
        self.good.connect_uri(self.uri)

    def tearDown(self):
        """The client that was there before still works, so does a new one; memory is bounded."""
        newcomer = nbd.NBD()
        newcomer.connect_uri(self.uri)
        for handle in [self.good, newcomer]:
            handle.pwrite(b"still here" * 100, 30 * MIB)
            self.assertEqual(handle.pread(1000, 30 * MIB), b"still here" * 100)
            self.assert_same_bytes(handle.pread(MIB, MIB), self.content[MIB:2 * MIB])
        growth = self.server.process.rss_bytes() - self.rss_before
        self.assertLess(growth, GROWTH_LIMIT, "the server grew")

    def raw(self, timeout=60):
        client = RawClient(self.server.address, timeout)
        self.addCleanup(client.sock.close)
        return client


@each_setup
class HangUps(HostileCase):
    def test_at_every_byte(self):
        for name, conversation in CONVERSATIONS.items():
            for length in range(len(conversation) + 1):
                for abrupt in [False, True]:
                    sock = connect(self.server.address)
                    try:
                        sock.sendall(conversation[:length])
                    except ConnectionError:
                        self.fail(f"{name}: closed before byte {length}")
                    if abrupt:
                        # A reset instead of an orderly end.
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                        struct.pack("ii", 1, 0))
                    sock.close()
                # Now and then it is made sure that all is well, not only at the end.
                if length % 16 == 0:
                    self.assertEqual(len(self.good.pread(512, 0)), 512)

    def test_in_the_middle_of_a_large_write(self):
        for received in [0, 1, 65536, 8 * MIB]:
            client = self.raw()
            client.go()
            # What arrived of an unanswered write may be there or not: it is aimed at where
            # nobody looks afterwards.
            client.send(request(WRITE, 10 * MIB, 16 * MIB, payload=bytes(received)))
            client.sock.close()

    def test_in_the_middle_of_a_large_read(self):
        for read in [0, 1, 16, 65536, 8 * MIB]:
            client = self.raw()
            client.go()
            client.send(request(READ, 0, 32 * MIB, cookie=7))
            client.read(read)
            client.sock.close()

    def test_disconnect_with_requests_in_flight(self):
        # DISC finishes what is in flight; what was sent after it is never done.
        client = self.raw()
        client.go()
        client.send(b"".join(request(WRITE, 10 * MIB + index * 4096, 4096, cookie=index,
                                     payload=bytes([index + 1]) * 4096) for index in range(32))
                    + request(DISC)
                    + request(WRITE, 16 * MIB, 4096, payload=b"\xff" * 4096))
        self.assertTrue(client.at_end())
        for index in range(32):
            self.assertEqual(self.good.pread(4096, 10 * MIB + index * 4096),
                             bytes([index + 1]) * 4096)
        self.assertEqual(self.good.pread(4096, 16 * MIB), bytes(4096))


@each_setup
class Garbage(HostileCase):
    def test_instead_of_a_handshake(self):
        generator = random.Random(1)
        for length in [4, 16, 20, 100, 5000]:
            for _ in range(10):
                with RawClient(self.server.address, 10) as client:
                    # The first bytes that follow the flags are no option.
                    client.send_and_end(CLIENT_FLAGS + generator.randbytes(length))
                    self.assertTrue(client.at_end())

    def test_unknown_client_flags_close(self):
        client = self.raw()
        client.read(18)
        client.send(struct.pack(">I", 3 | 1 << 17) + option(LIST))
        self.assertTrue(client.at_end())

    def test_instead_of_a_request(self):
        client = self.raw()
        client.go()
        client.send(request(READ, 0, 512, magic=0xDEADBEEF))
        self.assertTrue(client.at_end())

    def test_mutated_conversations(self):
        generator = random.Random(2)
        whole = CONVERSATIONS["go"]
        for _ in range(400):
            mutant = bytearray(whole)
            for _ in range(generator.randint(1, 4)):
                mutant[generator.randrange(4, len(mutant))] = generator.randrange(256)
            with RawClient(self.server.address) as client:
                client.send_and_end(mutant)
                self.assertTrue(client.at_end(), mutant.hex())


@each_setup
class Options(HostileCase):
    def test_unknown_ones_are_answered_in_step(self):
        client = self.raw()
        client.greet()
        for number, payload in [(4, b""), (12345, b"x" * 1000), (0xFFFFFFFF, b"y"), (0, b"")]:
            self.assertEqual(client.ask(number, payload), [ERR_UNSUP], number)
        self.assertIn(client.ask(STARTTLS)[-1], (ERR_UNSUP, ERR_POLICY))
        self.assertEqual(client.ask(LIST), [SERVER, ACK])

    def test_malformed_ones_are_refused_in_step(self):
        client = self.raw()
        client.greet()
        bad_names = [
            b"", b"\0", struct.pack(">I", 5) + b"abc", struct.pack(">I", 0xFFFFFFFF) + bytes(10),
            name_payload()[:-1], name_payload() + b"x", name_payload(infos=[3]) + b"\0\0",
            struct.pack(">IH", 0, 5), struct.pack(">I", 0x7FFFFFFF),
        ]
        for number in [INFO, GO]:
            for payload in bad_names:
                self.assertEqual(client.ask(number, payload), [ERR_INVALID], payload.hex())
        self.assertEqual(client.ask(LIST, b"payload"), [ERR_INVALID])
        self.assertEqual(client.ask(STRUCTURED, b"payload"), [ERR_INVALID])
        self.assertEqual(client.ask(STRUCTURED), [ACK])
        bad_queries = [
            b"", struct.pack(">II", 0, 0xFFFFFFFF), struct.pack(">III", 0, 1, 0xFFFFFFFF),
            struct.pack(">III", 0, 1, 50) + b"base:allocation", meta_payload() + b"x",
            struct.pack(">I", 9) + b"abc", struct.pack(">II", 0, 2) + struct.pack(">I", 0),
        ]
        for number in [LIST_META, SET_META]:
            for payload in bad_queries:
                self.assertIn(client.ask(number, payload)[-1], (ERR_INVALID, ERR_TOO_BIG),
                              payload.hex())
        # After all that, the connection still works.
        self.assertEqual(client.ask(GO, name_payload())[-1], ACK)

    def test_meta_contexts_before_structured_replies(self):
        client = self.raw()
        client.greet()
        self.assertEqual(client.ask(SET_META, meta_payload(queries=[b"base:allocation"])),
                         [ERR_INVALID])
        self.assertEqual(client.ask(GO, name_payload())[-1], ACK)

    def test_announced_lengths_are_not_believed(self):
        for number in [LIST, INFO, GO, LIST_META, SET_META, EXPORT_NAME, 999]:
            for length in [0xFFFFFFFF, 0x80000000, 64 * MIB]:
                client = self.raw(timeout=5)
                client.greet()
                try:
                    client.send(option(number, bytes(64 * KIB), length=length))
                except ConnectionError:
                    pass
                client.sock.close()
        self.assertLess(self.server.process.rss_bytes() - self.rss_before, GROWTH_LIMIT)

    def test_a_name_that_nobody_has_closes_the_old_handshake(self):
        client = self.raw()
        client.greet()
        client.send(option(EXPORT_NAME, b"n" * 4096))
        if self.server.ours:
            self.assertTrue(client.at_end())

    def test_abort_is_acknowledged(self):
        client = self.raw()
        client.greet()
        self.assertEqual(client.ask(ABORT), [ACK])
        self.assertTrue(client.at_end())

    def test_thousands_of_options(self):
        client = self.raw()
        client.greet()
        try:
            for _ in range(5000):
                client.ask(LIST)
        except (EOFError, ConnectionError):
            # A server may count, and close.
            pass


@each_setup
class Requests(HostileCase):
    def test_unknown_commands(self):
        client = self.raw()
        client.go()
        for command in [8, 9, 100, 0xFFFF]:
            client.send(request(command, 0, 512, cookie=command))
            self.assertEqual(client.simple_reply(), (22, command))
        client.send(request(READ, MIB, 512, cookie=5))
        self.assertEqual(client.simple_reply(), (0, 5))
        self.assert_same_bytes(client.read(512), self.content[MIB:MIB + 512])

    def test_a_write_longer_than_4_gib_less_one(self):
        # Announced, not sent: refused or closed, and no memory is taken for it.
        client = self.raw(timeout=10)
        client.go()
        client.send_and_end(request(WRITE, 0, 0xFFFFFFFF, payload=bytes(MIB)))
        client.sock.close()
        self.assert_same_bytes(self.good.pread(MIB, 0), self.content[:MIB])

    def test_reads_of_4_gib_less_one(self):
        client = self.raw()
        client.go()
        client.send(request(READ, 0, 0xFFFFFFFF, cookie=3))
        error, cookie = client.simple_reply()
        self.assertIn(error, (22, 75))
        self.assertEqual(cookie, 3)

    def test_the_same_cookie_for_all(self):
        client = self.raw()
        client.go()
        client.send(request(FLUSH, cookie=9) * 100)
        for _ in range(100):
            self.assertEqual(client.simple_reply(), (0, 9))

    def test_one_byte_at_a_time(self):
        client = self.raw()
        client.greet()
        for byte in option(GO, name_payload()):
            client.send(bytes([byte]))
        while client.option_reply()[1] != ACK:
            pass
        for byte in request(WRITE, 25 * MIB, 5, cookie=8, payload=b"slow!"):
            client.send(bytes([byte]))
        self.assertEqual(client.simple_reply(), (0, 8))
        self.assertEqual(self.good.pread(5, 25 * MIB), b"slow!")

    def test_a_slow_reader_stalls_nobody(self):
        # Hundreds of MiB of answers that nobody reads.
        slow = []
        for _ in range(4):
            client = self.raw()
            client.go()
            client.sock.setblocking(False)
            try:
                for index in range(64):
                    client.sock.send(request(READ, 0, 32 * MIB, cookie=index))
            except BlockingIOError:
                pass
            slow.append(client)
        for index in range(200):
            self.assert_same_bytes(self.good.pread(4096, index * 4096),
                                   self.content[index * 4096:(index + 1) * 4096])
        self.assertLess(self.server.process.rss_bytes() - self.rss_before, 512 * MIB,
                        "answers pile up in memory")


@each_setup
class Floods(HostileCase):
    def test_half_open_handshakes(self):
        # More than any sane number of clients, all silent after the first bytes.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        held = []
        self.addCleanup(lambda: [sock.close() for sock in held])
        for index in range(600):
            try:
                sock = connect(self.server.address, timeout=5)
                sock.sendall(CONVERSATIONS["go"][:index % 40])
            except OSError:
                # Refused: a cap is a fine answer.
                continue
            held.append(sock)
        # Meanwhile the client that was there first is served.
        for index in range(100):
            self.assertEqual(len(self.good.pread(65536, index * 65536)), 65536)
        for sock in held:
            sock.close()
        held.clear()

    def test_connections_that_come_and_go(self):
        stop = threading.Event()
        seen = []

        def come_and_go():
            while not stop.is_set():
                with RawClient(self.server.address) as client:
                    client.go()
                    client.send(request(READ, 0, 4096, cookie=1))
                    seen.append(client.simple_reply())

        threads = [threading.Thread(target=come_and_go) for _ in range(8)]
        for thread in threads:
            thread.start()
        for index in range(300):
            self.good.pwrite(os.urandom(4096), 35 * MIB + index * 4096)
        while len(seen) < 400:
            time.sleep(0.01)
        stop.set()
        for thread in threads:
            thread.join()
        self.assertEqual(set(seen), {(0, 1)})
