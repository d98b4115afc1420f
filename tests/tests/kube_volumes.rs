//! What Kubernetes puts into a container: environment, configuration, secrets, tokens, volumes.

use sepal_tests::{Cluster, LoopDevice, eventually, seconds, watch};

/// A pod that runs a line of shell with what is claimed as `claim`, under the name `disk` in `uses`.
fn claimant(name: &str, line: &str, uses: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: {name} }}
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  containers:
    - name: main
      image: busybox
      command: [sh, -c, '{line}']
      {uses}
  volumes: [{{ name: disk, persistentVolumeClaim: {{ claimName: claim }} }}]
"#
    )
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn the_environment_and_the_downward_api() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let log = namespace.run(
        "env",
        r#"
apiVersion: v1
kind: ConfigMap
metadata: { name: settings }
data: { colour: blue, size: "7" }
---
apiVersion: v1
kind: Secret
metadata: { name: keys }
stringData: { password: "it's $ecret" }
---
apiVersion: v1
kind: Pod
metadata: { name: env, labels: { app: demo }, annotations: { note: "a note" } }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'echo "$GREETING|$COMPOSED|$colour|$PASSWORD|$POD|$NODE|$CPU|$MEMORY"; cat /etc/about/*; echo; [ "$POD_IP" = "$(hostname -i)" ] && echo same address']
      resources: { limits: { cpu: 500m, memory: 100Mi } }
      envFrom:
        - configMapRef: { name: settings }
      env:
        - { name: GREETING, value: hello }
        - { name: COMPOSED, value: "$(GREETING) $(NOBODY) $$(GREETING)" }
        - { name: PASSWORD, valueFrom: { secretKeyRef: { name: keys, key: password } } }
        - { name: POD, valueFrom: { fieldRef: { fieldPath: metadata.name } } }
        - { name: NODE, valueFrom: { fieldRef: { fieldPath: spec.nodeName } } }
        - { name: POD_IP, valueFrom: { fieldRef: { fieldPath: status.podIP } } }
        - { name: CPU, valueFrom: { resourceFieldRef: { resource: limits.cpu, divisor: 1m } } }
        - { name: MEMORY, valueFrom: { resourceFieldRef: { resource: limits.memory } } }
      volumeMounts:
        - { name: about, mountPath: /etc/about }
  volumes:
    - name: about
      downwardAPI:
        items:
          - { path: labels, fieldRef: { fieldPath: metadata.labels } }
          - { path: note, fieldRef: { fieldPath: "metadata.annotations['note']" } }
