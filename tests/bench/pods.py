"""Pods by CRI, as a kubelet has them made: how they start, what they take, how they talk."""

import base64
import io
import json
import subprocess
import tarfile
from pathlib import Path

from bed import BUSYBOX, PING, PYTHON, RUNTIMES, SERIAL, SERVER, SOURCE, TESTS, rounds

PAUSE = "registry.k8s.io/pause:3.10"
# A kubelet waits longer than crictl would.
CRICTL = "crictl --runtime-endpoint unix:///run/containerd/containerd.sock --timeout 600s"
# Where the pods' descriptions and the pause image are put in the bed.
FOLDER = "/tmp/sepal-bench"
# $1: handler, $2: the pod's description, $3: the container's. Prints both names and how many
# nanoseconds each took to be there.
START = f"""
begun=$(date +%s%N); pod=$({CRICTL} runp --runtime "$1" "$2")
ready=$(date +%s%N); container=$({CRICTL} create "$pod" "$3" "$2"); {CRICTL} start "$container" >&2
echo "$pod $container $((ready - begun)) $(($(date +%s%N) - ready))"
"""
# $1: pods. What crictl says to each is not wanted, but whether it could.
REMOVE = f"""all=; for pod; do {{ {CRICTL} stopp "$pod" && {CRICTL} rmp "$pod"; }} >/dev/null & all="$all $!"; done
for one in $all; do wait $one || exit 1; done"""


class Pods:
    """What is measured of pods in a bed, whose images for CRI it brings."""

    def __init__(self, bed):
        self.bed = bed
        bed("mkdir", "-p", FOLDER)
        for image in (BUSYBOX, PYTHON):
            # CRI has images of its own.
            bed("sh", "-ec", f"ctr image export {FOLDER}/image {image}; ctr -n k8s.io image import {FOLDER}/image")
        layout = subprocess.run([TESTS / "cri" / "images"], check=True, stdout=subprocess.PIPE, text=True)
        archive = pause_image(Path(layout.stdout.split()[-1]))
        bed("sh", "-ec", f"base64 -d >{FOLDER}/image; ctr -n k8s.io image import {FOLDER}/image", given=archive)

    def describe(self, name, content):
        """Puts a description in the bed and gives its path."""
        path = f"{FOLDER}/{name}.json"
        self.bed("sh", "-c", f"cat >{path}", given=json.dumps(content))
        return path

    def pod(self, image, *command, limits=None, mounts=()):
        """The paths of the descriptions of a new pod and its container. `limits` are CRI's
        LinuxContainerResources, `mounts` its Mount."""
        name = f"pod-{next(SERIAL)}"
        resources = limits or {}
        pod = {"metadata": {"name": name, "uid": name, "namespace": "bench", "attempt": 0},
               "log_directory": FOLDER, "linux": {"resources": resources}}
        container = {"metadata": {"name": "main"}, "image": {"image": image}, "command": list(command),
                     "log_path": f"{name}.log", "linux": {"resources": resources}, "mounts": list(mounts)}
        return self.describe(name, pod), self.describe(f"{name}-main", container)

    def start(self, kind, image, *command, **more):
        """A new pod: its name and its container's, seconds until it was ready and, from then, until
        the container ran."""
        pod, container, ready, running = self.bed(
            "sh", "-ec", START, "start", kind, *self.pod(image, *command, **more)).split()
        return pod, container, int(ready) / 1e9, int(running) / 1e9

    def remove(self, *pods):
        """Stops and removes pods."""
        self.bed("sh", "-c", REMOVE, "remove", *pods)

    def one(self, kind):
        """Milliseconds until one pod is ready and, from then, until its container runs."""
        pod, _, ready, running = self.start(kind, BUSYBOX, "sleep", "600")
        self.remove(pod)
        return ready * 1000, running * 1000

    def many(self, kind, count):
        """Seconds until `count` pods made at once run, MiB of each, and seconds until they are gone."""
        pods = [" ".join(self.pod(BUSYBOX, "sleep", "600")) for _ in range(count)]
        start = f"start() {{ {START} }}"
        starts = "".join(f"start {kind} {pod} >>{FOLDER}/started & " for pod in pods)
        up = self.bed.timed(f"{start}; : >{FOLDER}/started; {starts} wait")
        names = [line.split()[0] for line in self.bed("cat", f"{FOLDER}/started").splitlines()]
        if len(names) != count:
            raise SystemExit(f"bench: of {count} pods on {kind} {len(names)} came up")
        size = self.bed.pss(kind, count)
        down = self.bed.timed(f"set -- {' '.join(names)}; {REMOVE}")
        return up, size, down

    def address(self, pod):
        """A pod's."""
        words = f"{CRICTL} inspectp -o go-template --template '{{{{.status.network.ip}}}}' {pod}"
        return self.bed("sh", "-c", words).strip()

    def cpu(self, container):
        """Seconds of a processor that a container has had; it has to run."""
        told = json.loads(self.bed("sh", "-c", f"{CRICTL} stats --output json --id {container}"))
        if len(told["stats"]) != 1:
            raise SystemExit(f"bench: container {container} does not run any more")
        return int(told["stats"][0]["cpu"]["usageCoreNanoSeconds"]["value"]) / 1e9

    def until_said(self, container, word):
        """Waits until it is in a container's log."""
        self.bed("sh", "-c", f"until {CRICTL} logs {container} | grep -q {word}; do sleep 0.2; done")

    def talk(self, kind):
        """Gbit/s and microseconds to and fro of a host and a pod, then of two pods."""
        server, sink, _, _ = self.start(kind, PYTHON, "python3", "-u", "-c", SERVER)
        client, source, _, _ = self.start(kind, PYTHON, "sleep", "600")
        address = self.address(server)
        self.until_said(sink, "listening")

        def in_pod(program, *arguments):
            return self.bed("sh", "-c", f"exec {CRICTL} exec {source} python3 -c \"$@\"", "sh", program, *arguments)

        figures = []
        for number, run in enumerate((self.bed.on_host, in_pod), 1):
            run(SOURCE, address)
            told = self.bed("sh", "-c", f"until [ \"$({CRICTL} logs {sink} | grep -c gbit)\" = {number} ]; "
                            f"do sleep 0.2; done; {CRICTL} logs {sink} | grep gbit")
            figures += [float(told.split()[-1]), float(run(PING, address))]
        self.remove(server, client)
        return figures


