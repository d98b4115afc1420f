use std::collections::HashSet;

use super::*;

const SPEC: &str = r#"{
  "ociVersion": "1.2.0",
  "process": {
    "terminal": false, "user": {"uid": 1000, "gid": 1000, "additionalGids": [27]},
    "args": ["/bin/echo", "hello"], "env": ["PATH=/bin", "A=1"], "cwd": "/work",
    "noNewPrivileges": false, "apparmorProfile": "cri-containerd.apparmor.d", "oomScoreAdj": 998
  },
  "root": {"path": "rootfs", "readonly": true},
  "hostname": "web",
  "mounts": [{"destination": "/data", "type": "bind", "source": "/run/sepal/share/c/mounts/0",
              "options": ["rbind", "ro", "z"]}],
  "hooks": {"createRuntime": [{"path": "/host/cni"}], "prestart": [{"path": "/host/old"}],
            "poststop": [{"path": "/host/end"}], "startContainer": [{"path": "/inside"}]},
  "linux": {
    "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/7/ns/net"},
                   {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
    "rootfsPropagation": "rslave",
    "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                {"path": "/dev/kfd", "type": "c", "major": 237, "minor": 0}],
    "resources": {
      "devices": [{"allow": false, "access": "rwm"},
                  {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"}],
      "memory": {"limit": 67108864, "swap": 134217728, "swappiness": 60},
      "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "2-3"},
      "hugepageLimits": [{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 4194304}],
      "blockIO": {"weight": 500, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 9}]},
      "unified": {"memory.high": "60000000", "../escape": "1", "dmem.max": "5"}
    }
  }
}"#;

fn plan_of(json: &str, shared: &[&str]) -> Result<Plan> {
    let files: HashSet<&str> = ["hugetlb.2MB.max", "io.weight", "memory.high"]
        .into_iter()
        .collect();
    let facts = Facts {
        cgroup_file: &|name| files.contains(name),
        device: &|device| {
            (device.path() == Path::new("/dev/fuse")).then_some((LinuxDeviceType::C, 10, 230))
        },
    };
    let shared: Vec<String> = shared.iter().map(|name| (*name).to_owned()).collect();
    let spec = serde_json::from_str(json).expect("a spec");
    container(
        spec,
        &shared,
        Path::new("/run/sepal/share/c/rootfs"),
        &facts,
    )
}

fn kinds(plan: &Plan) -> Vec<String> {
    let namespaces = plan
        .spec
        .linux()
        .as_ref()
        .unwrap()
        .namespaces()
        .clone()
        .unwrap();
    assert!(
        namespaces
            .iter()
            .all(|namespace| namespace.path().is_none())
    );
    namespaces
        .iter()
        .map(|namespace| oci_name(namespace.typ()).to_owned())
        .collect()
}

#[test]
fn a_lone_container_gets_its_own_namespaces_but_the_network() {
    let plan = plan_of(SPEC, &["network"]).unwrap();
    assert_eq!(kinds(&plan), ["pid", "ipc", "uts", "mount", "cgroup"]);
    assert!(!plan.shared_pid_namespace);
    assert_eq!(plan.spec.hostname().as_deref(), Some("web"));
}

#[test]
fn shared_namespaces_are_the_guests() {
    let plan = plan_of(SPEC, &["network", "ipc", "uts", "pid"]).unwrap();
    assert_eq!(kinds(&plan), ["mount", "cgroup"]);
    assert!(plan.shared_pid_namespace);
    assert_eq!(plan.spec.hostname(), &None);
}

#[test]
fn only_hooks_of_the_container_stay() {
    let plan = plan_of(SPEC, &[]).unwrap();
    let hooks = plan.spec.hooks().clone().unwrap();
    assert!(hooks.create_runtime().is_none() && hooks.poststop().is_none());
    assert_eq!(
        hooks.start_container().as_ref().unwrap()[0].path(),
        Path::new("/inside")
    );
}

#[test]
fn devices_are_the_guests_and_rules_follow() {
    let plan = plan_of(SPEC, &[]).unwrap();
    let linux = plan.spec.linux().clone().unwrap();
    let devices = linux.devices().clone().unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!(devices[0].minor(), 230);
    let rules = &plan.device_rules;
    assert_eq!((rules[0].allow(), rules[0].major()), (false, None));
    assert_eq!(rules[1].minor(), Some(230));
    assert_eq!(linux.resources().clone().unwrap().devices(), &None);
    assert!(plan.left_out.iter().any(|what| what.contains("/dev/kfd")));
}

#[test]
fn limits_are_what_the_guest_can_keep() {
    let plan = plan_of(SPEC, &[]).unwrap();
    let resources = plan
        .spec
        .linux()
        .clone()
        .unwrap()
        .resources()
        .clone()
        .unwrap();
    let memory = resources.memory().unwrap();
    assert_eq!((memory.limit(), memory.swap()), (Some(67_108_864), None));
    let cpu = resources.cpu().clone().unwrap();
    assert_eq!((cpu.quota(), cpu.cpus().as_ref()), (Some(50_000), None));
    assert_eq!(resources.hugepage_limits().as_ref().unwrap().len(), 1);
    assert!(resources.block_io().is_none());
    let unified = resources.unified().clone().unwrap();
    assert_eq!(unified["io.weight"], (1 + 490 * 9999 / 990).to_string());
    assert_eq!(unified["memory.high"], "60000000");
    assert_eq!(unified.len(), 2);
}

