//! What Kubernetes and containerd say of a pod and its containers: OCI specs, Kubernetes' description of a
//! pod, annotations, limits. Users write much of it.

use std::cell::RefCell;
use std::path::{Component, Path};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::{LinuxDeviceType, LinuxResources, Process, Spec};
use protobuf::Message;
use sepal_agent::plan::{self, Facts};
use sepal_protocol::config::Config;
use sepal_protocol::cri::PodSandboxConfig;
use sepal_shim::annotations::{Annotations, CriResources, Role};
use sepal_shim::disks;
use sepal_shim::limits::{self, Ledger, Limits};
use sepal_shim::podspec::{PodSpec, SandboxRequest};
use sepal_shim::resize::Demand;
use sepal_shim::size::{Host, Size};
use sepal_shim::spec;
use sepal_shim::sys::BindOptions;
use sepal_shim::users::Users;

use crate::input::Input;
use crate::json;

const HOST: Host = Host {
    cpus: 8,
    memory: 16 << 30,
    huge: 1 << 30,
};

thread_local! {
    static BUNDLE: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

/// Calls with a bundle's directory, one for each thread.
fn with_bundle(call: impl FnOnce(&Path)) {
    BUNDLE.with_borrow_mut(|bundle| {
        let make = || tempfile::tempdir().expect("there is a place for temporary files");
        call(bundle.get_or_insert_with(make).path());
    });
}

fn check_size(size: &Size) {
    assert!(size.memory.is_multiple_of(2 << 20) && size.memory <= size.max_memory);
    assert!(1 <= size.cpus.boot && size.cpus.boot <= size.cpus.max && size.cpus.max <= 64);
}

/// A spec in which there is something of everything, in JSON, after its first byte.
const WHOLE: &[u8] = include_bytes!("../corpus/oci_spec/seed-full-0");

/// The spec that an input tells: the whole one with changes, or by its text. Its first byte, which tells the
/// container's role as well, says which.
pub fn spec_text(input: &mut Input) -> (Role, Vec<u8>) {
    let first = input.byte();
    let role = match first % 3 {
        0 => Role::Alone,
        1 => Role::Sandbox,
        _ => Role::Member {
            sandbox: "pod".into(),
        },
    };
    let text = match first / 3 % 2 {
        0 => input.rest(),
        _ => {
            let whole = serde_json::from_slice(&WHOLE[1..]).expect("the seed is JSON");
            json::changed(whole, input).to_string().into_bytes()
        }
    };
    (role, text)
}

/// A container's OCI spec, from the bundle to what libcontainer is given in the guest.
pub fn oci_spec(data: &[u8]) {
    let (role, text) = spec_text(&mut Input::new(data));
    if let Ok(spec) = serde_json::from_slice::<Spec>(&text) {
        // The agent believes no more of a spec than the shim does.
        in_guest(spec, &["ipc".into(), "pid".into()]);
    } else {
        let _ = serde_json::from_slice::<Process>(&text);
        let _ = serde_json::from_slice::<LinuxResources>(&text);
        return;
    }
    with_bundle(|bundle| {
        std::fs::write(bundle.join("config.json"), &text).expect("a bundle can be written");
        if let Ok(pod) = PodSpec::of_container("id", "ns+id", bundle, &Config::default()) {
            check_size(&pod.size);
        }
        let Ok(spec) = spec::load(bundle) else { return };
        let _ = disks::wanted(&spec);
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        let _ = Demand::of(resources, &role);
        let _ = spec::console_size(spec.process().as_ref());
        // It is the pod's first container as well.
        let Ok(users) = spec::users(&spec) else {
            return;
        };
        let kept = |_: &Path, _: &BindOptions, _: Option<&Users>| None;
        let made = spec::Plan::new(spec, "id", &role, bundle, users.as_ref(), &kept);
        let Ok(mut plan) = made else { return };
        plan.complete(["hosts", "resolv.conf"].into_iter());
        let hooks = plan.guest.hooks().as_ref();
        let left = hooks.is_some_and(|hooks| hooks.create_runtime().is_some());
        assert!(!left, "hooks of the host reach the guest");
        in_guest(plan.guest, &plan.shared_namespaces);
    });
}

fn in_guest(spec: Spec, shared: &[String]) {
    let facts = Facts {
        cgroup_file: &|name| name.len() % 2 == 0,
        device: &|device| (device.major() != 7).then_some((LinuxDeviceType::C, 1, device.minor())),
    };
    let root = Path::new("/run/sepal/share/id/rootfs");
    let Ok(made) = plan::container(spec, shared, root, &facts) else {
        return;
    };
    check_plan(&made);
    let at_root = made.spec.root().as_ref().map(|at| at.path() == root);
    assert_eq!(at_root, Some(true), "another root");
    for mount in made.spec.mounts().iter().flatten() {
        let mut parts = mount.destination().components();
        let plain = parts.all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        assert!(plain, "a mount at {:?}", mount.destination());
    }
    let linux = made.spec.linux().as_ref().expect("it was made");
    let joined = |namespace: &oci_spec::runtime::LinuxNamespace| namespace.path().is_some();
    assert!(!linux.namespaces().iter().flatten().any(joined));
    if let Some(process) = made.spec.process().clone()
        && let Ok(further) = plan::exec(&made, process, Vec::new())
    {
        check_plan(&further);
    }
}

fn check_plan(plan: &plan::Plan) {
    assert!(plan.args.first().is_some_and(|program| !program.is_empty()));
    let process = plan.spec.process().as_ref().expect("it was made");
    assert!(process.cwd().is_absolute() && process.capabilities().is_some());
}

/// Kubernetes' description of a pod, as the sandbox API brings it.
pub fn pod_spec(data: &[u8]) {
    let mut input = Input::new(data);
    let (how, description) = (input.byte(), input.rest());
    let kind = match how & 3 {
        0 | 1 => "runtime.v1.PodSandboxConfig",
        2 => "type.googleapis.com/runtime.v1.PodSandboxConfig",
        _ => "",
    };
    let asked = SandboxRequest {
        id: "id".into(),
        bundle: "/nonexistent".into(),
        options: Some(Any {
            type_url: kind.into(),
            value: description.clone(),
            ..Default::default()
        }),
        netns: if how & 4 == 0 { "/run/netns/x" } else { "" }.into(),
        annotations: Annotations::new(),
    };
    if let Ok(pod) = PodSpec::of_sandbox(&asked, "ns+id", &Config::default()) {
        check_size(&pod.size);
        assert!(pod.hostname.len() <= 64 && !pod.hostname.contains(['\n', '\0']));
    }
    if let Ok(wanted) = PodSandboxConfig::parse_from_bytes(&description) {
        let again = wanted.write_to_bytes().expect("it can be written");
        assert!(PodSandboxConfig::parse_from_bytes(&again).is_ok());
    }
}

/// Annotations, and limits that change while containers come and go.
pub fn limits(data: &[u8]) {
    let mut input = Input::new(data);
    let annotations = annotations(&mut input);
    let config = Config {
        max_vcpus: 1 + input.byte() % 64,
        ..Config::default()
    };
    let cri = CriResources::of(&annotations);
    let told = resources(&mut input).map_or_else(Limits::default, |given| Limits::of(Some(&given)));
    let alone = Role::of(&annotations) == Role::Alone;
    let mut ledger = Ledger::new(told.of_pod(cri), alone);
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        let account = limits::account(["a", "b", "c"][input.below(3)], &annotations);
        match input.below(3) {
            0 => ledger.forget(&account),
            _ => {
                if let Some(given) = resources(&mut input) {
                    let changed = ledger.get(&account).changed(&given);
                    ledger.set(&account, changed);
                }
            }
        }
        let _ = (ledger.in_part(), ledger.huge());
        if let Ok(size) = Size::plan(&annotations, ledger.totals(), &config, HOST) {
            check_size(&size);
        }
    }
}