def measure(bed, figures, runs, pods):
    """Adds the figures."""
    times = rounds(pods.one, runs, warm=1)
    for column, name in enumerate(("RunPodSandbox to ready, ms", "CreateContainer to running, ms")):
        figures.medians(name, [{kind: one[kind][column] for kind in RUNTIMES} for one in times])
    for count in (10, 50) if bed.fast else (10,):
        both = {kind: pods.many(kind, count) for kind in RUNTIMES}
        for column, name in enumerate(("{} pods at once, s", "idle pod of {}, MiB PSS", "{} pods removed, s")):
            figures[name.format(count)] = {kind: one[column] for kind, one in both.items()}
    both = {kind: pods.talk(kind) for kind in RUNTIMES}
    for column, name in enumerate(("TCP host to pod, Gbit/s", "host to pod and back, us",
                                   "TCP pod to pod, Gbit/s", "pod to pod and back, us")):
        figures[name] = {kind: one[column] for kind, one in both.items()}


def pause_image(layout):
    """The pods' own image as an archive, in base64, out of the layout that critest's images are in."""
    index = json.loads((layout / "index.json").read_text())
    entry = next(m for m in index["manifests"] if m["annotations"]["org.opencontainers.image.ref.name"] == PAUSE)
    manifest = json.loads(blob(layout, entry).read_text())
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for part in (entry, manifest["config"], *manifest["layers"]):
            path = blob(layout, part)
            archive.add(path, path.relative_to(layout))
        archive.add(layout / "oci-layout", "oci-layout")
        text = json.dumps(index | {"manifests": [entry]}).encode()
        member = tarfile.TarInfo("index.json")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return base64.b64encode(out.getvalue()).decode()


def blob(layout, descriptor):
    """Where the layout has what is described."""
    return layout / "blobs" / descriptor["digest"].replace(":", "/")
