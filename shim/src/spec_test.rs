use serde_json::json;

use super::*;

fn spec(extra: serde_json::Value) -> Spec {
    let mut base = json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
        "root": {"path": "rootfs", "readonly": true},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network"}]},
        "mounts": []
    });
    for (key, value) in extra.as_object().unwrap() {
        base[key] = value.clone();
    }
    serde_json::from_value(base).unwrap()
}

fn plan(extra: serde_json::Value, role: &Role) -> Result<Plan, Error> {
    plan_for(extra, role, None)
}

fn plan_for(extra: serde_json::Value, role: &Role, pod: Option<&Users>) -> Result<Plan, Error> {
    let none = |_: &Path, _: &BindOptions, _: Option<&Users>| None;
    Plan::new(spec(extra), "c1", role, Path::new("/bundle"), pod, &none)
}

#[test]
fn whose_processes_a_container_shares_is_told_by_a_pid_of_the_host() {
    let of = |role: &Role, path: &str| {
        let namespaces = json!([{ "type": "pid", "path": path }]);
        let spec = spec(json!({ "linux": { "namespaces": namespaces } }));
        pid_namespace_of(&spec, role)
    };
    let member = Role::Member {
        sandbox: "s1".into(),
    };
    assert_eq!(of(&member, "/proc/4711/ns/pid"), Some(4711));
    for path in ["/var/run/pidns/1", "/proc/self/ns/pid", "/proc/4711/ns/net"] {
        assert_eq!(of(&member, path), None, "{path}");
    }
    assert_eq!(of(&Role::Sandbox, "/proc/4711/ns/pid"), None);
}

#[test]
fn the_root_becomes_a_guest_path_and_stays_read_only() {
    let plan = plan(json!({}), &Role::Alone).unwrap();
    let root = plan.guest.root().as_ref().unwrap();
    assert_eq!(root.path(), Path::new("/run/sepal/share/c1/rootfs"));
    assert_eq!(root.readonly(), Some(true));
}

#[test]
fn the_root_is_the_specs_or_the_bundles() {
    for (given, expected) in [
        (json!({}), "/bundle/rootfs"),
        (json!({ "root": { "path": "files" } }), "/bundle/files"),
        (json!({ "root": { "path": "/srv/files" } }), "/srv/files"),
    ] {
        let plan = plan(given, &Role::Alone).unwrap();
        assert_eq!(plan.root, Path::new(expected));
    }
}

#[test]
fn binds_are_numbered_and_keep_their_options() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let mounts = json!({"mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/d", "type": "bind", "source": dir.path(), "options": ["rbind", "rro"]},
        {"destination": "/f", "type": "none", "source": file, "options": ["bind", "ro"]},
    ]});
    let plan = plan(mounts, &Role::Alone).unwrap();
    let sources: Vec<_> = plan
        .guest
        .mounts()
        .iter()
        .flatten()
        .map(|m| m.source().clone().unwrap())
        .collect();
    assert_eq!(sources[0], Path::new("proc"));
    assert_eq!(sources[1], Path::new("/run/sepal/share/c1/mounts/0"));
    assert_eq!(sources[2], Path::new("/run/sepal/share/c1/mounts/1"));
    assert!(plan.binds[0].directory && plan.binds[0].options.recursive_read_only);
    assert!(!plan.binds[1].directory && !plan.binds[1].options.recursive);
    assert!(plan.binds[1].options.read_only);
}

#[test]
fn sockets_devices_and_absent_sources_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (source, text) in [
        (socket.as_path(), "is a socket"),
        (Path::new("/dev/null"), "is a device"),
        (
            Path::new("/nonexistent"),
            "mount source /nonexistent for /x does not exist",
        ),
    ] {
        let mounts = json!({"mounts": [
            {"destination": "/x", "type": "bind", "source": source, "options": ["rbind"]}
        ]});
        let message = plan(mounts, &Role::Alone).unwrap_err().to_string();
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn the_pods_shm_is_the_guests_own() {
    let at_shm = |source: &str| {
        json!({"mounts": [
            {"destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind"]}
        ]})
    };
    let mounts = at_shm("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/s/shm");
    let role = Role::Member {
        sandbox: "s".into(),
    };
    assert!(shm_size(&spec(mounts.clone()), &role) > 0);
    assert_eq!(shm_size(&spec(mounts.clone()), &Role::Alone), 0);
    let plan = plan(mounts, &role).unwrap();
    assert!(plan.binds.is_empty());
    let mount = &plan.guest.mounts().as_ref().unwrap()[0];
    assert_eq!(
        mount.source().as_deref(),
        Some(Path::new(paths::guest::SHM))
    );
    // An emptyDir of medium Memory, which databases have there.
    let volume = self::plan(at_shm("/dev"), &role).unwrap();
    assert_eq!(volume.binds.len(), 1);
    assert_eq!(volume.binds[0].source, Path::new("/dev"));
}

