//! What a container's root finds who wants to take over the guest: its kernel, its agent, its other
//! containers. The guest is not trusted by the host, but containers are not by the guest either.

use sepal_tests::Bed;

/// Each line it prints is an attempt and how it ended.
const ATTEMPTS: &str = include_str!("walls.py");

/// Attempts that succeed for whoever is privileged: they are made rightly.
const PRIVILEGED: [&str; 6] = [
    "mount tmpfs",
    "mount the share",
    "write sysctl",
    "write cgroup",
    "load BPF",
    "settimeofday",
];

/// Runs the attempts with these options of ctr; answers with the names of those that succeeded.
fn succeeded(bed: &Bed, options: &[&str]) -> Vec<String> {
    let python = bed.image("python");
    let argv = ["python3", "-u", "-c", ATTEMPTS];
    let said = bed.ctr_run(options, &python, argv).run().success().out();
    println!("{options:?}\n{said}");
    assert!(said.ends_with("end"), "{said}");
    let done = said.lines().filter_map(|line| line.strip_suffix(": DONE"));
    done.map(str::to_owned).collect()
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_container_s_root_cannot_take_over_the_guest() {
    let bed = Bed::get();
    let cgroup = |how: &str| format!("type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options={how}");
    let ordinary = succeeded(&bed, &["--mount", &cgroup("ro")]);
    assert_eq!(ordinary, Vec::<String>::new());
    let options = ["--privileged", "--mount", &cgroup("rw")];
    let privileged = succeeded(&bed, &options);
    for name in PRIVILEGED {
        assert!(
            privileged.iter().any(|done| done == name),
            "{name}: not in {privileged:?}"
        );
    }
}
