//! The Kubernetes cluster of a bed (`tests/kube/cluster`), and namespaces that go with their test.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use crate::bed::Kind;
use crate::{Bed, Command, Outcome, eventually, seconds};

/// How long a pod may take to get where it should.
const PATIENCE: Duration = seconds(120);

/// A cluster that is up, in a bed that is.
#[derive(Debug)]
pub struct Cluster {
    bed: Bed,
}

impl Cluster {
    /// The cluster of the bed in use.
    ///
    /// # Panics
    /// When there is none: a test that was asked for is never passed over in silence.
    pub fn get() -> Self {
        Self::of(Bed::get())
    }

    /// The cluster for this test alone: it breaks things.
    ///
    /// # Panics
    /// As [`Cluster::get`].
    pub fn alone() -> Self {
        Self::of(Bed::alone())
    }

    fn of(bed: Bed) -> Self {
        let cluster = Self { bed };
        let ready = cluster.kubectl(["get", "--raw", "/readyz"]).run();
        assert!(
            ready.ok(),
            "the bed has no cluster (tests/kube/run makes one):\n{}",
            ready.report()
        );
        cluster
    }

    /// The cluster's own program.
    fn control<A: AsRef<OsStr>>(argv: impl IntoIterator<Item = A>) -> Command {
        Command::new([Path::new(env!("CARGO_MANIFEST_DIR")).join("kube/cluster")]).args(argv)
    }

    /// The bed it is in.
    pub fn bed(&self) -> &Bed {
        &self.bed
    }

    /// The RuntimeClass under test.
    pub fn runtime_class(&self) -> &'static str {
        if self.bed.runtime().contains("sepal") {
            "sepal"
        } else {
            "runc"
        }
    }

    /// Whether the node says of the RuntimeClass's handler that it has a feature.
    #[track_caller]
    pub fn handler_supports(&self, feature: &str) -> bool {
        let handler = self.runtime_class();
        let path = format!(
            r#"jsonpath={{.items[0].status.runtimeHandlers[?(@.name=="{handler}")].features.{feature}}}"#
        );
        let told = self.kubectl(["get", "nodes", "-o", &path]).run();
        told.success().out() == "true"
    }

    /// Stops or starts a daemon of the cluster by its name.
    #[track_caller]
    pub fn daemon(&self, verb: &str, name: &str) {
        Self::control([verb, name]).run().success();
    }

    /// Shuts the node down (`reboot`) or takes its power away (`power-cut`) and starts it again, with what
    /// runs on it as services.
    #[track_caller]
    pub fn restart_node(&self, verb: &str) {
        Self::control([verb]).run().success();
    }

    /// Asserts that nothing is left beyond a fresh cluster, given some minutes to go.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let patience = crate::bed::stretched(seconds(60)).as_secs().to_string();
        let left = Self::control(["leaks", &patience]).patience(PATIENCE).run();
        assert!(left.ok(), "left behind:\n{}", left.report());
    }

    /// A command of kubectl.
    pub fn kubectl<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Command {
        match self.bed.kind() {
            Kind::Native => self.bed.command(["kubectl"]).args(argv),
            // From beside the node, at a real processor's speed.
            Kind::Node => Self::control(["kubectl"]).args(argv),
        }
    }

    /// A namespace of its own for a test.
    pub fn namespace(&self) -> Namespace<'_> {
        let name = self.bed.unique("test");
        self.kubectl(["create", "namespace", &name]).run().success();
        // Without it no pod is admitted, and a controller makes it in its own time.
        self.kubectl([
            "-n",
            &name,
            "wait",
            "--for=create",
            "serviceaccount/default",
        ])
        .run()
        .success();
        Namespace {
            cluster: self,
            name,
        }
    }
}

/// A namespace that is removed on drop, with all that is in it.
#[derive(Debug)]
pub struct Namespace<'cluster> {
    cluster: &'cluster Cluster,
    name: String,
}

