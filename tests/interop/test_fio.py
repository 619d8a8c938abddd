"""fio's nbd engine: random I/O, every block of it verified."""

from harness import MIB, ServerCase, each_setup, run


@each_setup
class Fio(ServerCase):
    def fio(self, *options):
        run("fio", "--name=job", "--ioengine=nbd", f"--uri={self.uri}", f"--size={32 * MIB}",
            "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0",
            "--randrepeat=1", "--randseed=20080517", *options, cwd=self.directory)

    def test_random_writes_of_4_kib(self):
        self.fio("--rw=randwrite", "--bs=4k", "--iodepth=32")

    def test_random_writes_of_any_size_by_sectors(self):
        self.fio("--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--iodepth=32")

    def test_reads_and_writes_mixed(self):
        self.fio("--rw=randrw", "--rwmixread=40", "--bs=8k", "--iodepth=16")

    def test_sequential_writes(self):
        self.fio("--rw=write", "--bs=1m", "--iodepth=8")

    def test_a_flush_after_every_eighth_write(self):
        self.fio("--rw=randwrite", "--bs=4k", "--iodepth=32", "--fsync=8", "--io_size=8m")

    def test_four_jobs_on_parts_of_the_disk(self):
        self.fio("--rw=randwrite", "--bs=4k", "--iodepth=32", "--numjobs=4", "--thread",
                 "--size=8m", "--offset_increment=8m", "--group_reporting")
