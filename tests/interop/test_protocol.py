"""Every command, flag and error code, one by one, by the scripting interface of libnbd (nbdsh).

libnbd checks what it sends; set_strict_mode(0) lets us send what a good client would not.
"""

import errno
import os

import nbd

from harness import KIB, MIB, ServerCase, each_setup, only_ours

UNKNOWN_FLAG = 1 << 10
TOP = 2 ** 64


class ProtocolCase(ServerCase):
    def connect(self, strict=True, structured=True, contexts=("base:allocation",), fixed=True):
        handle = nbd.NBD()
        if not strict:
            handle.set_strict_mode(0)
        if not structured:
            handle.set_request_structured_replies(False)
        if not fixed:
            handle.set_handshake_flags(0)
        for context in contexts:
            handle.add_meta_context(context)
        handle.connect_uri(self.uri)
        return handle

    def assert_errno(self, expected, call, *arguments, **keywords):
        """The call fails with one of the expected errors."""
        expected = expected if isinstance(expected, tuple) else (expected,)
        try:
            call(*arguments, **keywords)
        except nbd.Error as error:
            self.assertIn(error.errnum, expected, str(error))
            return
        self.fail("no error, instead of " + ", ".join(errno.errorcode[each] for each in expected))

    def assert_serves(self, handle=None):
        """The connection, or a new one, still answers with the right bytes."""
        handle = handle or self.connect()
        self.assert_same_bytes(handle.pread(4096, 4 * MIB), self.content[4 * MIB:4 * MIB + 4096])