impl Namespace<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command of kubectl in it.
    pub fn kubectl<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Command {
        self.cluster.kubectl(["-n", &self.name]).args(argv)
    }

    /// The same with a terminal.
    pub fn terminal_kubectl<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Command {
        let bed = &self.cluster.bed;
        let kubectl = match bed.kind() {
            Kind::Native => bed.terminal_command(["kubectl"]),
            // Which has the caller's own terminal.
            Kind::Node => self.cluster.kubectl([""; 0]),
        };
        kubectl.args(["-n", &self.name]).args(argv)
    }

    /// `kubectl apply` of a manifest as a user would write it; the control run has its RuntimeClass in
    /// the place of `runtimeClassName: sepal`.
    pub fn try_apply(&self, manifest: &str) -> Outcome {
        let class = self.cluster.runtime_class();
        let ours = "runtimeClassName: sepal";
        let manifest = manifest.replace(ours, &format!("runtimeClassName: {class}"));
        self.kubectl(["apply", "-f", "-"]).stdin(manifest).run()
    }

    /// The same, which is to be accepted.
    #[track_caller]
    pub fn apply(&self, manifest: &str) {
        self.try_apply(manifest).success();
    }

    /// Applies a pod's manifest and waits until the pod is ready.
    #[track_caller]
    pub fn start(&self, pod: &str, manifest: &str) -> Pod<'_> {
        self.apply(manifest);
        let pod = self.pod(pod);
        pod.wait_ready();
        pod
    }

    /// Applies the manifest of a pod that ends, waits for the end and tells what the pod wrote.
    ///
    /// # Panics
    /// When it did not succeed.
    #[track_caller]
    pub fn run(&self, pod: &str, manifest: &str) -> String {
        self.apply(manifest);
        let pod = self.pod(pod);
        let phase = pod.wait_end();
        assert!(phase == "Succeeded", "{phase}:\n{}", pod.describe());
        pod.logs(&[])
    }

    /// Waits so many seconds until all of a Deployment, StatefulSet or DaemonSet (`deployment/web`) is
    /// there as it is described.
    #[track_caller]
    pub fn roll_out(&self, object: &str, limit: u64) {
        let timeout = format!(
            "--timeout={}s",
            crate::bed::stretched(seconds(limit)).as_secs()
        );
        self.kubectl(["rollout", "status", object, &timeout])
            .patience(seconds(limit + 20))
            .run()
            .success();
    }

    /// Offers a directory of the node, or with `mode: Block` a device, to claims with the namespace's
    /// name as their storage class.
    #[track_caller]
    pub fn offer(&self, path: &str, mode: &str) -> Offered<'_> {
        let volume = r#"
apiVersion: v1
kind: PersistentVolume
metadata: { name: NAME }
spec:
  capacity: { storage: 1Gi }
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: NAME
  volumeMode: MODE
  local: { path: PATH }
  nodeAffinity:
    required:
      nodeSelectorTerms:
        - matchExpressions: [{ key: kubernetes.io/hostname, operator: In, values: [node] }]
"#;
        let volume = volume.replace("NAME", &self.name);
        self.apply(&volume.replace("MODE", mode).replace("PATH", path));
        Offered(self)
    }

    /// Claims all of what has been offered, as `claim`.
    #[track_caller]
    pub fn claim(&self, mode: &str) {
        let claim = r#"
apiVersion: v1
kind: PersistentVolumeClaim
metadata: { name: claim }
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: NAME
  volumeMode: MODE
  resources: { requests: { storage: 1Gi } }
"#;
        self.apply(&claim.replace("NAME", &self.name).replace("MODE", mode));
    }

    /// A pod of it, by name.
    pub fn pod(&self, name: &str) -> Pod<'_> {
        Pod {
            namespace: self,
            name: name.to_owned(),
        }
    }

    /// What a JSONPath says of an object (`pod/web`).
    #[track_caller]
    pub fn get(&self, object: &str, path: &str) -> String {
        let output = format!("jsonpath={path}");
        self.kubectl(["get", object, "-o", &output])
            .run()
            .success()
            .out()
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for what in [
                &["get", "pods", "-o", "wide"][..],
                &["describe", "pods"],
                &["events"],
            ] {
                eprintln!("{}", self.kubectl(what).run().report());
            }
        }
        let now = ["--all", "--wait=false", "--grace-period=1"];
        self.kubectl(["delete", "all"]).args(now).run();
        self.cluster
            .kubectl(["delete", "namespace", "--wait=false", &self.name])
            .run();
    }
}

/// A PersistentVolume, which belongs to no namespace, until it goes out of scope.
#[derive(Debug)]
pub struct Offered<'namespace>(&'namespace Namespace<'namespace>);

impl Drop for Offered<'_> {
    fn drop(&mut self) {
        let volume = ["delete", "pv", "--wait=false", self.0.name()];
        self.0.kubectl(volume).run();
    }
}

/// A pod.
#[derive(Debug)]
pub struct Pod<'namespace> {
    namespace: &'namespace Namespace<'namespace>,
    name: String,
}

