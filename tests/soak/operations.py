"""CRI calls chosen by chance, which a model foretells; runs in the bed.

    operations.py BED SECONDS [SEED]

BED is the bed's directory.
Two lanes, each with pods of its own, among them calls that must be refused. Now and then a pod's VMM is
killed, or containerd is started again.
"""

import collections
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from growth import judge, pid_of, sample

IMAGE = "localhost/sepal/busybox:latest"
CRICTL = ["crictl", "--runtime-endpoint", "unix:///run/containerd/containerd.sock", "--timeout", "120s"]
LANES = 2
MOST_PODS, MOST_CONTAINERS = 3, 3
# Seconds within which containerd knows what has happened to a pod.
TRUTH = 15
# Between two looks at what has grown, when there is no pod; and how long the last one's traces may take.
ROUND, SETTLE = 120, 5
# The lanes wait here for each other.
RESTART = threading.Barrier(LANES)
CONTAINERD = Path(__file__).resolve().parent.parent / "native" / "containerd"
# A container's own end, in seconds after its start, and its status.
SHORT, SHORT_STATUS = 2, 3
# How many seconds later than that it may come, and be known, on a machine with much to do.
LAG = 10
# Of a shell that had not come to its trap.
UNHANDLED = 143


class Wrong(Exception):
    """Something is not as the model says."""


def crictl(*words):
    """Whether the call went well, and what it printed."""
    done = subprocess.run([*CRICTL, *words], capture_output=True, text=True, timeout=300, check=False)
    return done.returncode == 0, (done.stdout if done.returncode == 0 else done.stderr).strip()


def must(*words):
    """What a call printed that has to go well."""
    well, said = crictl(*words)
    if not well:
        raise Wrong(f"crictl {' '.join(words)}: {said}")
    return said


def must_not(*words):
    """A call that has to be refused."""
    well, said = crictl(*words)
    if well:
        raise Wrong(f"crictl {' '.join(words)} went well: {said}")


class Container:
    """One container as it should be."""

    def __init__(self, name, short):
        self.name, self.short = name, short
        self.state, self.statuses, self.ends = "CREATED", (), None

    def settle(self):
        """A short one ends by itself."""
        if self.ends and time.monotonic() > self.ends + LAG:
            self.end(SHORT_STATUS)

    def end(self, *statuses):
        """It has ended with one of these; without any nobody can know how."""
        self.state, self.statuses, self.ends = "EXITED", statuses, None

    def is_sure(self):
        """Whether it is far enough from its own end for its state to be foretold."""
        return not self.ends or self.ends - time.monotonic() > 1