"#,
    );
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(
        lines,
        [
            "hello|hello $(NOBODY) $(GREETING)|blue|it's $ecret|env|node|500|104857600",
            "app=\"demo\"a note",
            "same address"
        ]
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn config_maps_and_secrets_are_files_that_follow_their_object() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let settings = |colour: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: settings }}\ndata: {{ colour: {colour}, shape: round }}\n"
        )
    };
    namespace.apply(&settings("blue"));
    let pod = namespace.start(
        "files",
        r#"
apiVersion: v1
kind: Secret
metadata: { name: keys }
stringData: { password: xyzzy }
---
apiVersion: v1
kind: Pod
metadata: { name: files }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      command: [sleep, "1000"]
      volumeMounts:
        - { name: settings, mountPath: /etc/settings }
        - { name: settings, mountPath: /etc/one/colour, subPath: colour }
        - { name: keys, mountPath: /etc/keys, readOnly: true }
  volumes:
    - name: settings
      configMap: { name: settings }
    - name: keys
      secret:
        secretName: keys
        defaultMode: 0400
        items: [{ key: password, path: sub/pass }]
"#,
    );
    assert_eq!(
        pod.sh("cat /etc/settings/colour; echo; ls /etc/settings"),
        "blue\ncolour\nshape"
    );
    assert_eq!(
        pod.sh("stat -Lc '%a %F' /etc/keys/sub/pass; cat /etc/keys/sub/pass"),
        "400 regular file\nxyzzy"
    );
    pod.exec(["touch", "/etc/keys/new"]).failure();
    // The kubelet looks every minute or so; a new annotation makes it look at once.
    namespace.apply(&settings("green"));
    eventually("the file follows", seconds(120), || {
        let stamp = format!("stamp={:?}", std::time::SystemTime::now());
        namespace
            .kubectl(["annotate", "--overwrite", "pod", "files"])
            .arg(stamp.replace(' ', ""))
            .run();
        (pod.sh("cat /etc/settings/colour") == "green").then_some(())
    });
    // A subPath does not, by Kubernetes' rules.
    assert_eq!(pod.sh("cat /etc/one/colour"), "blue");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_program_that_waits_for_its_configuration_is_woken_with_200_files_too() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let settings = |colour: &str| {
        let keys: String = (0..200).map(|n| format!("  key-{n}: {colour}\n")).collect();
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: settings }}\ndata:\n{keys}")
    };
    namespace.apply(&settings("blue"));
    // What comes and goes in the directory: the kubelet changes all files by one rename.
    let command = serde_json::to_string(&watch("/etc/settings", "380")).unwrap();
    let pod = namespace.start(
        "waits",
        &r#"
apiVersion: v1
kind: Pod
metadata: { name: waits }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: python
      command: COMMAND
      readinessProbe: { exec: { command: [test, -s, /tmp/told] }, periodSeconds: 1 }
      volumeMounts: [{ name: settings, mountPath: /etc/settings }]
  volumes:
    - name: settings
      configMap: { name: settings }
"#
        .replace("COMMAND", &command),
    );
    assert_eq!(pod.sh("cat /tmp/told"), "waits");
    namespace.apply(&settings("green"));
    eventually("it is woken", seconds(150), || {
        let told = pod.sh("cat /tmp/told");
        told.contains("moved-to ..data").then_some(())
    });
    assert_eq!(
        pod.sh("cat /etc/settings/key-0 /etc/settings/key-199"),
        "greengreen"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn an_image_is_a_volume() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "tooled",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: tooled }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      command: [sleep, "1000"]
      volumeMounts:
        - { name: server, mountPath: /server }
  volumes:
    - name: server
      image: { reference: nginx }
