//! Texts that are read on the host: the administrator's configuration, what a pod has left, the guest's
//! first words, the kernel's tables.

use std::path::{Component, Path};

use sepal_protocol::config::Config;
use sepal_protocol::mountinfo;
use sepal_protocol::ready::AgentReady;
use sepal_protocol::state::PodState;
use sepal_shim::annotations::Annotations;
use sepal_shim::cgroup;
use sepal_shim::limits::Totals;
use sepal_shim::size::{Host, Size};

use crate::input::Input;

/// Text in any of these formats.
pub fn texts(data: &[u8]) {
    let mut input = Input::new(data);
    let (kind, bytes) = (input.below(5), input.rest());
    let text = String::from_utf8_lossy(&bytes);
    match kind {
        0 => config(&text),
        1 => {
            if let Ok(ready) = serde_json::from_slice::<AgentReady>(&bytes) {
                let again = serde_json::to_vec(&ready).expect("it can be written");
                assert!(serde_json::from_slice::<AgentReady>(&again).is_ok());
            }
        }
        2 => {
            if let Ok(state) = serde_json::from_slice::<PodState>(&bytes) {
                let name = PodState::pod_id(&state.namespace, &state.id);
                assert!(name.len() <= 76, "{name:?} has no room in a socket's path");
            }
        }
        3 => {
            let path = mountinfo::unescape(&bytes);
            assert!(path.as_os_str().len() <= bytes.len());
            let found = cgroup::hierarchies(&text);
            let v1 = found.iter().any(|hierarchy| !hierarchy.v2);
            assert!(!v1 || found.iter().all(|hierarchy| !hierarchy.v2));
        }
        _ => {
            for systemd in [false, true] {
                if let Ok(path) = cgroup::directory(Some(Path::new(&*text)), "pod", systemd) {
                    let normal = |part| matches!(part, Component::Normal(_));
                    assert!(path.components().all(normal), "{path:?} leaves the root");
                }
            }
        }
    }
}

/// What a configuration allows is a size that a VM can be asked for.
fn config(text: &str) {
    let Ok(config) = Config::parse(text, Path::new("config.toml")) else {
        return;
    };
    let _ = config.guest_image();
    let host = Host {
        cpus: 4,
        memory: 8 << 30,
        huge: 1 << 30,
    };
    for memory in [None, Some(1), Some(512 << 20), Some(u64::MAX)] {
        let totals = Totals { memory, cpu: None };
        if let Ok(size) = Size::plan(&Annotations::new(), totals, &config, host) {
            assert!(size.memory.is_multiple_of(2 << 20));
            assert!((1..=64).contains(&size.cpus.boot) && size.cpus.boot <= size.cpus.max);
        }
    }
}