#[test]
fn the_process_is_its_own_master() {
    let plan = plan_of(SPEC, &[]).unwrap();
    let process = plan.spec.process().clone().unwrap();
    assert_eq!(process.no_new_privileges(), None);
    assert_eq!(
        process.apparmor_profile().as_deref(),
        Some("cri-containerd.apparmor.d")
    );
    // No capabilities in the spec means none, not all.
    assert_eq!(
        process.capabilities().as_ref().unwrap().bounding(),
        &Some(Capabilities::new())
    );
    assert_eq!((plan.owner, plan.oom_score_adj), (1000, 998));
    assert_eq!(plan.args[0].to_str(), Ok("/bin/echo"));
    assert_eq!(plan.env[1].to_str(), Ok("A=1"));
    let mounts = plan.spec.mounts().clone().unwrap();
    assert_eq!(mounts[0].options().as_ref().unwrap(), &["rbind", "ro"]);
    assert_eq!(
        plan.spec.root().as_ref().unwrap().path(),
        Path::new("/run/sepal/share/c/rootfs")
    );
    assert_eq!(
        plan.spec
            .linux()
            .as_ref()
            .unwrap()
            .rootfs_propagation()
            .as_deref(),
        Some("slave")
    );
}

#[test]
fn an_exec_keeps_the_containers_seccomp_and_capabilities() {
    let with_seccomp = SPEC.replace(
        r#""rootfsPropagation""#,
        r#""seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}, "rootfsPropagation""#,
    );
    let plan = plan_of(&with_seccomp, &[]).unwrap();
    let process: Process =
        serde_json::from_str(r#"{"user": {"uid": 0, "gid": 0}, "args": ["id"], "cwd": "/"}"#)
            .unwrap();
    let join = LinuxNamespaceBuilder::default()
        .typ(LinuxNamespaceType::Mount)
        .path("/proc/self/fd/9")
        .build()
        .unwrap();
    let exec = exec(&plan, process, vec![join]).unwrap();
    let linux = exec.spec.linux().clone().unwrap();
    assert!(linux.seccomp().is_some());
    assert!(linux.resources().is_none() && exec.spec.mounts().is_none());
    assert_eq!(linux.namespaces().as_ref().unwrap().len(), 1);
    let capabilities = exec
        .spec
        .process()
        .as_ref()
        .unwrap()
        .capabilities()
        .clone()
        .unwrap();
    assert_eq!(capabilities.bounding(), &Some(Capabilities::new()));
    assert_eq!(exec.oom_score_adj, 998);
}

#[test]
fn users_are_mapped_out_of_a_user_namespace() {
    let mapped = SPEC.replace(
        r#""namespaces": ["#,
        r#""uidMappings": [{"containerID": 0, "hostID": 65536, "size": 65536}],
           "gidMappings": [{"containerID": 0, "hostID": 65536, "size": 65536}],
           "namespaces": [{"type": "user"}, "#,
    );
    let plan = plan_of(&mapped, &["user"]).unwrap();
    assert_eq!(
        (plan.owner, root_of(&plan.spec)),
        (66_536, (65_536, 65_536))
    );
    assert!(plan.user_namespace, "joined when it is made");
    let linux = plan.spec.linux().clone().unwrap();
    let kinds: Vec<_> = linux
        .namespaces()
        .iter()
        .flatten()
        .map(|n| n.typ())
        .collect();
    assert!(!kinds.contains(&LinuxNamespaceType::User), "{kinds:?}");
    let unmapped = mapped.replace(r#""size": 65536"#, r#""size": 10"#);
    let error = plan_of(&unmapped, &["user"]).unwrap_err().to_string();
    assert_eq!(error, "user 1000 is not mapped in the user namespace");
    let error = plan_of(&mapped, &[]).unwrap_err().to_string();
    assert!(error.contains("the users of its pod"), "{error}");
    // What is mapped nowhere changes nobody.
    let plan = plan_of(&mapped.replace(r#"{"type": "user"}, "#, ""), &[]).unwrap();
    assert_eq!((plan.owner, root_of(&plan.spec)), (1000, (0, 0)));
}

#[test]
fn what_is_wrong_is_named() {
    let cases = [
        (
            r#""cwd": "/work""#,
            r#""cwd": "work""#,
            "working directory \"work\" is not absolute",
        ),
        (
            r#""uid": 1000"#,
            r#""uid": 4294967295"#,
            "4294967295 is not a valid user id",
        ),
        (
            r#"["/bin/echo", "hello"]"#,
            "[]",
            "the process has no program to run",
        ),
        (
            r#""A=1""#,
            r#""A=\u0000""#,
            "the environment of the process contains a NUL byte",
        ),
        (
            r#""/data""#,
            r#""/data/../../etc""#,
            "mount destination \"/data/../../etc\" is not a plain absolute path",
        ),
    ];
    for (from, to, expected) in cases {
        let json = SPEC.replace(from, to);
        assert_ne!(json, SPEC);
        assert_eq!(plan_of(&json, &[]).unwrap_err().to_string(), expected);
    }
    let no_process = r#"{"ociVersion": "1.2.0", "root": {"path": "r"}}"#;
    let error = plan_of(no_process, &[]).unwrap_err().to_string();
    assert_eq!(error, "the OCI spec has no process");
}