"#,
    );
    pod.sh("test -x /server/usr/sbin/nginx");
    assert_eq!(
        pod.sh("head -c 4 /server/usr/sbin/nginx | tail -c 3"),
        "ELF"
    );
    pod.exec(["touch", "/server/new"]).failure();
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_claimed_block_device_is_one_in_the_container() {
    let cluster = Cluster::get();
    let scratch = cluster.bed().scratch();
    let disk = LoopDevice::new(cluster.bed(), scratch.file("disk"), 64);
    let namespace = cluster.namespace();
    let _volume = namespace.offer(disk.path(), "Block");
    namespace.claim("Block");
    let disk = "volumeDevices: [{ name: disk, devicePath: /dev/xvda }]";
    let user = |name: &str, line: &str| claimant(name, line, disk);
    let write = "blockdev --getsz /dev/xvda; echo kept | dd of=/dev/xvda bs=512 seek=100 conv=fsync,notrunc 2>/dev/null";
    assert_eq!(namespace.run("first", &user("first", write)), "131072");
    namespace.pod("first").delete(&[]);
    let read = "dd if=/dev/xvda bs=512 skip=100 count=1 2>/dev/null | head -c 4";
    assert_eq!(namespace.run("second", &user("second", read)), "kept");
    namespace.pod("second").delete(&[]);
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_projected_token_opens_the_api() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let log = namespace.run(
        "caller",
        r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: { name: reader }
rules:
  - { apiGroups: [""], resources: [pods], verbs: [get] }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: { name: reader }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader }
subjects: [{ kind: ServiceAccount, name: default }]
---
apiVersion: v1
kind: Pod
metadata: { name: caller }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  containers:
    - name: main
      image: python
      command:
        - python3
        - -c
        - |
          import json, os, ssl, urllib.request
          account = "/var/run/secrets/kubernetes.io/serviceaccount/"
          read = lambda path: open(path).read()
          api = "https://%s:%s" % (os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"])
          path = "/api/v1/namespaces/%s/pods/" % read(account + "namespace")
          trust = ssl.create_default_context(cafile=account + "ca.crt")
          def get(token, name):
              request = urllib.request.Request(api + path + name, headers={"Authorization": "Bearer " + token})
              try:
                  return json.load(urllib.request.urlopen(request, context=trust))["metadata"]["name"]
              except urllib.error.HTTPError as error:
                  return error.code
          print(get(read(account + "token"), "caller"), get(read(account + "token"), ""), get("x", "caller"))
          print(get(read("/tokens/own"), "caller"))
          print(oct(os.stat("/tokens/own").st_mode), sorted(n for n in os.listdir("/tokens") if n[0] != "."))
      volumeMounts: [{ name: tokens, mountPath: /tokens }]
  volumes:
    - name: tokens
      projected:
        defaultMode: 0440
        sources:
          - serviceAccountToken: { path: own, expirationSeconds: 600 }
          - downwardAPI: { items: [{ path: name, fieldRef: { fieldPath: metadata.name } }] }
"#,
    );
    assert_eq!(log, "caller 403 401\ncaller\n0o100440 ['name', 'own']");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn an_empty_dir_is_the_pod_s_and_outlives_a_container() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "shared",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: shared }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: writer
      image: busybox
      command: [sh, -c, 'echo run >>/data/runs; [ $(wc -l </data/runs) -gt 1 ] || exit 1; sleep 1000']
      volumeMounts: [{ name: data, mountPath: /data }]
    - name: reader
      image: busybox
      command: [sleep, "1000"]
      volumeMounts: [{ name: data, mountPath: /data, readOnly: true }]
  volumes:
    - name: data
      emptyDir: {}
"#,
    );
    // The writer's first run failed.
    eventually("the second run", seconds(60), || {
        (pod.sh_in("reader", "wc -l </data/runs") == "2").then_some(())
    });
    pod.exec_command(&["-c", "reader"], ["touch", "/data/new"])
        .run()
        .failure();
    assert_eq!(
        pod.sh_in("writer", "stat -c %a /data; touch /data/new && echo mine"),
        "777\nmine"
    );
    // What one writes the other sees at once.
    for n in 0..5 {
        pod.sh_in("writer", &format!("echo {n} >/data/number"));
        assert_eq!(pod.sh_in("reader", "cat /data/number"), n.to_string());
    }
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn an_empty_dir_in_memory_has_its_size_and_no_more() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "memory",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: memory }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  securityContext: { fsGroup: 1234 }
  initContainers:
    - name: before
      image: busybox
      command: [sh, -c, 'echo hello >/cache/from']
      volumeMounts: [{ name: cache, mountPath: /cache }]
  containers:
    - name: main
      image: busybox
      command: [sleep, "1000"]
      resources: { limits: { memory: 128Mi } }
      volumeMounts:
        - { name: cache, mountPath: /cache }
    - name: part
      image: busybox
      securityContext: { runAsUser: 1000 }
      command: [sh, -c, 'echo mine >/part/file; sleep 1000']
      volumeMounts:
        - { name: cache, mountPath: /part, subPath: some/where }
        - { name: cache, mountPath: /cache, readOnly: true }
  volumes:
    - name: cache
      emptyDir: { medium: Memory, sizeLimit: 16Mi }