class Lane:
    """Pods of one lane, and what is done to them."""

    def __init__(self, number, seed, folder):
        self.chance = random.Random(f"{seed}-{number}")
        self.label, self.folder = f"lane={number}", folder
        self.prefix, self.serial = f"lane{number}", 0
        self.pods, self.done, self.refused = {}, {}, 0
        # What was called last, for whoever looks for what went wrong.
        self.history = collections.deque(maxlen=40)

    def describe(self, name, content):
        """A file of this name with a description."""
        path = Path(self.folder) / f"{name}.json"
        path.write_text(json.dumps(content))
        return str(path)

    def new_name(self):
        """One that nothing had before."""
        self.serial += 1
        return f"{self.prefix}-{self.serial}"

    def description(self, name):
        """A pod's."""
        key, value = self.label.split("=")
        return {"metadata": {"name": name, "uid": name, "namespace": "soak", "attempt": 0},
                "labels": {key: value}, "log_directory": self.folder,
                # Without it containerd has no statistics of a pod.
                "linux": {"cgroup_parent": "/soak"}}

    # Each of these is one call and what follows from it.

    def run_pod(self):
        if len(self.pods) >= MOST_PODS:
            return False
        name = self.new_name()
        pod = must("runp", "--runtime", "sepal", self.describe(name, self.description(name)))
        self.pods[pod] = {"name": name, "ready": True, "containers": {}}
        return True

    def create(self):
        pod = self.any_pod(lambda pod: len(pod["containers"]) < MOST_CONTAINERS)
        if not pod:
            return False
        of, short = self.pods[pod], self.chance.random() < 0.3
        name = self.new_name()
        command = f"sleep {SHORT}; exit {SHORT_STATUS}" if short else "trap 'exit 0' TERM; while :; do sleep 0.1; done"
        key, value = self.label.split("=")
        container = self.describe(name, {"metadata": {"name": name}, "image": {"image": IMAGE},
                                         "labels": {key: value}, "command": ["sh", "-c", command],
                                         "log_path": f"{name}.log", "linux": {}})
        words = ("create", pod, container, self.describe(f"{name}-pod", self.description(of["name"])))
        if of["ready"]:
            of["containers"][must(*words)] = Container(name, short)
            return True
        # As long as containerd has a task of the pod's it may make a note of a container, which never runs.
        well, said = crictl(*words)
        if well:
            of["containers"][said] = Container(name, short)
        self.refused += not well
        return True

    def start(self):
        name, container, pod = self.any_container()
        if not name:
            return False
        if container.state != "CREATED" or not pod["ready"]:
            must_not("start", name)
            self.refused += 1
            if container.state == "CREATED":
                # containerd's word for one that could not be started.
                container.end(128)
            return True
        must("start", name)
        container.state = "RUNNING"
        container.ends = time.monotonic() + SHORT if container.short else None
        return True

    def execute(self):
        name, container, _ = self.any_container()
        if not name or not container.is_sure():
            return False
        if container.state == "RUNNING":
            said = must("exec", "--sync", name, "echo", container.name)
            if said != container.name:
                raise Wrong(f"exec in {name} said {said!r}")
        else:
            must_not("exec", "--sync", name, "true")
            self.refused += 1
        return True

    def stop(self):
        name, container, _ = self.any_container()
        if not name or not container.is_sure():
            return False
        must("stop", "--timeout", "10", name)
        if container.state == "RUNNING":
            # The short one's shell does not hear of the signal before its child has ended.
            container.end(*() if container.short else (0, UNHANDLED))
        return True

    def remove(self):
        name, container, pod = self.any_container()
        if not name or not container.is_sure():
            return False
        if container.state == "RUNNING":
            must_not("rm", name)
            self.refused += 1
            return True
        must("rm", name)
        del pod["containers"][name]
        return True

    def stop_pod(self):
        pod = self.any_pod()
        if not pod:
            return False
        must("stopp", pod)
        self.has_ended(pod)
        return True

    def remove_pod(self):
        pod = self.any_pod()
        if not pod:
            return False
        must("rmp", "--force", pod)
        del self.pods[pod]
        return True

    def stats(self):
        must("stats", "--output", "json", "--label", self.label)
        must("statsp", "--output", "json", "--label", self.label)
        return True

    def kill_vmm(self):
        pod = self.any_pod(lambda pod: pod["ready"])
        if not pod or self.chance.random() > 0.2:
            return False
        pid = pid_of("sepal-vmm", pod)
        if pid is None:
            raise Wrong(f"{pod} is ready, and has no VMM")
        subprocess.run(["kill", "-9", str(pid)], check=True)
        self.has_ended(pod)
        return True

    def has_ended(self, pod):
        """What runs in a pod has ended. What was not started yet is nothing but containerd's note of it."""
        self.pods[pod]["ready"] = False
        for container in self.pods[pod]["containers"].values():
            container.settle()
            if container.state == "RUNNING":
                container.end()

    def note(self, what):
        """Writes down what is done, and when."""
        self.history.append(f"{time.strftime('%X')} {what}")

    def any_pod(self, which=lambda pod: True):
        """One of those that the model has."""
        some = [name for name, pod in self.pods.items() if which(pod)]
        name = self.chance.choice(some) if some else None
        self.note(f"  {name}")
        return name

    def any_container(self):
        """One of those that the model has, with its pod."""
        some = [(name, container, pod) for pod in self.pods.values() for name, container in pod["containers"].items()]
        if not some:
            return None, None, None
        name, container, pod = self.chance.choice(some)
        self.note(f"  {name} {container.state}")
        container.settle()
        return name, container, pod

    def step(self):
        """One call, and a look at everything."""
        calls = [self.run_pod, self.create, self.create, self.start, self.start, self.execute, self.execute,
                 self.stop, self.remove, self.stop_pod, self.remove_pod, self.stats, self.kill_vmm]
        call = self.chance.choice(calls)
        self.note(call.__name__)
        if call():
            self.done[call.__name__] = self.done.get(call.__name__, 0) + 1
            self.look()

    def look(self):
        """What containerd says against the model, given some time."""
        end = time.monotonic() + TRUTH
        while difference := self.difference():
            if time.monotonic() > end:
                raise Wrong(difference)
            time.sleep(0.2)

    def difference(self):
        """What is not as it should be."""
        pods = json.loads(must("pods", "--output", "json", "--label", self.label))["items"]
        is_ready = {pod["id"]: pod["state"] == "SANDBOX_READY" for pod in pods}
        should = {name: pod["ready"] for name, pod in self.pods.items()}
        if is_ready != should:
            return f"pods that are ready: {is_ready}, and should be: {should}"
        listed = json.loads(must("ps", "--all", "--output", "json", "--label", self.label))["containers"] or []
        states = {one["id"]: one["state"].removeprefix("CONTAINER_") for one in listed}
        for pod in self.pods.values():
            for name, container in pod["containers"].items():
                container.settle()
                state = states.pop(name, "GONE")
                if state != container.state and (container.is_sure() or state != "EXITED"):
                    return f"{name} is {state}, and should be {container.state}"
                if state == "EXITED" and container.statuses:
                    told = json.loads(must("inspect", name))["status"]["exitCode"]
                    if told not in container.statuses:
                        return f"{name} has exited {told}, and not {container.statuses}"
        return f"nobody made {states}" if states else None

    def end(self):
        """Removes all."""
        for pod in list(self.pods):
            must("rmp", "--force", pod)
            del self.pods[pod]


