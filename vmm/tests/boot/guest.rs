//! Guests made on the spot: machine code as a kernel, or as PID 1 of a real one.

use std::ffi::OsStr;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use sepal_protocol::control::{self, Request, Response};
use sepal_protocol::vm::{CpuSpec, ExitCause, JailSpec, KernelSpec, MemorySpec, VmSpec};

/// The user that it becomes.
pub const USER: u32 = 2_000_000_001;

/// A VMM under test. Dropping it kills it.
pub struct Vmm {
    pub child: Child,
    /// The shim's end of the control socket.
    pub control: Option<OwnedFd>,
    pub dir: tempfile::TempDir,
}

/// Whether this machine has KVM. Says so if not.
pub fn kvm() -> bool {
    let there = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !there {
        eprintln!("skipped: no usable /dev/kvm on this machine");
    }
    there
}

fn probe() -> serde_json::Value {
    let output = Command::new(env!("CARGO_BIN_EXE_sepal-vmm"))
        .arg("--probe")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The real kernel for this machine's KVM, if one has been built. Says so if not.
pub fn linux() -> Option<PathBuf> {
    if !kvm() {
        return None;
    }
    let flavour = probe()["flavour"].as_str().unwrap().to_owned();
    let cache = std::env::var_os("SEPAL_CACHE").unwrap_or_else(|| "/var/cache/sepal".into());
    let kernel = PathBuf::from(cache).join(format!("kernel-{flavour}-latest/vmlinux"));
    if kernel.exists() {
        return Some(kernel);
    }
    eprintln!("skipped: no kernel at {}", kernel.display());
    None
}

impl Vmm {
    /// Starts a VMM that waits for its first request.
    pub fn spawn() -> Self {
        Self::spawn_with(&[])
    }

    /// The same with more arguments.
    pub fn spawn_with(arguments: &[&OsStr]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sepal-vmm"));
        command.args(["--log", "info"]).args(arguments);
        Self::spawn_by(command)
    }

    /// The same by a command that ends with the program and its arguments.
    pub fn spawn_by(mut command: Command) -> Self {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        command.args(["--control-fd", "3"]).stdin(Stdio::null());
        let fd = theirs.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe and its arguments are plain numbers.
        unsafe {
            command.pre_exec(move || match libc::dup2(fd, 3) {
                3 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command.spawn().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("vm")).unwrap();
        Self {
            child,
            control: Some(ours),
            dir,
        }
    }

    /// A specification for this VMM, small and without extras.
    pub fn spec(&self, kernel: PathBuf) -> VmSpec {
        VmSpec {
            pod_id: "test".into(),
            cpus: CpuSpec { boot: 1, max: 1 },
            memory: MemorySpec {
                size: 256 << 20,
                max: 0,
                hugepages: false,
                max_huge: 0,
                mergeable: false,
            },
            kernels: KernelSpec {
                hardware: Some(kernel.clone()),
                deprivileged: Some(kernel),
            },
            cmdline: "noreplace-smp".into(),
            image: None,
            initrd: None,
            vsock: self.dir.path().join("vm/vsock"),
            control: Some(self.dir.path().join("control.sock")),
            console: Some(self.dir.path().join("console.log")),
            jail: nix::unistd::geteuid().is_root().then(|| JailSpec {
                root: self.dir.path().join("vm"),
                user: USER,
            }),
            early_console: false,
            fs: vec![],
            net: vec![],
            blk: vec![],
            balloon: true,
        }
    }

    /// Sends a request on the shim's socket and takes the answer.
    pub fn ask(&self, request: &Request) -> Response {
        self.ask_with(request, &[])
    }

    /// The same with descriptors.
    pub fn ask_with(&self, request: &Request, fds: &[i32]) -> Response {
        let socket = self.control.as_ref().unwrap();
        control::send(socket, request, fds).unwrap();
        control::receive::<Response>(socket).unwrap().0
    }

    /// Boots and insists on success.
    pub fn boot(&self, spec: VmSpec) {
        let response = self.ask(&Request::Boot(Box::new(spec)));
        assert!(matches!(response, Response::Booted(_)), "{response:?}");
    }

    /// What the guest has written to its console.
    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.dir.path().join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the console says `text`.
    pub fn expect(&self, text: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        while !self.console().contains(text) {
            assert!(Instant::now() < end, "no {text:?} in:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> ExitCause {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let code = status.code().unwrap_or_else(|| panic!("killed: {status}"));
                return ExitCause::from_status(code).unwrap_or_else(|| panic!("status {code}"));
            }
            assert!(
                Instant::now() < end,
                "it does not end; console:\n{}",
                self.console()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Writes a file beside the VMM's sockets.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::File::create(&path)
            .unwrap()
            .write_all(bytes)
            .unwrap();
        path
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Has it ended by itself, there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An ELF file with one segment, `code`, loaded to `address` and started at its first byte, and the
/// mark of a kernel that runs on KVM of either flavour.
pub fn elf(address: u64, code: &[u8]) -> Vec<u8> {
    let mut file = vec![0_u8; 64];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    file[16..18].copy_from_slice(&2_u16.to_le_bytes());
    file[18..20].copy_from_slice(&62_u16.to_le_bytes());
    file[20..24].copy_from_slice(&1_u32.to_le_bytes());
    file[24..32].copy_from_slice(&(address + 0x1000).to_le_bytes());
    file[32..40].copy_from_slice(&64_u64.to_le_bytes());
    file[52..54].copy_from_slice(&64_u16.to_le_bytes());
    file[54..56].copy_from_slice(&56_u16.to_le_bytes());
    file[56..58].copy_from_slice(&2_u16.to_le_bytes());
    file.extend_from_slice(&1_u32.to_le_bytes()); // PT_LOAD
    file.extend_from_slice(&7_u32.to_le_bytes()); // rwx
    let size = 0x1000 + code.len() as u64;
    for value in [0, address, address, size, size, 0x1000] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    let note = b"\x06\0\0\0\x04\0\0\0\x01\0\0\0Sepal\0\0\0\x01\0\0\0";
    file.extend_from_slice(&4_u32.to_le_bytes()); // PT_NOTE
    file.extend_from_slice(&4_u32.to_le_bytes()); // r--
    for value in [64 + 2 * 56, 0, 0, note.len() as u64, 0, 4] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(note);
    file.resize(0x1000, 0);
    file.extend_from_slice(code);
    file
}

/// A kernel of these instructions, followed by an endless loop.
pub fn bare(code: &[u8]) -> Vec<u8> {
    let mut all = code.to_vec();
    all.extend_from_slice(&[0xeb, 0xfe]); // jmp $
    elf(0x100_0000, &all)
}

/// `mov dx, port; mov al, value; out dx, al`.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// A PID 1: writes `text` to the console, then does `then`, then starts again.
pub fn init(text: &str, then: &[u8]) -> Vec<u8> {
    let mut code = Vec::new();
    code.extend_from_slice(&[0xb8, 1, 0, 0, 0]); // mov eax, write
    code.extend_from_slice(&[0xbf, 1, 0, 0, 0]); // mov edi, 1
    code.extend_from_slice(&[0x48, 0x8d, 0x35]); // lea rsi, [rip + text]
    let lea = code.len();
    code.extend_from_slice(&[0; 4]);
    code.push(0xba); // mov edx, length
    code.extend_from_slice(&(text.len() as u32).to_le_bytes());
    code.extend_from_slice(&[0x0f, 0x05]); // syscall
    code.extend_from_slice(then);
    let back = -(code.len() as i32 + 5);
    code.push(0xe9); // jmp to the start
    code.extend_from_slice(&back.to_le_bytes());
    let distance = (code.len() - lea - 4) as u32;
    code[lea..lea + 4].copy_from_slice(&distance.to_le_bytes());
    code.extend_from_slice(text.as_bytes());
    elf(0x40_0000, &code)
}

/// reboot(2) with this command.
pub fn reboot(command: u32) -> Vec<u8> {
    let mut code = vec![0xb8, 169, 0, 0, 0]; // mov eax, reboot
    code.extend_from_slice(&[0xbf, 0xad, 0xde, 0xe1, 0xfe]); // mov edi, magic
    code.extend_from_slice(&[0xbe, 0x69, 0x19, 0x12, 0x28]); // mov esi, magic 2
    code.push(0xba); // mov edx, command
    code.extend_from_slice(&command.to_le_bytes());
    code.extend_from_slice(&[0x0f, 0x05]);
    code
}

/// exit(2) with status 7: a PID 1 that ends is a kernel panic.
pub fn exit() -> Vec<u8> {
    vec![0xb8, 60, 0, 0, 0, 0xbf, 7, 0, 0, 0, 0x0f, 0x05]
}

/// A tenth of a second: select(2) without descriptors, the time on the stack.
pub fn sleep() -> Vec<u8> {
    let mut code = vec![0x68]; // push 100000 (tv_usec)
    code.extend_from_slice(&100_000_u32.to_le_bytes());
    code.extend_from_slice(&[0x6a, 0]); // push 0 (tv_sec)
    code.extend_from_slice(&[0xb8, 23, 0, 0, 0]); // mov eax, select
    code.extend_from_slice(&[0x31, 0xff, 0x31, 0xf6, 0x31, 0xd2]); // edi = esi = edx = 0
    code.extend_from_slice(&[0x4d, 0x31, 0xd2]); // xor r10, r10
    code.extend_from_slice(&[0x49, 0x89, 0xe0]); // mov r8, rsp
    code.extend_from_slice(&[0x0f, 0x05, 0x58, 0x58]); // syscall; pop; pop
    code
}

/// Waits for a signal that is blocked from here on: rt_sigprocmask(2), rt_sigtimedwait(2).
pub fn wait_for_signal(signal: u8) -> Vec<u8> {
    let mut code = vec![0x48, 0xb8]; // mov rax, the set
    code.extend_from_slice(&(1_u64 << (signal - 1)).to_le_bytes());
    code.push(0x50); // push rax
    code.extend_from_slice(&[0xb8, 14, 0, 0, 0]); // mov eax, rt_sigprocmask
    code.extend_from_slice(&[0x31, 0xff, 0x48, 0x89, 0xe6, 0x31, 0xd2]); // SIG_BLOCK, rsp, NULL
    code.extend_from_slice(&[0x41, 0xba, 8, 0, 0, 0, 0x0f, 0x05]); // mov r10d, 8; syscall
    code.extend_from_slice(&[0xb8, 128, 0, 0, 0]); // mov eax, rt_sigtimedwait
    code.extend_from_slice(&[0x48, 0x89, 0xe7, 0x31, 0xf6, 0x31, 0xd2]); // rsp, NULL, NULL
    code.extend_from_slice(&[0x41, 0xba, 8, 0, 0, 0, 0x0f, 0x05, 0x58]); // ...; pop rax
    code
}

/// An initramfs of a console and this PID 1 (Linux, buffer-format.rst, "newc").
pub fn initramfs(init: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut add = |name: &str, mode: u32, device: (u32, u32), data: &[u8]| {
        let fields = [
            archive.len() as u32 + 1, // an inode number of its own
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        archive.extend_from_slice(b"070701");
        for field in fields {
            archive.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    add("dev", 0o040755, (0, 0), &[]);
    add("dev/console", 0o020600, (5, 1), &[]);
    add("init", 0o100755, (0, 0), init);
    add("TRAILER!!!", 0, (0, 0), &[]);
    archive
}
