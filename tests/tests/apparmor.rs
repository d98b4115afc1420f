//! AppArmor profiles: the host's, enforced where the processes are.

use sepal_tests::Bed;

/// Whether the host has AppArmor and what loads its profiles. Says so when it has not.
fn has_apparmor(bed: &Bed) -> bool {
    let look = "test -d /sys/kernel/security/apparmor && command -v apparmor_parser";
    let has = bed.sh(look).run().ok();
    if !has {
        println!("left out: about AppArmor, and this bed's kernel has none");
    }
    has
}

/// A profile of the host's that goes with this guard.
struct Profile<'bed> {
    bed: &'bed Bed,
    name: String,
}

impl<'bed> Profile<'bed> {
    /// One that allows everything but what `denied` says.
    fn load(bed: &'bed Bed, denied: &str) -> Self {
        let name = bed.unique("sepal-test");
        let text = format!(
            "profile {name} flags=(attach_disconnected) {{ \
               file, capability, network, signal, ptrace, mount, umount, pivot_root, unix, dbus, \
               {denied} \
             }}\n"
        );
        let load = ["apparmor_parser", "--replace", "--skip-cache"];
        bed.command(load).stdin(text).run().success();
        Self { bed, name }
    }
}

impl Drop for Profile<'_> {
    fn drop(&mut self) {
        let text = format!("profile {} {{}}\n", self.name);
        let remove = ["apparmor_parser", "--remove"];
        self.bed.command(remove).stdin(text).run();
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_profile_is_enforced_in_the_container_and_its_execs() {
    let bed = Bed::get();
    if !has_apparmor(&bed) {
        return;
    }
    let profile = Profile::load(&bed, "deny /tmp/denied* w,");
    let options = ["--apparmor-profile", &profile.name];
    let said = bed
        .ctr_run(&options, &bed.busybox(), ["cat", "/proc/self/attr/current"])
        .run()
        .success();
    assert_eq!(said.out(), format!("{} (enforce)", profile.name));

    let container = bed.ctr_start(&options, &bed.busybox(), &["sleep", "1000"]);
    let current = "cat /proc/self/attr/current; touch /tmp/allowed";
    let said = container.sh(current).success();
    assert_eq!(said.out(), format!("{} (enforce)", profile.name));
    let refused = container.sh("touch /tmp/denied").failure();
    assert!(refused.err().contains("Permission denied"), "{refused:?}");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_container_without_a_profile_is_unconfined() {
    let bed = Bed::get();
    if !has_apparmor(&bed) {
        return;
    }
    let said = bed.busybox_run(["cat", "/proc/self/attr/current"]);
    assert_eq!(said.success().out(), "unconfined");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_profile_that_is_not_loaded_is_refused() {
    let bed = Bed::get();
    let options = ["--apparmor-profile", "sepal-no-such-profile"];
    let refused = bed
        .ctr_run(&options, &bed.busybox(), ["true"])
        .run()
        .failure();
    if bed.has_vm() {
        let text = refused.report();
        let sentence = "AppArmor profile \"sepal-no-such-profile\" is not loaded on the host";
        assert!(text.contains(sentence), "{text}");
    }
}
