"""What a pod that uses all it can of one thing does to its neighbour's answers."""

import statistics

from bed import BUSYBOX, PYTHON, RUNTIMES

# Each is limited as pods of strangers are: one CPU, 256 MiB.
LIMITS = {"cpu_period": 100000, "cpu_quota": 100000, "memory_limit_in_bytes": 256 << 20}
# Which CPU that is: any, or one of its own, as the kubelet's static CPU manager gives. Who has the time of one CPU
# may be on several at once (a vCPU, and a file server that works for it), and then its neighbours wait for the
# host's scheduler.
ABUSER, NEIGHBOUR = "0", "1"
# Sends each byte back at once.
ECHO = """
import socket
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", 5001)); s.listen(8); print("listening", flush=True)
while True:
    c, _ = s.accept(); c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := c.recv(1 << 12): c.sendall(data)
"""
# The 99th of a hundred answers to a byte, in microseconds: 400 a second, for ten seconds.
ASK = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], 5001)); s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
for _ in range(4000):
    begun = time.perf_counter(); s.sendall(b"x"); s.recv(1); times.append(time.perf_counter() - begun)
    time.sleep(0.0025)
times.sort(); print(times[len(times) * 99 // 100] * 1e6)
"""
ABUSES = {
    "nothing": "sleep 100000",
    "CPU": "for n in 1 2 3 4; do while :; do :; done & done; wait",
    "memory": "while :; do tail -c 400m /dev/zero >/dev/null; done",
    "processes": "bomb() { bomb | bomb & }; bomb; sleep 100000",
    "disk": "while :; do dd if=/dev/zero of=/volume/fill bs=1M count=256 2>/dev/null; rm /volume/fill; done",
    "a full volume": "while :; do dd if=/dev/zero of=/small/fill bs=64k 2>/dev/null; done",
    "files": "n=0; while :; do n=$((n+1)); mkdir /volume/$n; for f in 0 1 2 3 4 5 6 7 8 9; do : >/volume/$n/$f; done; done",
    "log": "while :; do cat /etc/services /proc/cpuinfo; done",
}
# How long an abuse goes on before its neighbour is asked, in seconds; how often each is tried; what it must have
# had of a processor while its neighbour was asked, in seconds, to have been one.
WARM = "3"
ROUNDS = 3
BUSY = 0.2
VOLUMES = "/tmp/sepal-bench/volume", "/tmp/sepal-bench/small"
# Made before and removed after: in the second there is no more room than that.
PREPARE = f"mkdir -p {' '.join(VOLUMES)}; mount -t tmpfs -o size=32m small {VOLUMES[1]}"


def limits(own):
    """The limits of a pod by its CPU, which is its own or any."""
    return {cpu: {**LIMITS, "cpuset_cpus": cpu} if own else LIMITS for cpu in (ABUSER, NEIGHBOUR)}


def beside(bed, pods, kind, on):
    """Microseconds within which 99 of 100 answers of a neighbour come beside each abuse: the median of some rounds.
    `on` are the limits of a pod by its CPU."""
    bed("sh", "-ec", PREPARE)
    mounts = [{"container_path": f"/{path.rsplit('/', 1)[1]}", "host_path": path} for path in VOLUMES]
    neighbour, sink, _, _ = pods.start(kind, PYTHON, "python3", "-u", "-c", ECHO, limits=on[NEIGHBOUR])
    address = pods.address(neighbour)
    pods.until_said(sink, "listening")
    times = {name: [] for name in ABUSES}
    for _ in range(ROUNDS):
        for name, line in ABUSES.items():
            abuser, container, _, _ = pods.start(kind, BUSYBOX, "sh", "-c", line, limits=on[ABUSER], mounts=mounts)
            bed("sleep", WARM)
            before = pods.cpu(container)
            times[name].append(float(bed.on_host(ASK, address)))
            had = pods.cpu(container) - before
            if name != "nothing" and had < BUSY:
                raise SystemExit(f"bench: who was to use up {name} on {kind} has used {had:.2f} s of a processor")
            pods.remove(abuser)
            bed("sh", "-c", f"rm -rf {' '.join(f'{path}/*' for path in VOLUMES)}")
    pods.remove(neighbour)
    bed("umount", VOLUMES[1])
    return {name: statistics.median(all) for name, all in times.items()}


def measure(bed, figures, pods):
    """Adds the figures: microseconds within which 99 of 100 answers of a neighbour come."""
    for where, own in (("any CPU", False), ("CPUs of their own", True)):
        times = {kind: beside(bed, pods, kind, limits(own)) for kind in RUNTIMES}
        for name in ABUSES:
            figures[f"{where}: p99 beside a pod that uses up {name}, us"] = {kind: times[kind][name] for kind in RUNTIMES}
        for name in list(ABUSES)[1:]:
            figures[f"{where}: by what {name} makes it longer"] = {
                kind: times[kind][name] / times[kind]["nothing"] for kind in RUNTIMES}
