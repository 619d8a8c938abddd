"""libnbd's own tools: nbdinfo, nbdcopy, nbddump."""

import json
import os
import re
import subprocess

from harness import MIB, ServerCase, each_setup, only_ours, run


def extents(uri, context):
    """The extents that nbdinfo shows, as (offset, length, flags)."""
    found = json.loads(run("nbdinfo", f"--map={context}", "--json", uri))
    return [(each["offset"], each["length"], each["type"]) for each in found]


@each_setup
class Nbdinfo(ServerCase):
    def test_summary(self):
        text = run("nbdinfo", self.uri)
        self.assertIn(f"export-size: {len(self.content)}", text)
        self.assertIn("protocol: newstyle-fixed without TLS, using structured packets", text)
        self.assertIn("base:allocation", text)

    def test_json(self):
        export = json.loads(run("nbdinfo", "--json", self.uri))["exports"][0]
        self.assertEqual(export["export-size"], len(self.content))
        self.assertFalse(export["is_read_only"])
        for ability in ["can_cache", "can_df", "can_flush", "can_fua", "can_multi_conn",
                        "can_trim", "can_zero"]:
            self.assertTrue(export[ability], ability)

    @only_ours
    def test_block_sizes(self):
        export = json.loads(run("nbdinfo", "--json", self.uri))["exports"][0]
        self.assertEqual(export["block_size_minimum"], 1)
        self.assertEqual(export["block_size_maximum"], 32 * MIB)

    def test_size(self):
        self.assertEqual(run("nbdinfo", "--size", self.uri).strip(), str(len(self.content)))

    def test_can_and_is(self):
        abilities = ["cache", "connect", "df", "flush", "fua", "multi-conn", "read", "trim",
                     "write", "zero"]
        for ability in abilities:
            run("nbdinfo", "--can", ability, self.uri)
        run("nbdinfo", "--can", "structured-reply", self.uri)
        run("nbdinfo", "--is", "read-only", self.uri, status=2)
        run("nbdinfo", "--is", "tls", self.uri, status=2)

    def test_list(self):
        listed = json.loads(run("nbdinfo", "--list", "--json", self.uri))["exports"]
        self.assertEqual([export["export-name"] for export in listed], [""])
        self.assertEqual(listed[0]["export-size"], len(self.content))

    def test_map_of_allocation_covers_the_disk_and_hides_no_data(self):
        position = 0
        for offset, length, kind in extents(self.uri, "base:allocation"):
            self.assertEqual(offset, position, "a gap, or an overlap")
            position += length
            if kind & 2:
                self.assertFalse(any(self.content[offset:offset + length]),
                                 f"data at {offset} is called zero")
        self.assertEqual(position, len(self.content))

    def test_map_totals(self):
        text = run("nbdinfo", "--map", "--totals", self.uri)
        total = sum(int(line.split()[0]) for line in text.splitlines())
        self.assertEqual(total, len(self.content))

    @only_ours
    def test_map_of_residency(self):
        before = extents(self.uri, "x-hikkoshi:residency")
        self.assertEqual(sum(length for _, length, _ in before), len(self.content))
        kinds = {kind for _, _, kind in before}
        if not self.setup.arriving:
            self.assertNotIn(0, kinds, "a plain volume has nothing absent")
            return
        self.assertEqual(kinds, {0}, "nothing was fetched yet")
        script = (f"h.connect_uri('{self.uri}'); h.pread(65536, 131072); "
                  "h.pwrite(bytes(4096), 1048576)")
        run("/usr/bin/nbdsh", "-c", script)
        state_at = {}
        for offset, length, kind in extents(self.uri, "x-hikkoshi:residency"):
            for block in range(offset // 4096, (offset + length) // 4096):
                state_at[block] = kind
        self.assertEqual({state_at[block] for block in range(32, 48)}, {1}, "read: clean")
        self.assertEqual(state_at[256], 2, "written: owned")
        self.assertEqual(state_at[0], 0, "left alone: absent")


@each_setup
class NbdcopyPull(ServerCase):
    def pull(self, *options):
        target = self.path("copy.img")
        run("nbdcopy", *options, self.uri, target)
        self.assert_file(target, self.content)
        return target

    def test_plain(self):
        target = self.pull()
        self.assertLess(os.stat(target).st_blocks * 512, 24 * MIB, "holes were kept")

    def test_one_request_at_a_time(self):
        self.pull("--synchronous", "--request-size=1048576")

    def test_one_connection(self):
        self.pull("--connections=1", "--requests=64")

    def test_many_connections(self):
        self.pull("--connections=8", "--requests=16", "--threads=4")

    def test_without_extents(self):
        self.pull("--no-extents", "--sparse=65536")

    def test_small_requests(self):
        self.pull("--request-size=4096", "--sparse=4096")

    def test_large_requests(self):
        self.pull("--request-size=33554432", "--queue-size=67108864")

    def test_allocated_and_flushed(self):
        self.pull("--allocated", "--flush")

    def test_to_nowhere(self):
        run("nbdcopy", self.uri, "null:")


@each_setup
class NbdcopyPush(ServerCase):
    def push(self, *options):
        # Everything differs from what is there, and the holes lie elsewhere.
        new = bytearray(len(self.content))
        for offset, length in [(4 * MIB, 6 * MIB), (21 * MIB + 1536, 3 * MIB + 512)]:
            new[offset:offset + length] = os.urandom(length)
        path = self.path("new.img")
        with open(path, "wb") as file:
            file.write(new)
        run("cp", "--sparse=always", path, self.path("sparse.img"))
        run("nbdcopy", *options, self.path("sparse.img"), self.uri)
        # Read back by a client, and, once the server has ended, from the image itself.
        run("nbdcopy", self.uri, self.path("back.img"))
        self.assert_file(self.path("back.img"), new)
        self.server.stop()
        self.assert_file(self.image, new)

    def end_server(self):
        # push() ends it to look at the image.
        self.assertEqual(self.server.stop(), 0, self.server.process.log())

    def test_plain(self):
        self.push()

    def test_flushed(self):
        self.push("--flush")

    def test_one_request_at_a_time(self):
        self.push("--synchronous")

    def test_many_connections(self):
        self.push("--connections=8", "--requests=32", "--request-size=131072")

    def test_allocated(self):
        self.push("--allocated")


@each_setup
class Nbddump(ServerCase):
    def test_shows_the_bytes(self):
        text = run("nbddump", "--no-color", "--length=4096", self.uri)
        shown = bytearray()
        for line in text.splitlines():
            if "*" == line.strip():
                continue
            found = re.match(r"([0-9a-f]+): ((?:[0-9a-f]{2} +){1,16})", line)
            self.assertIsNotNone(found, line)
            shown += bytes.fromhex(found.group(2))
        self.assert_same_bytes(shown, self.content[:4096])

    def test_whole_disk_without_an_error(self):
        # To the end of the disk, holes folded; its output is long, so only its end is kept.
        with open(self.path("dump"), "wb") as file:
            subprocess.run(["nbddump", "--no-color", self.uri], stdout=file, check=True,
                           timeout=300)
        with open(self.path("dump"), "rb") as file:
            last = file.read().splitlines()[-1].decode()
        self.assertTrue(last.startswith(f"{len(self.content) - 16:010x}"), last)