@each_setup
class Commands(ProtocolCase):
    def test_flags_of_the_export(self):
        handle = self.connect()
        self.assertEqual(handle.get_size(), len(self.content))
        self.assertFalse(handle.is_read_only())
        for ability in ["can_flush", "can_fua", "can_trim", "can_zero", "can_df", "can_cache",
                        "can_multi_conn"]:
            self.assertTrue(getattr(handle, ability)(), ability)
        self.assertTrue(handle.can_meta_context("base:allocation"))

    def test_a_mirror_of_every_command(self):
        # The same operations on the disk and on a copy in memory; at the end all bytes agree.
        handle, mirror = self.connect(), bytearray(self.content)
        step = 0
        for flags in [0, nbd.CMD_FLAG_FUA]:
            for offset, length in [(0, 1), (511, 2), (4095, 4098), (9 * MIB - 100, 200),
                                   (20 * MIB - 1, 70000), (30 * MIB, 65536),
                                   (len(mirror) - 777, 777)]:
                data = bytes([step % 255 + 1]) * length
                handle.pwrite(data, offset, flags)
                mirror[offset:offset + length] = data
                self.assert_same_bytes(handle.pread(length, offset), data)
                at = (offset + 3 * MIB) % (len(mirror) - length)
                handle.zero(length, at, flags | (nbd.CMD_FLAG_NO_HOLE if step % 2 else 0))
                mirror[at:at + length] = bytes(length)
                handle.cache(length, (at + MIB) % (len(mirror) - length))
                step += 1
            handle.flush()
        # A trim may or may not zero: its range is zeroed afterwards.
        handle.trim(2 * MIB, 40 * MIB)
        handle.zero(2 * MIB, 40 * MIB)
        mirror[40 * MIB:42 * MIB] = bytes(2 * MIB)
        self.assert_same_bytes(b"".join(handle.pread(16 * MIB, at * MIB) for at in (0, 16, 32)),
                               mirror)

    def test_reads_across_many_pieces(self):
        # Every other block is written here: a read crosses hundreds of runs that are and are
        # not here yet.
        handle, mirror = self.connect(), bytearray(self.content)
        for block in range(0, 512, 2):
            data = bytes([block % 251 + 1]) * 4096
            handle.pwrite(data, block * 4096)
            mirror[block * 4096:(block + 1) * 4096] = data
        self.assert_same_bytes(handle.pread(512 * 4096 + 100, 3), mirror[3:512 * 4096 + 103])

    def test_largest_read_and_write(self):
        handle = self.connect()
        self.assert_same_bytes(handle.pread(32 * MIB, MIB), self.content[MIB:33 * MIB])
        data = os.urandom(32 * MIB)
        handle.pwrite(data, 5 * MIB)
        self.assert_same_bytes(handle.pread(32 * MIB, 5 * MIB), data)

    def test_trim_and_zero_may_be_longer_than_a_payload(self):
        handle = self.connect()
        handle.trim(40 * MIB, 0)
        handle.zero(len(self.content), 0)
        self.assertFalse(any(handle.pread(32 * MIB, 0)))
        self.assertFalse(any(handle.pread(16 * MIB, 32 * MIB)))

    def test_no_hole_and_fast_zero(self):
        handle = self.connect()
        handle.zero(MIB, 10 * MIB, nbd.CMD_FLAG_NO_HOLE)
        self.assertFalse(any(handle.pread(MIB, 10 * MIB)))
        if handle.can_fast_zero():
            try:
                handle.zero(MIB, 0, nbd.CMD_FLAG_FAST_ZERO)
                self.assertFalse(any(handle.pread(MIB, 0)))
            except nbd.Error as error:
                self.assertEqual(error.errnum, errno.ENOTSUP)
                self.assert_same_bytes(handle.pread(MIB, 0), self.content[:MIB])

    def test_reads_that_must_not_be_fragmented(self):
        handle = self.connect()
        # Across the edges of data and holes, up to what every server must manage.
        for offset in [0, 9 * MIB - 1000, 20 * MIB - 1000, 32 * MIB]:
            seen = []
            read = handle.pread_structured(
                64 * KIB, offset, lambda data, at, status, error: seen.append((at, len(data))),
                nbd.CMD_FLAG_DF)
            self.assert_same_bytes(read, self.content[offset:offset + 64 * KIB])
            self.assertEqual(len(seen), 1, "one chunk, as asked for")

    def test_structured_reads_cover_what_was_asked_once(self):
        handle, seen = self.connect(), bytearray(4 * MIB)
        base = 8 * MIB - 333

        def chunk(data, offset, status, error):
            for at in range(offset - base, offset - base + len(data)):
                seen[at] += 1

        read = handle.pread_structured(4 * MIB, base, chunk)
        self.assert_same_bytes(read, self.content[base:base + 4 * MIB])
        self.assertEqual(set(seen), {1})

    def test_block_status(self):
        handle, found = self.connect(), []

        def keep(context, offset, entries, error):
            found.append((context, offset, list(entries)))

        handle.block_status(len(self.content), 0, keep)
        context, offset, entries = found.pop()
        self.assertEqual((context, offset), ("base:allocation", 0))
        position = 0
        for length, flags in zip(entries[::2], entries[1::2]):
            self.assertGreater(length, 0)
            if flags & nbd.STATE_ZERO:
                self.assertFalse(any(self.content[position:position + length]))
            position += length
        self.assertEqual(position, len(self.content))

    def test_block_status_of_one_extent(self):
        handle, found = self.connect(), []
        for offset, length in [(0, len(self.content)), (8 * MIB, 2 * MIB), (20 * MIB + 5, 1000),
                               (len(self.content) - 1, 1)]:
            found.clear()
            handle.block_status(length, offset,
                                lambda context, at, entries, error: found.append(list(entries)),
                                nbd.CMD_FLAG_REQ_ONE)
            self.assertEqual(len(found[0]), 2, "exactly one extent")
            self.assertTrue(0 < found[0][0] <= length, found)

    def test_many_in_flight_of_every_kind(self):
        handle, cookies = self.connect(), []
        buffers = []
        for index in range(64):
            at = index * 512 * KIB
            cookies.append(handle.aio_zero(4096, at + 8192))
            buffers.append((at + 65536, nbd.Buffer(16384)))
            cookies.append(handle.aio_pread(buffers[-1][1], at + 65536))
            cookies.append(handle.aio_pwrite(nbd.Buffer.from_bytearray(
                bytearray([index + 1]) * 4096), at))
            cookies.append(handle.aio_cache(65536, at))
            cookies.append(handle.aio_flush())
        for cookie in cookies:
            while not handle.aio_command_completed(cookie):
                handle.poll(-1)
        for offset, buffer in buffers:
            self.assert_same_bytes(buffer.to_bytearray(), self.content[offset:offset + 16384])
        for index in range(64):
            self.assertEqual(handle.pread(4096, index * 512 * KIB), bytes([index + 1]) * 4096)

    def test_connections_see_each_other(self):
        first, second = self.connect(), self.connect()
        for round in range(20):
            data = os.urandom(5000)
            first.pwrite(data, 7 * MIB + round * 1000)
            self.assert_same_bytes(second.pread(5000, 7 * MIB + round * 1000), data)
            second.flush()


