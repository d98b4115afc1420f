"""What a long run looks at now and then, and whether it grows."""

import os
import subprocess
from pathlib import Path

# What each program's own memory may grow by in a thousand cycles, in KiB: an allocator's noise.
ALLOWED = {"containerd": 6144, "containerd-shim-sepal-v2": 256, "sepal-fs": 128, "sepal-vmm": 128}


def pid_of(program, word=""):
    """The oldest process of a program whose command line has the word in it."""
    found = subprocess.run(["pgrep", "-o", "-f", f"{program} .*{word}"], capture_output=True, text=True, check=False)
    return int(found.stdout.split()[0]) if found.returncode == 0 else None


def status(pid, field):
    """A number of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise ValueError(f"no {field} of {pid}")


def entries(path):
    """How many names a directory has; none when it is not there."""
    try:
        return len(os.listdir(path))
    except FileNotFoundError:
        return 0


def sample(pods):
    """Figures by their names, while nothing is on its way. `pods` live through the whole run."""
    containerd = int(Path("/run/containerd.pid").read_text())
    figures = {
        "processes": sum(name.isdigit() for name in os.listdir("/proc")),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "cgroups": sum(1 for _ in os.walk("/sys/fs/cgroup")),
        "network namespaces": entries("/run/netns"),
        "pods' directories": entries("/run/sepal"),
        "shims' sockets": entries("/run/containerd/s"),
        "containerd descriptors": entries(f"/proc/{containerd}/fd"),
        "containerd KiB": status(containerd, "RssAnon"),
    }
    for pod in pods:
        for program in ("containerd-shim-sepal-v2", "sepal-vmm", "sepal-fs"):
            pid = pid_of(program, pod)
            figures[f"{program} of {pod} descriptors"] = entries(f"/proc/{pid}/fd")
            # Not what it sees of the guest's memory, which has a limit and is used up to it.
            figures[f"{program} of {pod} KiB"] = status(pid, "RssAnon")
    return figures


def slope(points):
    """Of the straight line nearest to (x, y) pairs."""
    count = len(points)
    mean_x, mean_y = (sum(p[i] for p in points) / count for i in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def judge(samples):
    """Prints what `(cycles, figures)` pairs tell, and answers with what has grown. The first third is
    warming up."""
    settled = samples[len(samples) // 3:]
    grown = []
    print(f"{'':52} {'first':>9} {'last':>9} {'per 1000':>9}")
    for name in sorted(settled[0][1]):
        points = [(cycles, figures[name]) for cycles, figures in settled]
        per_thousand = slope(points) * 1000
        print(f"{name:52} {samples[0][1][name]:9} {points[-1][1]:9} {per_thousand:9.1f}")
        allowed = ALLOWED.get(name.split()[0], 0) if name.endswith("KiB") else 0
        if name == "containerd descriptors":
            # Its own connections come and go; one per cycle would not.
            allowed = 10
        if per_thousand > allowed and points[-1][1] > points[0][1]:
            grown.append(f"{name}: {points[0][1]} to {points[-1][1]}")
    return grown
