"""Containers by containerd's own clients: how they start, what they take, what their files cost."""

import json
import statistics

from bed import BUSYBOX, PYTHON, RUNTIMES, SERIAL, SERVER, SOURCE, rounds

# Creates, looks at and removes many files, then writes and reads one large one; seconds each.
FILES = """
import os, time
def timed(name, work):
    begun = time.monotonic(); work(); print(name, time.monotonic() - begun)
os.mkdir("/bench"); names = ["/bench/%d" % i for i in range(10000)]
def create():
    for n in names: open(n, "w").close()
def stat():
    for n in names: os.stat(n)
def unlink():
    for n in names: os.unlink(n)
block = bytes(1 << 20)
def write():
    with open("/bench/large", "wb", 0) as f:
        for _ in range(256): f.write(block)
        os.fsync(f.fileno())
def read():
    with open("/bench/large", "rb", 0) as f:
        while f.read(1 << 20): pass
def random_read():
    import random
    f = os.open("/bench/large", os.O_RDONLY)
    for _ in range(10000): os.pread(f, 4096, random.randrange(256 << 8) << 12)
timed("create_10k", create); timed("stat_10k", stat); timed("unlink_10k", unlink)
timed("write_256M", write); timed("read_256M", read); timed("random_read_4k_10k", random_read)
"""


def measure(bed, figures, runs):
    """Adds the figures; returns the stages of a start, median milliseconds by name."""
    figures.medians("ctr run --rm true, ms", rounds(lambda kind: at_once(bed, kind, 1) * 1000, runs, warm=1))
    figures.medians("20 at once, s", rounds(lambda kind: at_once(bed, kind, 20), 3 if bed.fast else 1))
    timelines = [idle(bed, "sepal", 1, weigh=False)[1][0] for _ in range(runs)]
    figures["VMM start to agent, ms"] = {"sepal": statistics.median(map(boot_ms, timelines))}
    for count in (1, 10):
        figures[f"idle container of {count}, MiB PSS"] = {k: idle(bed, k, count)[0] for k in RUNTIMES}
    both = {kind: files(bed, kind) for kind in RUNTIMES}
    for name, value in both["runc"].items():
        figures[f"files: {name}, s"] = {"runc": value, "sepal": both["sepal"][name]}
    figures["TCP host to container, Gbit/s"] = {kind: tcp(bed, kind) for kind in RUNTIMES}
    return stage_table(timelines)


def at_once(bed, kind, count):
    """Seconds until `count` containers started at once have ended."""
    runs = [f"ctr run --rm --runtime {RUNTIMES[kind]} {BUSYBOX} {kind}-{next(SERIAL)} true" for _ in range(count)]
    return bed.timed(runs[0] if count == 1 else "".join(f"{run} & " for run in runs) + "wait")


def idle(bed, kind, count, weigh=True):
    """PSS in MiB per container of `count` idle ones, and the timelines of their starts."""
    names = [f"idle-{kind}-{number}" for number in range(count)]
    for name in names:
        bed("ctr", "run", "-d", "--runtime", RUNTIMES[kind], BUSYBOX, name, "sleep", "600")
    pss = bed.pss(kind, count) if weigh else None
    stages = []
    for name in names:
        if kind == "sepal":
            stages.append(json.loads(bed("sh", "-c", f"cat /run/sepal/*{name}/timeline.json")))
        bed("ctr", "task", "kill", "-s", "KILL", name)
        bed("sh", "-c", f"until ctr task rm {name} 2>/dev/null; do sleep 0.1; done; ctr container rm {name}")
    return pss, stages


def stage_table(timelines):
    """Median milliseconds since the VMM was spawned, stage by stage."""
    rows = {}
    for stages in timelines:
        zero = next(stage["us"] for stage in stages if stage["name"] == "vmm-spawned")
        for stage in stages:
            # The guest's clock began with the guest.
            since = 0 if stage["name"].startswith("guest:") else zero
            rows.setdefault(stage["name"], []).append((stage["us"] - since) / 1000)
    return {name: statistics.median(times) for name, times in rows.items()}


def boot_ms(stages):
    """VMM start to the agent's answer, in milliseconds."""
    at = {stage["name"]: stage["us"] for stage in stages}
    return (at["agent-ready"] - at["vmm-spawned"]) / 1000


def files(bed, kind):
    """Seconds by the name of what was done with files."""
    out = bed("ctr", "run", "--rm", "--runtime", RUNTIMES[kind], PYTHON,
              f"files-{kind}", "python3", "-c", FILES)
    return {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}


def tcp(bed, kind):
    """Host to container, Gbit/s."""
    name = f"tcp-{kind}"
    bed("nerdctl", "run", "-d", "--name", name, "--runtime", RUNTIMES[kind],
        PYTHON, "python3", "-u", "-c", SERVER)
    address = bed("nerdctl", "inspect", "-f", "{{.NetworkSettings.IPAddress}}", name).strip()
    bed("sh", "-c", f"until nerdctl logs {name} 2>/dev/null | grep -q listening; do sleep 0.2; done")
    bed.on_host(SOURCE, address)
    out = bed("sh", "-c", f"until nerdctl logs {name} | grep gbit; do sleep 0.2; done")
    bed("nerdctl", "rm", "-f", name)
    return float(out.split()[1])
