#!/usr/bin/python3
"""Runs the interop tests: other people's NBD clients and test suites against our server.

Usually called as `cargo xtask interop`, which builds the binary and names it in HIKKOSHI_BIN.
"""

import argparse
import os
import sys
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))


class Result(unittest.TestResult):
    """One line for each test, with its time, and the story of each failure at the end."""

    def __init__(self, last_name):
        super().__init__()
        self.width = last_name
        self.passed = 0

    def startTest(self, test):
        super().startTest(test)
        self.started = time.monotonic()
        self.subtest_failed = False

    def line(self, test, verdict):
        print(f"test {name_of(test):<{self.width}} {verdict} "
              f"({time.monotonic() - self.started:.1f} s)", flush=True)

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1
        self.line(test, "ok")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.line(test, "FAILED")

    def addError(self, test, error):
        super().addError(test, error)
        self.line(test, "FAILED")

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            self.line(subtest, "FAILED")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        print(f"test {name_of(test):<{self.width}} skipped: {reason}", flush=True)


def name_of(test):
    return test.id().removeprefix("test_")


def flatten(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flatten(test)
        else:
            yield test


def main():
    parser = argparse.ArgumentParser(prog="cargo xtask interop", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="only tests whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the tests, run none")
    parser.add_argument("--server", choices=["hikkoshi", "nbdkit", "qemu-nbd"],
                        default="hikkoshi", help="test a peer instead, to calibrate the tests")
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first failure")
    arguments = parser.parse_args()
    os.environ["HIKKOSHI_INTEROP_SERVER"] = arguments.server

    sys.path.insert(0, HERE)
    loader = unittest.TestLoader()
    tests = sorted(flatten(loader.discover(HERE, top_level_dir=HERE)), key=name_of)
    if loader.errors:
        print("\n".join(loader.errors))
        return 1
    if arguments.names:
        tests = [test for test in tests if any(name in name_of(test) for name in arguments.names)]
    if not tests:
        print("no test has a name like this; --list names them all")
        return 2
    if arguments.list:
        print("\n".join(name_of(test) for test in tests))
        return 0

    result = Result(max(len(name_of(test)) for test in tests))
    result.failfast = arguments.fail_fast
    started = time.monotonic()
    # A suite lets go of each test after it ran, and with it of the content of a disk.
    suite = unittest.TestSuite(tests)
    tests.clear()
    suite.run(result)
    for test, story in result.failures + result.errors:
        print(f"\n---- {name_of(test)} ----\n{story}")
    # A test can fail more than once (in parts, and again in its clean-up): it counts once.
    failed = {name_of(test).split(" ")[0] for test, _ in result.failures + result.errors}
    verdict = "FAILED" if failed else "ok"
    print(f"\ntest result: {verdict}. {result.passed} passed; {len(failed)} failed; "
          f"{len(result.skipped)} ignored; 0 measured; "
          f"finished in {time.monotonic() - started:.2f}s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