#[test]
fn namespaces_are_shared_as_the_role_says() {
    let linux = json!({"linux": {"namespaces": [
        {"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"},
        {"type": "network", "path": "/var/run/netns/x"}, {"type": "mount"}
    ]}});
    let member = plan(
        linux.clone(),
        &Role::Member {
            sandbox: "s".into(),
        },
    )
    .unwrap();
    assert_eq!(member.shared_namespaces, ["ipc", "network"]);
    let left = member
        .guest
        .linux()
        .as_ref()
        .unwrap()
        .namespaces()
        .as_ref()
        .unwrap();
    assert!(
        left.iter().all(|n| n.path().is_none()),
        "no host path reaches the guest"
    );
    let sandbox = plan(json!({}), &Role::Sandbox).unwrap();
    assert_eq!(sandbox.shared_namespaces, ["pid", "ipc", "network"]);
    let alone = plan(linux, &Role::Alone).unwrap_err();
    assert!(matches!(alone, Error::ForeignNamespace { .. }), "{alone}");
}

#[test]
fn the_network_is_joined_made_or_refused() {
    let with = |namespaces: serde_json::Value| {
        network(&spec(json!({"linux": {"namespaces": namespaces}})))
    };
    assert_eq!(with(json!([{"type": "network"}])).unwrap(), Network::New);
    assert_eq!(
        with(json!([{"type": "network", "path": "/run/netns/a"}])).unwrap(),
        Network::Join("/run/netns/a".into())
    );
    assert!(matches!(
        with(json!([{"type": "pid"}])),
        Err(Error::HostNetwork)
    ));
}

#[test]
fn only_hooks_of_the_container_reach_the_guest() {
    let hook = json!([{"path": "/bin/true"}]);
    let hooks = json!({"hooks": {
        "createRuntime": hook, "prestart": hook, "poststop": hook, "startContainer": hook
    }});
    let mut whole = spec(hooks);
    let host = take_host_hooks(&mut whole);
    assert_eq!(host.create_runtime().as_ref().unwrap().len(), 1);
    assert_eq!(host.poststop().as_ref().unwrap().len(), 1);
    let guest = whole.hooks().as_ref().unwrap();
    assert!(guest.create_runtime().is_none() && guest.poststop().is_none());
    assert!(guest.start_container().is_some());
}

#[test]
fn a_spec_without_a_process_is_refused() {
    let mut bare = spec(json!({}));
    bare.set_process(None);
    let none = |_: &Path, _: &BindOptions, _: Option<&Users>| None;
    let plan = Plan::new(bare, "c1", &Role::Alone, Path::new("/b"), None, &none);
    let error = plan.unwrap_err();
    assert!(matches!(error, Error::NoProcess));
}

#[test]
fn a_member_of_a_bare_pod_gets_the_pods_files_and_memory() {
    let role = Role::Member {
        sandbox: "s1".into(),
    };
    let shm = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm"});
    let hosts = json!({"destination": "/etc/hosts", "type": "tmpfs", "source": "mine"});
    let joins = json!([
        {"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}, {"type": "network"}
    ]);
    let with = |namespaces: &serde_json::Value| {
        let text = json!({"mounts": [shm, hosts], "linux": {"namespaces": namespaces}});
        let mut plan = plan(text, &role).unwrap();
        plan.complete(["hosts", "hostname"].into_iter());
        let mounts = plan.guest.mounts().clone().unwrap();
        let source = |m: &Mount| m.source().clone().unwrap().display().to_string();
        let pairs = mounts.iter().map(|m| (m.destination().clone(), source(m)));
        pairs.collect::<std::collections::HashMap<_, _>>()
    };
    let mounts = with(&joins);
    assert_eq!(mounts[Path::new("/dev/shm")], paths::guest::SHM);
    assert_eq!(mounts[Path::new("/etc/hosts")], "mine", "its own stays");
    assert_eq!(
        mounts[Path::new("/etc/hostname")],
        "/run/sepal/etc/hostname"
    );
    let alone = with(&json!([{"type": "pid"}, {"type": "ipc"}, {"type": "network"}]));
    assert_eq!(alone[Path::new("/dev/shm")], "shm", "with its own IPC");
}

#[test]
fn a_bundle_without_a_spec_is_a_sandboxs() {
    let bundle = tempfile::tempdir().unwrap();
    assert!(is_sandbox(bundle.path()));
    std::fs::write(bundle.path().join("config.json"), "{}").unwrap();
    assert!(!is_sandbox(bundle.path()));
    let controllers = "/run/containerd/io.containerd.sandbox.controller.v1.shim/default/s1";
    assert!(is_sandbox(Path::new(controllers)));
}

fn member() -> Role {
    Role::Member {
        sandbox: "s".into(),
    }
}

#[test]
fn the_hosts_ipc_and_pid_namespaces_are_refused_by_the_option_that_asks() {
    let with = |names: &[&str], role: &Role| {
        let namespaces: Vec<_> = names.iter().map(|name| json!({"type": name})).collect();
        plan(json!({"linux": {"namespaces": namespaces}}), role).map(drop)
    };
    for role in [Role::Alone, Role::Sandbox, member()] {
        for (names, text) in [
            (["pid", "network"], "the host's IPC namespace"),
            (["ipc", "network"], "--pid=host or hostPID"),
        ] {
            let message = with(&names, &role).unwrap_err().to_string();
            assert!(message.contains(text), "{role:?}: {message}");
        }
        assert!(with(&["pid", "ipc", "network"], &role).is_ok(), "{role:?}");
    }
}

/// A spec with a user namespace.
fn with_users(mounts: &serde_json::Value) -> serde_json::Value {
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    json!({"mounts": mounts, "linux": {
        "namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "user", "path": "/proc/7/ns/user"}
        ],
        "uidMappings": mapping, "gidMappings": mapping
    }})
}