impl Pod<'_> {
    /// Waits until it is ready.
    ///
    /// # Panics
    /// When it does not become so.
    #[track_caller]
    pub fn wait_ready(&self) {
        let timeout = format!("--timeout={}s", crate::bed::stretched(PATIENCE).as_secs());
        let pod = format!("pod/{}", self.name);
        let outcome = self
            .namespace
            .kubectl(["wait", "--for=condition=Ready", &timeout, &pod])
            .patience(PATIENCE * 2)
            .run();
        assert!(outcome.ok(), "not ready:\n{}", self.describe());
    }

    /// Waits until all its containers have ended for good, and tells its phase.
    #[track_caller]
    pub fn wait_end(&self) -> String {
        eventually("the pod ends", PATIENCE, || {
            let phase = self.get("{.status.phase}");
            matches!(phase.as_str(), "Succeeded" | "Failed").then_some(phase)
        })
    }

    /// What a JSONPath says of it.
    #[track_caller]
    pub fn get(&self, path: &str) -> String {
        self.namespace.get(&format!("pod/{}", self.name), path)
    }

    /// Waits until a JSONPath says this of it.
    #[track_caller]
    pub fn wait_for(&self, path: &str, value: &str) {
        let deadline = std::time::Instant::now() + crate::bed::stretched(PATIENCE);
        loop {
            let said = self.get(path);
            if said == value {
                return;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "{path} is {said:?}, want {value:?}\n{}",
                self.describe()
            );
            std::thread::sleep(crate::bed::stretched(Duration::from_millis(50)));
        }
    }

    /// `kubectl logs OPTIONS`.
    #[track_caller]
    pub fn logs(&self, options: &[&str]) -> String {
        self.namespace
            .kubectl(["logs", &self.name])
            .args(options)
            .run()
            .success()
            .out()
    }

    /// Its log, as soon as the node can be asked for it (again).
    #[track_caller]
    pub fn logs_when_ready(&self) -> String {
        eventually("the node gives the log", seconds(60), || {
            let log = self.namespace.kubectl(["logs", &self.name]).run();
            log.ok().then(|| log.out())
        })
    }

    /// `kubectl exec` of a command in its first container.
    pub fn exec<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Outcome {
        self.exec_command(&[], argv).run()
    }

    /// `kubectl exec OPTIONS POD -- ARGV`, to be run.
    pub fn exec_command<A: AsRef<OsStr>>(
        &self,
        options: &[&str],
        argv: impl IntoIterator<Item = A>,
    ) -> Command {
        self.namespace
            .kubectl(["exec"])
            .args(options)
            .args([&self.name, "--"])
            .args(argv)
    }

    /// What a line of shell in its first container says.
    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        self.exec(["sh", "-c", line]).success().out()
    }

    /// What a line of shell in one of its containers says.
    #[track_caller]
    pub fn sh_in(&self, container: &str, line: &str) -> String {
        self.exec_command(&["-c", container], ["sh", "-c", line])
            .run()
            .success()
            .out()
    }

    /// The id of its sandbox, by which its processes on the node are known.
    #[track_caller]
    pub fn sandbox(&self) -> String {
        let bed = self.namespace.cluster.bed();
        let name = format!("^{}$", self.name);
        let namespace = format!("^{}$", self.namespace.name);
        let filter = [
            "--name",
            &name,
            "--namespace",
            &namespace,
            "--state",
            "ready",
        ];
        bed.command(["crictl", "pods", "-q", "--no-trunc"])
            .args(filter)
            .run()
            .success()
            .out()
    }

    /// Deletes it and waits until it is gone.
    #[track_caller]
    pub fn delete(&self, options: &[&str]) -> Outcome {
        self.namespace
            .kubectl(["delete", "pod", &self.name])
            .args(options)
            .run()
            .success()
    }

    /// Deletes it, and waits until there is another of its name, ready or not.
    #[track_caller]
    pub fn replace(&self) {
        let uid = "jsonpath={.metadata.uid}";
        let uid = || {
            self.namespace
                .kubectl(["get", "pod", &self.name, "-o", uid])
                .run()
        };
        let before = uid().success().out();
        self.delete(&[]);
        eventually("it is made anew", seconds(60), || {
            let now = uid();
            (now.ok() && now.out() != before).then_some(())
        });
    }

    /// Its events' reasons and messages.
    #[track_caller]
    pub fn events(&self) -> String {
        let object = format!("pod/{}", self.name);
        self.namespace
            .kubectl(["events", "--for", &object])
            .run()
            .success()
            .out()
    }

    /// `kubectl describe`, for the reader of a failed test.
    pub fn describe(&self) -> String {
        self.namespace
            .kubectl(["describe", "pod", &self.name])
            .run()
            .out()
    }
}
