"""The bed that is measured in, and the figures that come of it."""

import itertools
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
# What the two are called: containerd's name of the runtime, and the handler in CRI's configuration.
RUNTIMES = {"runc": "io.containerd.runc.v2", "sepal": "io.containerd.sepal.v2"}
# Each runtime's own processes, by their command lines.
PROGRAMS = {"runc": "containerd-shim-runc-v2", "sepal": "containerd-shim-sepal-v2|sepal-vmm|sepal-fs"}
BUSYBOX = "localhost/sepal/busybox:latest"
PYTHON = "localhost/sepal/python:latest"
SERIAL = itertools.count()

# Takes what comes on a port; says how much came in which time, or sends each byte back at once.
SERVER = """
import socket, sys, time
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", 5001)); s.listen(1); print("listening", flush=True)
while True:
    c, _ = s.accept(); c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    echo = c.recv(1) == b"e"; total = 0; begun = time.monotonic()
    while data := c.recv(1 << 18):
        if echo: c.sendall(data)
        total += len(data)
    if not echo: print("gbit", total * 8 / (time.monotonic() - begun) / 1e9, flush=True)
"""
# Sends to it for five seconds.
SOURCE = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], 5001)); s.sendall(b"s")
block = bytes(1 << 18); end = time.monotonic() + 5
while time.monotonic() < end: s.sendall(block)
"""
# The median of a byte's way there and back, in microseconds.
PING = """
import socket, statistics, sys, time
s = socket.create_connection((sys.argv[1], 5001)); s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
s.sendall(b"e"); times = []
for _ in range(5000):
    begun = time.perf_counter(); s.sendall(b"x"); s.recv(1); times.append(time.perf_counter() - begun)
print(statistics.median(times) * 1e6)
"""


class Bed:
    """A bed of its own, `native` or `node`, between `with` and its end."""

    def __init__(self, kind):
        self.kind = kind
        self.control = {"native": TESTS / "native" / "bed", "node": TESTS / "node" / "node"}[kind]
        # Not emulated: it can be given much to do.
        self.fast = kind == "native"

    def __enter__(self):
        os.environ.update(SEPAL_BED_NAME=os.environ.get("SEPAL_BED_NAME", "bench"), SEPAL_NODE_NAME="bench", SEPAL_NODE_ICOUNT="1")
        for setup in (("tools", "fetch"), ("images", "build")):
            subprocess.run([TESTS.joinpath(*setup)], check=True)
        subprocess.run([self.control, "up"], check=True)
        try:
            for image in ("busybox", "python"):
                subprocess.run([self.control, "image", image], check=True, stdout=subprocess.DEVNULL)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        subprocess.run([self.control, "down"], check=True)

    def __call__(self, *command, given=None, timeout=1800):
        """Runs a command in the bed, with `given` as its input, and gives what it printed."""
        done = subprocess.run([self.control, "exec", "--", *command], text=True, capture_output=True,
                              input=given, stdin=None if given else subprocess.DEVNULL,
                              timeout=timeout, check=False)
        if done.returncode:
            raise SystemExit(f"bench: {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def timed(self, script):
        """Seconds that a shell script takes, by the bed's own clock."""
        out = self("sh", "-ec", f"begun=$(date +%s%N); {script}; echo $(($(date +%s%N) - begun))")
        return int(out.split()[-1]) / 1e9

    def pss(self, kind, count):
        """PSS in MiB per pod of the runtime's processes, of which `count` pods run. containerd is left
        out, and so is what the users' own processes take on runc."""
        self("sleep", "5")
        sizes = self("sh", "-c", f"for p in $(pgrep -f '{PROGRAMS[kind]}'); do cat /proc/$p/smaps_rollup; done")
        return sum(int(size) for size in re.findall(r"^Pss:\s+(\d+) kB", sizes, re.M)) / 1024 / count

    def on_host(self, program, *arguments):
        """What a Python program prints that runs beside the pods. The bed may have no Python itself."""
        return self("nerdctl", "run", "--rm", "--network", "host", "--runtime", RUNTIMES["runc"], PYTHON,
                    "python3", "-c", program, *arguments)


def rounds(measure, runs, warm=0):
    """What `measure(kind)` gives in each of `runs` rounds, in which the runtimes take turns. The first
    `warm` rounds do not count."""
    return [{kind: measure(kind) for kind in RUNTIMES} for _ in range(warm + runs)][warm:]


class Figures(dict):
    """Rows by their names; each is told when it is there."""

    def __setitem__(self, name, row):
        super().__setitem__(name, row)
        told = ", ".join(f"{kind} {value:.2f}" for kind, value in row.items())
        print(f"bench: {name}: {told}", file=sys.stderr, flush=True)

    def medians(self, name, rounds):
        """A row of the medians of what `rounds` gave."""
        self[name] = {kind: statistics.median(one[kind] for one in rounds) for kind in RUNTIMES}

    def print(self):
        """The table, with the ratio where both have a figure."""
        print(f"{'':38} {'runc':>10} {'sepal':>10} {'ratio':>7}")
        for name, row in self.items():
            ratio = f"{row['sepal'] / row['runc']:7.2f}" if row.get("runc") else ""
            runc = f"{row['runc']:10.2f}" if "runc" in row else f"{'':10}"
            print(f"{name:38} {runc} {row['sepal']:10.2f} {ratio}")
