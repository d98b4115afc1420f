//! Huge pages of the host's in a container.

use sepal_tests::Bed;
use serde_json::{Value, json};

/// Huge pages that the host has set aside, until it goes out of scope.
struct SetAside<'bed>(&'bed Bed);

impl<'bed> SetAside<'bed> {
    fn new(bed: &'bed Bed, count: u32) -> Self {
        bed.set_huge_pages(count);
        Self(bed)
    }
}

impl Drop for SetAside<'_> {
    fn drop(&mut self) {
        self.0.set_huge_pages(0);
    }
}

/// Takes all pages of the volume's, and asks for one more.
const TAKE: &str = r#"
import os
def meminfo(key):
    return next(line.split()[1] for line in open("/proc/meminfo") if line.startswith(key))
print(meminfo("HugePages_Total"))
file = os.open("/pages/file", os.O_RDWR | os.O_CREAT)
os.posix_fallocate(file, 0, 16 << 20)
print(meminfo("HugePages_Free"))
try:
    os.posix_fallocate(file, 16 << 20, 2 << 20)
    print("one more")
except OSError as error:
    print(error.strerror)
"#;

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_container_has_the_huge_pages_of_its_limit_from_the_host() {
    let bed = Bed::get();
    if !bed.has_vm() {
        // runc's shares the host's, all of them.
        return;
    }
    let _pages = SetAside::new(&bed, 8);
    let scratch = bed.scratch();
    // As the kubelet has it for an emptyDir.
    let (root, volume) = (
        scratch.file("root"),
        scratch.file("kubernetes.io~empty-dir/pages"),
    );
    let image = bed.image("python");
    let prepare = format!(
        "mkdir -p {root} {volume} && ctr image mount --rw {image} {root} && mount -t hugetlbfs -o pagesize=2M none {volume}"
    );
    bed.sh(&prepare).run().success();
    let spec = bed.command(["ctr", "oci", "spec"]).run().success().out();
    let mut spec: Value = serde_json::from_str(&spec).unwrap();
    spec["root"] = json!({ "path": root });
    spec["process"]["args"] = json!(["/usr/bin/python3", "-c", TAKE]);
    spec["linux"]["resources"]["hugepageLimits"] =
        json!([{ "pageSize": "2MB", "limit": 16 << 20 }]);
    let bind = json!({ "destination": "/pages", "type": "bind", "source": volume, "options": ["rbind", "rw"] });
    spec["mounts"].as_array_mut().unwrap().push(bind);
    let run = |spec: &Value| {
        let config = scratch.file("config.json");
        bed.write(&config, spec.to_string());
        let run = ["ctr", "run", "--rm", "--runtime", bed.runtime(), "--config"];
        bed.command(run).args([config, bed.unique("huge")]).run()
    };
    let told = run(&spec);
    spec["linux"]["resources"]["hugepageLimits"][0]["limit"] = json!(32 << 20);
    let refused = run(&spec);
    let clean = format!("umount {volume}; ctr image unmount --rm {root}");
    bed.sh(&clean).run().success();
    assert_eq!(told.success().out(), "8\n0\nNo space left on device");
    let reason = refused.failure().err();
    let expected = "huge pages: 32 MiB are wanted in this pod and the node has not as many left";
    assert!(reason.contains(expected), "{reason}");
}