/// Known keys and others, with any values.
fn annotations(input: &mut Input) -> Annotations {
    const KEYS: [&str; 11] = [
        "io.sepal.vcpus",
        "io.sepal.memory",
        "io.sepal.max_vcpus",
        "io.sepal.max_memory",
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
        "io.kubernetes.cri.sandbox-memory",
        "io.kubernetes.cri.sandbox-cpu-quota",
        "io.kubernetes.cri.sandbox-cpu-period",
        "io.kubernetes.cri.container-name",
        "io.sepal.unknown",
    ];
    let mut annotations = Annotations::new();
    for _ in 0..input.below(8) {
        let key = KEYS[input.below(KEYS.len())];
        let value = match input.below(4) {
            0 => input.byte().to_string(),
            1 => (input.u64() as i64).to_string(),
            2 => ["container", "sandbox"][input.below(2)].into(),
            _ => String::from_utf8_lossy(&input.some()).into_owned(),
        };
        annotations.insert(key.into(), value);
    }
    annotations
}

fn resources(input: &mut Input) -> Option<LinuxResources> {
    let (memory, quota, period) = (input.u64() as i64, input.u64() as i64, input.u64());
    let text =
        format!(r#"{{"memory":{{"limit":{memory}}},"cpu":{{"quota":{quota},"period":{period}}}}}"#);
    serde_json::from_str(&text).ok()
}
