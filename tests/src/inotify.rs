//! A program that waits in inotify(7), as servers do that reload their configuration.

const WAIT: &str = r#"
import ctypes, os, struct, sys
KINDS = {0x4: "attrib", 0x80: "moved-to", 0x100: "create", 0x200: "delete", 0x400: "delete-self"}
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(0)
assert libc.inotify_add_watch(fd, sys.argv[1].encode(), int(sys.argv[2], 16)) > 0
told = open("/tmp/told", "w", buffering=1)
print("waits", file=told)
while data := os.read(fd, 65536):
    while data:
        _, mask, _, length = struct.unpack_from("iIII", data)
        name, data = data[16:16 + length].rstrip(b"\0").decode(), data[16 + length:]
        kinds = [kind for bit, kind in KINDS.items() if mask & bit]
        print(*kinds, name, file=told)
"#;

/// The command of a container with Python that waits for such events (a mask in hexadecimal) at a path
/// and notes them in /tmp/told, one a line, `waits` before the first.
pub const fn watch(path: &'static str, events: &'static str) -> [&'static str; 5] {
    ["python3", "-c", WAIT, path, events]
}
