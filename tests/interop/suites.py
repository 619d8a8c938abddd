"""Fetches and builds other projects' test suites from Debian's source packages.

Everything lands below target/interop and is built once. The system's package sources are read,
never changed: the lists of source packages live in a directory of our own.
"""

import glob
import os
import shutil
import subprocess

# Where a package's sources are looked for: this machine's release first. A mirror may have
# dropped the sources of one release and keep those of another.
RELEASES = ["", "trixie", "bookworm", "sid"]


def directory():
    """Where sources are kept and built."""
    path = os.environ.get("HIKKOSHI_INTEROP_DIR")
    if not path:
        raise AssertionError("HIKKOSHI_INTEROP_DIR is not set: run `cargo xtask interop`")
    os.makedirs(path, exist_ok=True)
    return path


def step(command, cwd, log, env=None):
    """Runs one step of a build; its output goes to a log, whose end is shown when it fails."""
    log_path = os.path.join(directory(), log)
    with open(log_path, "ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        status = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=file,
                                stderr=file, env=env, timeout=1200).returncode
    if status != 0:
        with open(log_path, errors="replace") as file:
            raise AssertionError(f"{' '.join(command)} failed:\n{file.read()[-3000:]}")


def apt_options(release):
    """Options that make apt use a directory of ours, and the sources of one release."""
    base = os.path.join(directory(), "apt", release or "own")
    for part in ["lists/partial", "cache/archives/partial"]:
        os.makedirs(os.path.join(base, part), exist_ok=True)
    # What this machine installs its packages from tells where their sources are.
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(SIGNED_BY)",
         "Created-By: Packages"], capture_output=True, text=True, check=True).stdout
    lines = set()
    for target in targets.splitlines():
        uri, own_release, component, *signed = target.split()
        if component != "main" or not os.path.basename(uri.rstrip("/")).startswith("debian"):
            continue
        if release and uri.rstrip("/").endswith("-security"):
            continue
        key = f" [signed-by={signed[0]}]" if signed and signed[0].startswith("/") else ""
        lines.add(f"deb-src{key} {uri} {release or own_release} main\n")
    sources = os.path.join(base, "sources.list")
    with open(sources, "w") as file:
        file.writelines(sorted(lines))
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": os.path.join(base, "lists"),
        "Dir::Cache": os.path.join(base, "cache"),
        # Our directory may be one that apt's own user cannot enter.
        "APT::Sandbox::User": "root",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def source(package):
    """The unpacked sources of a Debian package, fetched when they are not there yet."""
    log, refusals = f"fetch-{package}.log", []
    for release in RELEASES:
        place = os.path.join(directory(), "sources", package)
        done = glob.glob(os.path.join(place, f"{package}-*", "debian"))
        if done:
            return os.path.dirname(done[0])
        shutil.rmtree(place, ignore_errors=True)
        os.makedirs(place)
        try:
            options = apt_options(release)
            step(["apt-get", *options, "update"], place, log)
            step(["apt-get", *options, "source", package], place, log)
        except AssertionError as error:
            refusals.append(str(error))
    done = glob.glob(os.path.join(place, f"{package}-*", "debian"))
    if done:
        return os.path.dirname(done[0])
    raise AssertionError(f"the sources of {package} cannot be had:\n" + "\n".join(refusals))


LIBNBD_OPTIONS = ["--without-gnutls", "--without-libxml2", "--disable-fuse", "--disable-ublk",
                  "--disable-ocaml", "--disable-python", "--disable-golang", "--disable-rust",
                  "--disable-shared"]


def libnbd(qemu_nbd):
    """libnbd, configured to take `qemu_nbd` for qemu-nbd, with what our tests use built."""
    top = source("libnbd")
    stamp = os.path.join(top, "hikkoshi-built")
    if os.path.exists(stamp):
        with open(stamp) as file:
            if file.read() == qemu_nbd:
                return top
    log = "build-libnbd.log"
    # Tests name the server at configuration time.
    step(["./configure", *LIBNBD_OPTIONS, f"QEMU_NBD={qemu_nbd}"], top, log)
    step(["make", "clean"], os.path.join(top, "interop"), log)
    for part, goals in [("common/utils", []), ("lib", []),
                        ("tests", ["aio-parallel", "aio-parallel-load", "synch-parallel"]),
                        ("examples", ["strict-structured-reads", "threaded-reads-and-writes",
                                      "batched-read-write"]),
                        ("interop", ["requires.c", "interop-qemu-nbd",
                                     "socket-activation-qemu-nbd"])]:
        step(["make", "-j2", *goals], os.path.join(top, part), log)
    with open(stamp, "w") as file:
        file.write(qemu_nbd)
    return top


# The little that nbd-tester-client needs of what configure finds out. configure itself asks for
# bison, flex and a documentation tool chain, none of which this program uses.
NBD_CONFIG = """\
#define PACKAGE_VERSION "tests"
#define HAVE_FDATASYNC 1
#define HAVE_SYNC_FILE_RANGE 1
#define HAVE_MKSTEMP 1
#define SIZEOF_UNSIGNED_SHORT_INT __SIZEOF_SHORT__
#define SIZEOF_UNSIGNED_INT __SIZEOF_INT__
#define SIZEOF_UNSIGNED_LONG_INT __SIZEOF_LONG__
#define SIZEOF_UNSIGNED_LONG_LONG_INT __SIZEOF_LONG_LONG__
"""


def nbd_tester_client():
    """The tester of the nbd project, and the directory of its transaction logs."""
    top = source("nbd")
    logs = os.path.join(top, "tests", "run")
    tester = os.path.join(top, "hikkoshi-tester")
    if not os.path.exists(tester):
        config = os.path.join(top, "hikkoshi-config")
        os.makedirs(config, exist_ok=True)
        with open(os.path.join(config, "config.h"), "w") as file:
            file.write(NBD_CONFIG)
        flags = subprocess.run(["pkg-config", "--cflags", "--libs", "glib-2.0"],
                               capture_output=True, text=True, check=True).stdout.split()
        step(["gcc", "-w", "-O1", f"-I{config}", "-I.", "-o", tester + ".new",
              "tests/run/nbd-tester-client.c", "cliserv.c", *flags], top, "build-nbd.log")
        os.rename(tester + ".new", tester)
    return tester, logs