"#,
    );
    assert_eq!(pod.sh("df -m /cache | awk 'NR == 2 { print $2 }'"), "16");
    let about =
        "stat -fc %T /cache; stat -c '%a %g' /cache; cat /cache/from /cache/some/where/file";
    assert_eq!(pod.sh(about), "tmpfs\n3777 1234\nhello\nmine");
    assert_eq!(pod.sh_in("part", "cat /cache/from"), "hello");
    let refused = ["sh", "-c", "echo more >>/cache/from"];
    pod.exec_command(&["-c", "part"], refused).run().failure();
    pod.exec(["dd", "if=/dev/zero", "of=/cache/fits", "bs=1M", "count=15"])
        .success();
    let full = pod
        .exec(["dd", "if=/dev/zero", "of=/cache/more", "bs=1M", "count=2"])
        .failure();
    assert!(full.err().contains("No space left"), "{}", full.report());
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn an_empty_dir_takes_the_place_of_dev_shm() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "database",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: database }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      command: [sleep, "1000"]
      resources: { limits: { memory: 256Mi } }
      volumeMounts:
        - { name: dshm, mountPath: /dev/shm }
        - { name: dshm, mountPath: /other }
  volumes:
    - name: dshm
      emptyDir: { medium: Memory, sizeLimit: 128Mi }
"#,
    );
    assert_eq!(pod.sh("df -m /dev/shm | awk 'NR == 2 { print $2 }'"), "128");
    assert_eq!(
        pod.sh("echo shared >/dev/shm/file; cat /other/file"),
        "shared"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn an_empty_dir_beyond_its_size_costs_the_pod_its_place() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: { name: hoarder }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'dd if=/dev/zero of=/data/much bs=1M count=40; sync; sleep 1000']
      volumeMounts: [{ name: data, mountPath: /data }]
  volumes:
    - name: data
      emptyDir: { sizeLimit: 20Mi }
"#,
    );
    let pod = namespace.pod("hoarder");
    assert_eq!(pod.wait_end(), "Failed");
    assert_eq!(pod.get("{.status.reason}"), "Evicted");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn host_paths_of_each_type() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let scratch = cluster.bed().scratch();
    cluster
        .bed()
        .write(&scratch.file("file"), "from the node\n");
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: { name: host }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'cat /one /all/file; echo from the pod >/all/new; echo x >/made/x; ls /deep']
      volumeMounts:
        - { name: one, mountPath: /one, readOnly: true }
        - { name: all, mountPath: /all }
        - { name: made, mountPath: /made }
        - { name: all, mountPath: /deep, subPath: a/b }
  volumes:
    - { name: one, hostPath: { path: SCRATCH/file, type: File } }
    - { name: all, hostPath: { path: SCRATCH, type: Directory } }
    - { name: made, hostPath: { path: SCRATCH/made, type: DirectoryOrCreate } }
"#
    .replace("SCRATCH", scratch.path());
    assert_eq!(
        namespace.run("host", &manifest),
        "from the node\nfrom the node"
    );
    let bed = cluster.bed();
    assert_eq!(bed.read(&scratch.file("new")), "from the pod");
    assert_eq!(bed.read(&scratch.file("made/x")), "x");
    assert_eq!(
        bed.sh(&format!("ls {}", scratch.file("a"))).run().out(),
        "b"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_claim_keeps_its_files_from_pod_to_pod() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let scratch = cluster.bed().scratch();
    cluster
        .bed()
        .command(["mkdir", &scratch.file("disk")])
        .run()
        .success();
    let _volume = namespace.offer(&scratch.file("disk"), "Filesystem");
    namespace.claim("Filesystem");
    let disk = "volumeMounts: [{ name: disk, mountPath: /disk, subPath: part }]";
    let user = |name: &str, line: &str| claimant(name, line, disk);
    namespace.run("first", &user("first", "echo kept >/disk/file"));
    namespace.pod("first").delete(&[]);
    assert_eq!(
        namespace.run("second", &user("second", "cat /disk/file")),
        "kept"
    );
    namespace.pod("second").delete(&[]);
}
