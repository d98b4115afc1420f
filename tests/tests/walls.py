"""What an attacker tries who is root in a container: prints each attempt and how it ended."""

import ctypes
import os
import socket
import stat

libc = ctypes.CDLL(None, use_errno=True)
# Of include/uapi/linux: mount.h, sched.h, and x86-64's system calls.
MS_REMOUNT, MS_BIND = 0x20, 0x1000
NEWNS, NEWUSER, NEWPID = 0x20000, 0x10000000, 0x20000000
CALLS = {"init_module": 175, "finit_module": 313, "kexec_load": 246, "iopl": 172, "ioperm": 173,
         "open_by_handle_at": 304, "swapon": 167, "settimeofday": 164, "syslog": 103, "quotactl": 179, "acct": 163}
BPF, PERF_EVENT_OPEN = 321, 298
HOST, LOCAL, GUEST = 2, 1, 3
AGENT, READY, STDIO, FORWARD = 1024, 1025, 1026, 1027


def check(result):
    """An error of the C library's as an exception."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def attempt(name, what):
    """Makes one."""
    try:
        what()
    except Exception as error:  # whatever stopped it
        print(f"{name}: refused: {error}")
    else:
        print(f"{name}: DONE")


def write(path, text):
    """Into a file that is there."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


def read(path):
    """The first bytes of something."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not os.read(descriptor, 16):
            raise OSError("it is empty")
    finally:
        os.close(descriptor)


def mount(source, target, kind, flags=0):
    """mount(2)."""
    check(libc.mount(source, target, kind, flags, None))


def device(kind, numbers):
    """Makes a node and reads from it."""
    path = f"/node-{kind}-{numbers[0]}-{numbers[1]}"
    os.mknod(path, kind | 0o600, os.makedev(*numbers))
    try:
        read(path)
    finally:
        os.unlink(path)


def guests_disk():
    """The guest's own root file system, by whatever name its kernel has it."""
    with open("/proc/partitions", encoding="ascii") as partitions:
        rows = [line.split() for line in partitions.readlines()[2:]]
    if not rows:
        raise OSError("there are no disks")
    for major, minor, *_ in rows:
        device(stat.S_IFBLK, (int(major), int(minor)))


def dial(cid, port):
    """A port of the agent's or the host's."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as dialled:
        dialled.settimeout(5)
        dialled.connect((cid, port))
        # Whoever takes the connection and closes it at once has refused.
        dialled.sendall(b"\0" * 16)
        if not dialled.recv(1):
            raise OSError("it was closed")


def bpf():
    """Makes the smallest of maps: BPF_MAP_CREATE of an array of one number."""
    attributes = (ctypes.c_uint32 * 18)(2, 4, 4, 1)
    check(libc.syscall(BPF, 0, attributes, ctypes.sizeof(attributes)))


def perf():
    """Counts what a processor does, whoever has it: PERF_TYPE_SOFTWARE."""
    attributes = (ctypes.c_uint32 * 32)(1, 128)
    check(libc.syscall(PERF_EVENT_OPEN, attributes, -1, 0, -1, 0))


def strangers():
    """Processes that are not ours."""
    others = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) not in (1, os.getpid())]
    if not others:
        raise OSError("there are none")


def as_own_root(what):
    """With all capabilities, in a user namespace of its own."""
    child = os.fork()
    if child == 0:
        try:
            check(libc.unshare(NEWUSER | NEWNS | NEWPID))
            grandchild = os.fork()
            if grandchild == 0:
                what()
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
        except BaseException:
            os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise OSError("not in a user namespace of its own, either")


os.makedirs("/target", exist_ok=True)
attempt("write core_pattern", lambda: write("/proc/sys/kernel/core_pattern", b"|/evil"))
attempt("write modprobe", lambda: write("/proc/sys/kernel/modprobe", b"/evil"))
attempt("write sysctl", lambda: write("/proc/sys/vm/drop_caches", b"1"))
attempt("write sysrq-trigger", lambda: write("/proc/sysrq-trigger", b"h"))
attempt("read kcore", lambda: read("/proc/kcore"))
attempt("read kernel keys", lambda: read("/proc/keys"))
attempt("read kernel timers", lambda: read("/proc/timer_list"))
attempt("read /dev/kmsg", lambda: read("/dev/kmsg"))
attempt("write /sys", lambda: write("/sys/kernel/mm/transparent_hugepage/enabled", b"never"))
attempt("read the kernel's debug files", lambda: os.listdir("/sys/kernel/debug")[0])
attempt("write cgroup", lambda: os.mkdir("/sys/fs/cgroup/evil"))
attempt("lift the limit of processes", lambda: write("/sys/fs/cgroup/pids.max", b"max"))
attempt("lower the OOM score", lambda: write("/proc/self/oom_score_adj", b"-1000"))
attempt("mount tmpfs", lambda: mount(b"none", b"/target", b"tmpfs"))
attempt("mount proc", lambda: mount(b"none", b"/target", b"proc"))
attempt("mount sysfs", lambda: mount(b"none", b"/target", b"sysfs"))
attempt("mount cgroup2", lambda: mount(b"none", b"/target", b"cgroup2"))
attempt("mount the share", lambda: mount(b"sepal", b"/target", b"virtiofs"))
attempt("make /proc/sys writable", lambda: mount(None, b"/proc/sys", None, MS_REMOUNT | MS_BIND))
attempt("unmask kcore", lambda: check(libc.umount2(b"/proc/kcore", 2)))
attempt("a proc without masks in a user namespace", lambda: as_own_root(lambda: mount(b"none", b"/target", b"proc")))
attempt("a sysfs in a user namespace", lambda: as_own_root(lambda: mount(b"none", b"/target", b"sysfs")))
attempt("unmask in a user namespace", lambda: as_own_root(lambda: check(libc.umount2(b"/proc/kcore", 2))))
attempt("read the guest's disk", guests_disk)
attempt("read memory by a node", lambda: device(stat.S_IFCHR, (1, 1)))
attempt("read the log by a node", lambda: device(stat.S_IFCHR, (1, 11)))
attempt("see others' processes", strangers)
for place, cid in (("the host", HOST), ("loopback", LOCAL), ("the guest", GUEST)):
    for port in (AGENT, READY, STDIO, FORWARD):
        attempt(f"dial {place}'s port {port}", lambda cid=cid, port=port: dial(cid, port))
attempt("load BPF", bpf)
attempt("watch a processor", perf)
for name, number in CALLS.items():
    attempt(name, lambda number=number: check(libc.syscall(number, 0, 0, 0, 0, 0)))
attempt("reboot", lambda: check(libc.reboot(0)))
attempt("host name", lambda: check(libc.sethostname(b"evil", 4)))
print("end")
