use sepal_protocol::cri::{
    IDMapping, LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceOption, UserNamespace,
};

use super::*;

fn any_of(config: &PodSandboxConfig) -> Option<Any> {
    Some(Any {
        type_url: POD_SANDBOX_CONFIG.into(),
        value: config.write_to_bytes().unwrap(),
        ..Default::default()
    })
}

fn plan(config: &PodSandboxConfig) -> Result<PodSpec> {
    let asked = SandboxRequest {
        id: "s1".into(),
        bundle: "/nonexistent".into(),
        options: any_of(config),
        netns: "/run/netns/x".into(),
        ..Default::default()
    };
    PodSpec::of_sandbox(&asked, "k8s.io+s1", &Config::default())
}

fn with_namespaces(options: NamespaceOption) -> PodSandboxConfig {
    let mut config = PodSandboxConfig::new();
    let linux = config.linux.mut_or_insert_default();
    let security: &mut LinuxSandboxSecurityContext = linux.security_context.mut_or_insert_default();
    security.namespace_options = protobuf::MessageField::some(options);
    config
}

#[test]
fn a_pod_is_what_kubernetes_describes() {
    let config = PodSandboxConfig {
        hostname: "web-0".into(),
        dns_config: protobuf::MessageField::some(DNSConfig {
            servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        }),
        annotations: [("io.sepal.vcpus".to_string(), "1".to_string())].into(),
        linux: protobuf::MessageField::some(LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/burstable/pod1".into(),
            sysctls: [
                ("kernel.shm_rmid_forced", "1"),
                ("net.ipv4.ping_group_range", "1 0"),
            ]
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .into(),
            resources: protobuf::MessageField::some(LinuxContainerResources {
                memory_limit_in_bytes: 512 << 20,
                cpu_quota: 400_000,
                cpu_period: 100_000,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let pod = plan(&config).unwrap();
    assert_eq!((pod.role, pod.bare), (Role::Sandbox, true));
    assert_eq!(pod.hostname, "web-0");
    assert_eq!((pod.size.memory, pod.size.cpus.boot), ((512 + 64) << 20, 1));
    assert_eq!(pod.network, Network::Join("/run/netns/x".into()));
    assert_eq!(pod.sysctls["kernel.shm_rmid_forced"], "1");
    assert_eq!(pod.sysctls["net.ipv4.ping_group_range"], "1 0");
    assert_eq!(pod.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
    assert_eq!(pod.shm_size, 64 << 20);
    for directory in &pod.cgroup.directories {
        assert!(directory.ends_with("kubepods/burstable/pod1/s1"));
    }
    assert_eq!(pod.files["hostname"], "web-0\n");
    assert_eq!(
        pod.files["resolv.conf"],
        "search a.svc svc\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"
    );
}

#[test]
fn a_pod_that_nobody_describes_has_the_defaults() {
    let asked = SandboxRequest {
        id: "s1".into(),
        bundle: "/nonexistent".into(),
        ..Default::default()
    };
    let pod = PodSpec::of_sandbox(&asked, "default+s1", &Config::default()).unwrap();
    assert_eq!(pod.network, Network::New);
    assert_eq!(pod.size.memory, Config::default().memory << 20);
    assert!(!pod.hostname.is_empty());
}

#[test]
fn an_oci_spec_describes_a_pod_as_well() {
    let bundle = tempfile::tempdir().unwrap();
    let text = r#"{"ociVersion": "", "hostname": "h", "annotations": {"io.sepal.memory": "300"}}"#;
    std::fs::write(bundle.path().join("config.json"), text).unwrap();
    let asked = SandboxRequest {
        id: "s1".into(),
        bundle: bundle.path().into(),
        ..Default::default()
    };
    let pod = PodSpec::of_sandbox(&asked, "default+s1", &Config::default()).unwrap();
    assert_eq!((pod.hostname.as_str(), pod.size.memory), ("h", 300 << 20));
}

#[test]
fn what_a_vm_cannot_be_is_refused_in_a_sentence() {
    let of_node = NamespaceMode::NODE.into();
    let host_network = with_namespaces(NamespaceOption {
        network: of_node,
        ..Default::default()
    });
    let host_pid = with_namespaces(NamespaceOption {
        pid: of_node,
        ..Default::default()
    });
    let host_ipc = with_namespaces(NamespaceOption {
        ipc: of_node,
        ..Default::default()
    });
    let no_users = with_users(NamespaceMode::POD, &[]);
    let no_root = with_users(NamespaceMode::POD, &[(1, 1000, 10)]);
    let own_users = with_users(NamespaceMode::CONTAINER, &[(0, 1000, 10)]);
    let long_name = PodSandboxConfig {
        hostname: "x".repeat(65),
        ..Default::default()
    };
    let unknown = PodSandboxConfig {
        annotations: [("io.sepal.kernel".to_string(), "/x".to_string())].into(),
        ..Default::default()
    };
    for (config, text) in [
        (host_network, "the host's network cannot be shared"),
        (host_pid, "hostPID"),
        (host_ipc, "hostIPC"),
        (no_users, "no mapping of its uids"),
        (no_root, "uid 0 is not mapped"),
        (own_users, "the pod's or the node's"),
        (long_name, "host name"),
        (unknown, "io.sepal.kernel is not known"),
    ] {
        let message = plan(&config).unwrap_err().to_string();
        assert!(message.contains(text), "{message}");
    }
}

fn with_users(mode: NamespaceMode, ranges: &[(u32, u32, u32)]) -> PodSandboxConfig {
    let range = |&(container_id, host_id, length): &(u32, u32, u32)| IDMapping {
        container_id,
        host_id,
        length,
        ..Default::default()
    };
    let ranges: Vec<_> = ranges.iter().map(range).collect();
    with_namespaces(NamespaceOption {
        userns_options: protobuf::MessageField::some(UserNamespace {
            mode: mode.into(),
            uids: ranges.clone(),
            gids: ranges,
            ..Default::default()
        }),
        ..Default::default()
    })
}

#[test]
fn users_are_the_nodes_or_the_pods() {
    let of_node = plan(&with_users(NamespaceMode::NODE, &[])).unwrap();
    assert!(of_node.users.is_none());
    let of_pod = plan(&with_users(NamespaceMode::POD, &[(0, 1000, 100_000)])).unwrap();
    assert_eq!(of_pod.users.unwrap().gid(5), 1005);
}

#[test]
fn options_of_another_kind_are_refused() {
    let asked = SandboxRequest {
        options: Some(Any {
            type_url: "example.com/other.Config".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let message = PodSpec::of_sandbox(&asked, "p", &Config::default())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("example.com/other.Config is not known"),
        "{message}"
    );
}

#[test]
fn cgroups_are_where_a_pause_containers_would_be() {
    let path = |parent| cgroups_path(parent, "s1").map(|p| p.display().to_string());
    assert_eq!(path(""), None);
    assert_eq!(path("/kubepods/pod1").unwrap(), "/kubepods/pod1/s1");
    assert_eq!(
        path("/kubepods.slice/kubepods-pod1.slice").unwrap(),
        "kubepods-pod1.slice:cri-containerd:s1"
    );
}