@each_setup
class Errors(ProtocolCase):
    def test_requests_of_length_zero(self):
        handle = self.connect(strict=False)
        for call in [lambda: handle.pread(0, 0), lambda: handle.pwrite(b"", 0),
                     lambda: handle.trim(0, 0), lambda: handle.zero(0, 0),
                     lambda: handle.cache(0, 0), lambda: handle.pread(0, len(self.content)),
                     lambda: handle.block_status(0, 0, lambda *_: 0)]:
            # The protocol leaves it open: nothing done, or refused; but answered.
            try:
                call()
            except nbd.Error as error:
                self.assertIn(error.errnum, (errno.EINVAL, errno.ENOSPC), str(error))
        self.assert_serves(handle)

    def past_the_end(self, ranges):
        for structured in [True, False]:
            handle = self.connect(strict=False, structured=structured,
                                  contexts=("base:allocation",) if structured else ())
            for offset, length in ranges:
                with self.subTest(offset=offset, length=length, structured=structured):
                    self.assert_errno(errno.EINVAL, handle.pread, length, offset)
                    self.assert_errno(errno.ENOSPC, handle.pwrite, bytes(length), offset)
                    self.assert_errno(errno.ENOSPC, handle.zero, length, offset)
                    self.assert_errno(errno.EINVAL, handle.trim, length, offset)
                    self.assert_errno(errno.EINVAL, handle.cache, length, offset)
                    if structured:
                        self.assert_errno(errno.EINVAL, handle.block_status, length, offset,
                                          lambda *_: 0)
            self.assert_serves(handle)

    @only_ours
    def test_past_the_end(self):
        size = len(self.content)
        self.past_the_end([(size, 1), (size - 1, 2), (size - 4096, 8192), (size + MIB, 512),
                           (2 ** 62, 4096)])

    @only_ours
    def test_past_the_end_of_64_bits(self):
        # libnbd hands the offset on as it is: the sum wraps round to a small number.
        self.past_the_end([(TOP - 512, 1024), (TOP - 1, 2), (TOP - 4096, 4096), (2 ** 63, 512)])

    def test_payloads_above_the_limit(self):
        handle = self.connect(strict=False)
        try:
            self.assert_same_bytes(handle.pread(33 * MIB, 0), self.content[:33 * MIB])
        except nbd.Error as error:
            self.assertIn(error.errnum, (errno.EINVAL, errno.EOVERFLOW, errno.ENOMEM))
        self.assert_serves()
        handle = self.connect(strict=False)
        try:
            handle.pwrite(bytes(33 * MIB), MIB)
        except nbd.Error as error:
            # Refused, or the connection is closed: either keeps the rest of the disk as it was.
            self.assertIn(error.errnum, (errno.EINVAL, errno.ENOMEM, errno.EOVERFLOW,
                                         errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET, 0, None))
        handle = self.connect()
        self.assert_same_bytes(handle.pread(MIB, 0), self.content[:MIB])
        self.assert_same_bytes(handle.pread(MIB, 47 * MIB), self.content[47 * MIB:])

    @only_ours
    def test_a_64_mib_read_is_refused_or_right(self):
        handle = self.connect(strict=False)
        self.assert_errno((errno.EINVAL, errno.EOVERFLOW), handle.pread, 64 * MIB, 0)
        self.assert_serves(handle)

    def test_unknown_flags(self):
        handle = self.connect(strict=False)
        self.assert_errno(errno.EINVAL, handle.pread, 512, 0, UNKNOWN_FLAG)
        self.assert_errno(errno.EINVAL, handle.pwrite, bytes(512), 0, UNKNOWN_FLAG)
        self.assert_errno(errno.EINVAL, handle.trim, 512, 0, UNKNOWN_FLAG)
        self.assert_errno(errno.EINVAL, handle.zero, 512, 0, UNKNOWN_FLAG)
        self.assert_errno(errno.EINVAL, handle.cache, 512, 0, UNKNOWN_FLAG)
        self.assert_errno(errno.EINVAL, handle.flush, UNKNOWN_FLAG)
        self.assert_errno(errno.EINVAL, handle.block_status, 512, 0, lambda *_: 0, UNKNOWN_FLAG)
        # The payload of the refused write was consumed, and nothing was written.
        self.assert_same_bytes(handle.pread(512, 0), self.content[:512])
        self.assert_serves(handle)

    @only_ours
    def test_flags_of_other_commands(self):
        handle = self.connect(strict=False)
        self.assert_errno(errno.EINVAL, handle.pwrite, bytes(512), 0, nbd.CMD_FLAG_DF)
        self.assert_errno(errno.EINVAL, handle.pwrite, bytes(512), 0, nbd.CMD_FLAG_NO_HOLE)
        self.assert_errno(errno.EINVAL, handle.trim, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
        self.assert_errno(errno.EINVAL, handle.pread, 512, 0, nbd.CMD_FLAG_REQ_ONE)
        self.assert_serves(handle)

    @only_ours
    def test_force_unit_access_is_legal_on_every_command(self):
        handle = self.connect(strict=False)
        handle.pread(512, 0, nbd.CMD_FLAG_FUA)
        handle.cache(512, 0, nbd.CMD_FLAG_FUA)
        handle.trim(512, 12 * MIB, nbd.CMD_FLAG_FUA)
        handle.flush(nbd.CMD_FLAG_FUA)
        handle.block_status(512, 0, lambda *_: 0, nbd.CMD_FLAG_FUA)
        self.assert_serves(handle)

    def test_block_status_without_a_context(self):
        handle = self.connect(strict=False, contexts=())
        self.assert_errno(errno.EINVAL, handle.block_status, 512, 0, lambda *_: 0)
        self.assert_serves(handle)


@each_setup
class ReadOnly(ProtocolCase):
    read_only = True

    def test_changes_are_refused(self):
        for structured in [True, False]:
            handle = self.connect(strict=False, structured=structured, contexts=())
            self.assertTrue(handle.is_read_only())
            self.assert_errno(errno.EPERM, handle.pwrite, bytes(70000), 4 * MIB)
            self.assert_errno(errno.EPERM, handle.zero, 4096, 4 * MIB)
            self.assert_errno(errno.EPERM, handle.trim, 4096, 4 * MIB)
            self.assert_errno(errno.EPERM, handle.pwrite, b"x", 4 * MIB, nbd.CMD_FLAG_FUA)
            # The payloads were consumed: the connection is in step.
            self.assert_serves(handle)

    def test_reads_are_served(self):
        handle = self.connect()
        for at in (0, 16, 32):
            self.assert_same_bytes(handle.pread(16 * MIB, at * MIB),
                                   self.content[at * MIB:(at + 16) * MIB])


@each_setup
class Handshake(ProtocolCase):
    def negotiating(self):
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        if isinstance(self.server.address, int):
            handle.connect_tcp("127.0.0.1", str(self.server.address))
        else:
            handle.connect_unix(self.server.address)
        return handle

    def test_list(self):
        handle, names = self.negotiating(), []
        handle.opt_list(lambda name, description: names.append(name))
        self.assertEqual(names, [""])
        handle.opt_go()
        self.assert_serves(handle)

    def test_info_tells_what_go_tells(self):
        handle = self.negotiating()
        handle.opt_info()
        told = [handle.get_size(), handle.is_read_only(), handle.can_multi_conn(),
                handle.get_block_size(nbd.SIZE_MINIMUM), handle.get_block_size(nbd.SIZE_MAXIMUM)]
        handle.opt_go()
        self.assertEqual(told, [handle.get_size(), handle.is_read_only(),
                                handle.can_multi_conn(), handle.get_block_size(nbd.SIZE_MINIMUM),
                                handle.get_block_size(nbd.SIZE_MAXIMUM)])

    @only_ours
    def test_an_unknown_export_is_refused_and_another_may_be_asked_for(self):
        handle = self.negotiating()
        for name in ["nobody", "x" * 4096]:
            handle.set_export_name(name)
            self.assert_errno((errno.ENOENT, errno.EINVAL), handle.opt_info)
            self.assert_errno((errno.ENOENT, errno.EINVAL), handle.opt_go)
        handle.set_export_name("")
        handle.opt_go()
        self.assert_serves(handle)

    def test_metadata_contexts(self):
        handle = self.negotiating()

        def listed(*queries):
            handle.clear_meta_contexts()
            for query in queries:
                handle.add_meta_context(query)
            names = []
            handle.opt_list_meta_context(names.append)
            return names

        self.assertIn("base:allocation", listed())
        self.assertIn("base:allocation", listed("base:"))
        self.assertEqual(listed("base:allocation"), ["base:allocation"])
        self.assertEqual(listed("unheard:of", "x-nobody:", "base:nothing"), [])
        handle.clear_meta_contexts()
        for query in ["base:", "unheard:of", "base:allocation"]:
            handle.add_meta_context(query)
        handle.opt_go()
        self.assertTrue(handle.can_meta_context("base:allocation"))
        self.assertFalse(handle.can_meta_context("base:"), "a namespace alone sets nothing")
        self.assertFalse(handle.can_meta_context("unheard:of"))

    @only_ours
    def test_both_contexts_in_one_reply(self):
        handle = self.connect(contexts=("base:allocation", "x-hikkoshi:residency"))
        totals = {}
        handle.block_status(MIB, 0, lambda context, at, entries, error:
                            totals.update({context: sum(list(entries)[::2])}))
        self.assertEqual(set(totals), {"base:allocation", "x-hikkoshi:residency"})

    def test_abort(self):
        handle = self.negotiating()
        handle.opt_abort()
        self.assertTrue(handle.aio_is_closed())
        self.assert_serves()

    def test_the_oldest_handshake(self):
        # EXPORT_NAME, simple replies, the 124 zeroes.
        handle = self.connect(fixed=False, structured=False, contexts=())
        self.assertEqual(handle.get_size(), len(self.content))
        self.assert_serves(handle)
        handle.pwrite(b"old" * 1000, 77)
        self.assert_same_bytes(handle.pread(3000, 77), b"old" * 1000)

    def test_simple_replies(self):
        handle = self.connect(structured=False, contexts=())
        self.assertFalse(handle.get_structured_replies_negotiated())
        self.assert_same_bytes(handle.pread(12 * MIB, 0), self.content[:12 * MIB])
        self.assert_serves(handle)
