//! docs/pod-features.md says what pods can do by the tests that show it: all of them, and no other.

use std::collections::BTreeSet;
use std::path::Path;

/// `file::name` of each test of the cluster's.
fn tests_there_are(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(directory).expect("the tests' directory") {
        let path = entry.expect("its entries").path();
        let file = path.file_stem().unwrap_or_default().to_string_lossy();
        if !file.starts_with("kube_") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a test's source");
        for test in text.split("#[test]").skip(1) {
            let name = test
                .split("fn ")
                .nth(1)
                .and_then(|rest| rest.split('(').next());
            found.insert(format!("{file}::{}", name.expect("a function")));
        }
    }
    found
}

#[test]
fn the_table_of_pod_features_names_every_test_of_the_cluster_and_no_other() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = std::fs::read_to_string(tests.join("../docs/pod-features.md")).expect("the table");
    let told: BTreeSet<String> = table
        .split('`')
        .filter(|word| word.starts_with("kube_") && word.contains("::"))
        .map(String::from)
        .collect();
    let there = tests_there_are(&tests.join("tests"));
    assert!(there.len() > 50, "{there:?}");
    let missing: Vec<_> = there.difference(&told).collect();
    let invented: Vec<_> = told.difference(&there).collect();
    assert!(
        missing.is_empty() && invented.is_empty(),
        "missing {missing:?}, not there {invented:?}"
    );
}
