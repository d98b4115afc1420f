"""Containers by the thousand, each made, run, used and removed; runs in the bed.

    cycles.py COUNT

Two lanes make a pod for each container, one of them with a network; two put theirs into a pod that stays.
"""

import collections
import json
import subprocess
import sys
import tempfile
import threading
import time

from growth import judge, sample

IMAGE = "localhost/sepal/busybox:latest"
RUNTIME = "io.containerd.sepal.v2"
LANES = 4
# Longest that a call may take, in seconds; of those here none waits for anything but Sepal.
PATIENCE = 120
# How many samples are taken.
SAMPLES = 20


def ctr(*words, check=True):
    """What ctr prints."""
    done = subprocess.run(["ctr", *words], capture_output=True, text=True, timeout=PATIENCE, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ctr {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def start(name, *options):
    """A container that sleeps."""
    ctr("run", "--detach", "--runtime", RUNTIME, *options, IMAGE, name, "sleep", "100000")


def remove(name):
    """Ends and removes a container."""
    ctr("task", "kill", "-s", "KILL", name)
    end = time.monotonic() + PATIENCE
    while subprocess.run(["ctr", "task", "rm", name], capture_output=True, timeout=PATIENCE, check=False).returncode:
        if time.monotonic() > end:
            raise RuntimeError(f"{name} does not end")
        time.sleep(0.02)
    ctr("container", "rm", name)


def cycle(name, options):
    """A container's whole life."""
    start(name, *options)
    said = ctr("task", "exec", "--exec-id", "exec", name, "echo", name)
    if said != name:
        raise RuntimeError(f"{name} said {said!r}")
    remove(name)


def ends(path):
    """How many times each process's end was told, with which status."""
    told = collections.Counter()
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if " /tasks/exit " in line:
                event = json.loads(line[line.index("{"):])
                told[event["container_id"], event["id"], event.get("exit_status", 0)] += 1
    return told


def main():
    count = int(sys.argv[1]) // LANES
    pods = ["soak-pod-2", "soak-pod-3"]
    for pod in pods:
        start(pod, "--annotation", "io.kubernetes.cri.container-type=sandbox")
    member = ["--annotation", "io.kubernetes.cri.container-type=container", "--annotation"]
    options = [[], ["--cni"], *(member + [f"io.kubernetes.cri.sandbox-id={pod}"] for pod in pods)]
    names = [[f"soak-{lane}-{number}" for number in range(count)] for lane in range(LANES)]
    samples, failures, every = [], [], max(count // SAMPLES, 1)
    begun = time.monotonic()

    def look():
        done = len(samples) * every * LANES
        samples.append((done, sample(pods)))
        rate = done / (time.monotonic() - begun)
        print(f"soak: {done} of {count * LANES} cycles, {rate:.1f} a second", flush=True)

    barrier = threading.Barrier(LANES, look)

    def lane(number):
        try:
            for index, name in enumerate(names[number]):
                if index % every == 0:
                    barrier.wait()
                cycle(name, options[number])
            barrier.wait()
        except threading.BrokenBarrierError:
            pass
        except Exception as error:  # whatever it is, the others need not go on
            failures.append(f"lane {number}: {error}")
            barrier.abort()

    with tempfile.NamedTemporaryFile() as log:
        listener = subprocess.Popen(["ctr", "events"], stdout=log)
        time.sleep(0.5)
        lanes = [threading.Thread(target=lane, args=(number,)) for number in range(LANES)]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
        time.sleep(2)
        listener.terminate()
        listener.wait()
        told = ends(log.name)
    for pod in pods:
        remove(pod)

    if not failures:
        expected = [(name, process, status) for lane in names for name in lane
                    for process, status in ((name, 137), ("exec", 0))]
        wrong = [f"{one[:2]}: told {told[one]} times" for one in expected if told[one] != 1]
        print(f"soak: {len(expected)} ends were to be told, {len(expected) - len(wrong)} were, each once")
        failures += wrong[:10] + judge(samples)
    for failure in failures:
        print(f"soak: {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