def work(lane, until, failures):
    """Calls until it is time, or until something is wrong anywhere; then all is removed."""
    try:
        while time.monotonic() < until and not failures:
            lane.step()
        lane.look()
        # Half of the time containerd is started again with what there is.
        if RESTART.wait() == 0 and not failures and lane.chance.random() < 0.5:
            lane.note("containerd is started again")
            subprocess.run([CONTAINERD, sys.argv[1], "restart"], check=True)
        RESTART.wait()
        lane.look()
        lane.end()
    except threading.BrokenBarrierError:
        pass
    except Exception as error:  # whatever it is, the others need not go on
        failures.append("\n  ".join([f"{lane.label}: {error}", *lane.history]))
        RESTART.abort()


def main():
    seconds = float(sys.argv[2])
    seed = sys.argv[3] if len(sys.argv) > 3 else str(random.randrange(1 << 32))
    print(f"soak: seed {seed}", flush=True)
    failures, samples = [], []
    with tempfile.TemporaryDirectory() as folder:
        lanes = [Lane(number, seed, folder) for number in range(LANES)]
        end = time.monotonic() + seconds
        while time.monotonic() < end and not failures:
            until = min(end, time.monotonic() + ROUND)
            threads = [threading.Thread(target=work, args=(lane, until, failures)) for lane in lanes]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            calls = sum(sum(lane.done.values()) for lane in lanes)
            print(f"soak: {calls} calls as foretold, {sum(lane.refused for lane in lanes)} of them refused", flush=True)
            time.sleep(SETTLE)
            samples.append((calls, sample([])))
    for name in sorted({name for lane in lanes for name in lane.done}):
        print(f"soak: {name}: {sum(lane.done.get(name, 0) for lane in lanes)}")
    if not failures:
        failures += judge(samples)
    for failure in failures:
        print(f"soak: {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