#[test]
fn containers_have_the_users_of_their_pod() {
    let given = with_users(&json!([]));
    let pod = users(&spec(given.clone())).unwrap().unwrap();
    assert_eq!(pod.uid(1), 100_001);
    for role in [Role::Sandbox, member(), Role::Alone] {
        let plan = plan_for(given.clone(), &role, Some(&pod));
        // The namespace of the host's path is nobody's any more.
        assert!(plan.unwrap().shared_namespaces.contains(&"user".into()));
        let error = self::plan(given.clone(), &role).unwrap_err();
        assert!(matches!(error, Error::OtherUsers), "{error}");
        let error = plan_for(json!({}), &role, Some(&pod)).unwrap_err();
        assert!(matches!(error, Error::OtherUsers), "{error}");
    }
    let mut without = given;
    without["linux"]["gidMappings"] = json!([]);
    let message = users(&spec(without)).unwrap_err().to_string();
    assert!(message.contains("no mapping of its gids"), "{message}");
}

#[test]
fn volumes_show_owners_as_their_mappings_or_the_containers_say() {
    let dir = tempfile::tempdir().unwrap();
    let mapping = json!([{"containerID": 0, "hostID": 5000, "size": 10}]);
    let volume = |options: &[&str], mapping: Option<&serde_json::Value>| {
        let mut mount = json!({
            "destination": "/v", "type": "bind", "source": dir.path(), "options": options
        });
        if let Some(mapping) = mapping {
            mount["uidMappings"] = mapping.clone();
            mount["gidMappings"] = mapping.clone();
        }
        json!([mount])
    };
    let pod = users(&spec(with_users(&json!([])))).unwrap();
    for (options, mapping, expected) in [
        (&["rbind"][..], None, None),
        (&["rbind"], Some(&mapping), Some((5000, false))),
        (&["rbind", "ridmap"], Some(&mapping), Some((5000, true))),
        (&["rbind", "idmap"], None, Some((100_000, false))),
    ] {
        let given = with_users(&volume(options, mapping));
        let plan = plan_for(given, &member(), pod.as_ref()).unwrap();
        let owners = plan.binds[0].owners.as_ref();
        let found = owners.map(|owners| (owners.users.uid(0), owners.recursive));
        assert_eq!(found, expected, "{options:?}");
        let mount = &plan.guest.mounts().as_ref().unwrap()[0];
        assert!(mount.uid_mappings().is_none() && mount.gid_mappings().is_none());
        assert_eq!(mount.options().as_ref().unwrap(), &["rbind"]);
    }
    let of_nobody = json!({"mounts": volume(&["rbind", "idmap"], None)});
    let message = plan(of_nobody, &Role::Alone).unwrap_err().to_string();
    assert!(
        message.contains("volume /v is to show other owners"),
        "{message}"
    );
    let half = json!({"mounts": [{
        "destination": "/v", "type": "bind", "source": dir.path(), "uidMappings": mapping
    }]});
    let message = plan(half, &Role::Alone).unwrap_err().to_string();
    assert!(message.contains("no mapping of its gids"), "{message}");
}

#[test]
fn volumes_follow_their_sources_only_where_that_is_asked_for_and_possible() {
    let dir = tempfile::tempdir().unwrap();
    let bind = |options: &[&str]| {
        let mounts = json!({"mounts": [{
            "destination": "/v", "type": "bind", "source": dir.path(), "options": options
        }]});
        plan(mounts, &Role::Alone).map(|plan| plan.binds[0].options)
    };
    for (options, follows) in [
        (&["rbind"][..], false),
        (&["rbind", "rprivate", "rro"], false),
        (&["rbind", "rslave", "ro"], true),
    ] {
        assert_eq!(bind(options).unwrap().follows_source, follows);
    }
    for (options, text) in [
        (["rbind", "rshared", "rw"], "cannot appear on the host"),
        (["rbind", "rslave", "rro"], "cannot be both rro and rslave"),
    ] {
        let message = bind(&options).unwrap_err().to_string();
        assert!(message.contains(text), "{message}");
    }
}
