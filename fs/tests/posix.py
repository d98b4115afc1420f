#!/usr/bin/env python3
"""What a container may expect of its files, asked of a directory.

    posix.py DIRECTORY [--many N]

Runs as root, in a container on virtio-fs as well as on any other file system (which shows that it
asks nothing that Linux does not promise). Prints a line per property and fails if one is missing.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import subprocess
import sys
import time
import traceback

libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
tests = []


def test(function):
    tests.append(function)
    return function


def fails(number, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except OSError as error:
        assert error.errno == number, f"{errno.errorcode[error.errno]} instead of {errno.errorcode[number]}"
        return
    raise AssertionError(f"no {errno.errorcode[number]}")


def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def renameat2(old, new, flags):
    checked(libc.renameat2(AT_FDCWD, old.encode(), AT_FDCWD, new.encode(), flags))


def publish(fd, name):
    """Gives an open file a name, as open(2) shows for O_TMPFILE."""
    follow = 0x400  # AT_SYMLINK_FOLLOW
    checked(libc.linkat(AT_FDCWD, f"/proc/self/fd/{fd}".encode(), AT_FDCWD, name.encode(), follow))


def write(path, data=b"x", mode=0o644):
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
    os.write(fd, data)
    os.close(fd)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def as_user(uid, gid, call, groups=()):
    """The call's exception, or none, in a process of this user."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 0
        try:
            os.setgroups(list(groups))
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            call()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__} {error}".encode())
            status = 1
        os._exit(status)
    os.close(writer)
    message = os.read(reader, 4096).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    return message


@test
def owners_and_modes():
    write("f")
    os.chown("f", 1234, 5678)
    os.chmod("f", 0o4751)
    found = os.stat("f")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o4751)
    os.mkdir("theirs")
    os.chown("theirs", 1000, 1000)
    assert as_user(1000, 1000, lambda: write("theirs/f")) == ""
    found = os.stat("theirs/f")
    assert (found.st_uid, found.st_gid) == (1000, 1000)
    assert "PermissionError" in as_user(1001, 1001, lambda: write("theirs/g"))
    os.chmod("theirs", 0o770)
    assert as_user(1001, 1001, lambda: write("theirs/g"), groups=[1000]) == ""
    assert os.stat("theirs/g").st_uid == 1001


@test
def set_group_id_directories():
    os.mkdir("shared")
    os.chown("shared", 0, 4242)
    os.chmod("shared", 0o2777)
    assert as_user(1000, 1000, lambda: (write("shared/f"), os.mkdir("shared/d"))) == ""
    assert os.stat("shared/f").st_gid == 4242
    assert os.stat("shared/d").st_gid == 4242 and os.stat("shared/d").st_mode & stat.S_ISGID


@test
def writes_take_set_user_id_away():
    write("tool", mode=0o755)
    os.chmod("tool", 0o4777)
    assert as_user(1000, 1000, lambda: os.write(os.open("tool", os.O_WRONLY), b"y")) == ""
    assert stat.S_IMODE(os.stat("tool").st_mode) == 0o777
    os.chmod("tool", 0o6777)
    assert as_user(1000, 1000, lambda: os.truncate("tool", 0)) == ""
    assert stat.S_IMODE(os.stat("tool").st_mode) == 0o777


@test
def umask_applies():
    before = os.umask(0o027)
    try:
        write("f", mode=0o666)
        os.mkdir("d", 0o777)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o640
    assert stat.S_IMODE(os.stat("d").st_mode) == 0o750


@test
def extended_attributes():
    write("f")
    os.setxattr("f", "user.a", b"1")
    os.setxattr("f", "user.b", b"x" * 1000)
    assert sorted(os.listxattr("f")) == ["user.a", "user.b"]
    assert os.getxattr("f", "user.b") == b"x" * 1000
    fails(errno.EEXIST, os.setxattr, "f", "user.a", b"2", os.XATTR_CREATE)
    os.removexattr("f", "user.a")
    fails(errno.ENODATA, os.getxattr, "f", "user.a")
    # cap_net_bind_service=ep, revision 2
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr("f", "security.capability", capability)
    assert os.getxattr("f", "security.capability")[4:8] == capability[4:8]
    write("f", b"changed")
    fails(errno.ENODATA, os.getxattr, "f", "security.capability")


@test
def access_control_lists():
    write("f", mode=0o600)
    # version 2; user_obj rw, user 1000 r, group_obj -, mask r, other -
    entry = lambda tag, perm, who=0xFFFFFFFF: tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + who.to_bytes(4, "little")
    acl = (2).to_bytes(4, "little") + entry(1, 6) + entry(2, 4, 1000) + entry(4, 0) + entry(0x10, 4) + entry(0x20, 0)
    os.setxattr("f", "system.posix_acl_access", acl)
    assert as_user(1000, 1000, lambda: read("f")) == ""
    assert "PermissionError" in as_user(1001, 1001, lambda: read("f"))
    os.mkdir("d")
    os.setxattr("d", "system.posix_acl_default", acl)
    write("d/f", mode=0o666)
    assert as_user(1000, 1000, lambda: os.stat("d/f")) == ""
    assert os.getxattr("d/f", "system.posix_acl_access")


@test
def symbolic_links():
    write("target", b"t")
    os.symlink("target", "soft")
    os.symlink("x" * 4000, "long")
    assert read("soft") == b"t" and os.readlink("long") == "x" * 4000
    os.lchown("soft", 5, 6)
    assert os.lstat("soft").st_uid == 5 and os.stat("target").st_uid == 0
    fails(errno.ELOOP, os.open, "soft", os.O_RDONLY | os.O_NOFOLLOW)
    os.symlink("loop", "loop")
    fails(errno.ELOOP, os.stat, "loop")


@test
def hard_links():
    write("one", b"1")
    os.link("one", "two")
    assert os.stat("one").st_ino == os.stat("two").st_ino and os.stat("one").st_nlink == 2
    with open("two", "ab") as file:
        file.write(b"2")
    assert read("one") == b"12"
    os.unlink("one")
    assert os.stat("two").st_nlink == 1


@test
def special_files():
    os.mkfifo("fifo")
    if os.fork() == 0:
        with open("fifo", "wb") as file:
            file.write(b"through")
        os._exit(0)
    assert read("fifo") == b"through"
    os.wait()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    listener.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("socket")
    client.sendall(b"hello")
    assert listener.accept()[0].recv(5) == b"hello"
    try:
        os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        return  # a container without CAP_MKNOD
    assert os.stat("null").st_rdev == os.makedev(1, 3)


@test
def renames():
    write("a", b"a")
    write("b", b"b")
    fails(errno.EEXIST, renameat2, "a", "b", RENAME_NOREPLACE)
    renameat2("a", "b", RENAME_EXCHANGE)
    assert (read("a"), read("b")) == (b"b", b"a")
    os.mkdir("d")
    renameat2("d", "a", RENAME_EXCHANGE)
    assert os.path.isdir("a") and read("d") == b"b"
    os.rename("d", "b")
    assert read("b") == b"b" and not os.path.exists("d")
    os.mkdir("full")
    write("full/f")
    os.mkdir("empty")
    fails(errno.ENOTEMPTY, os.rename, "empty", "full")
    fails(errno.EINVAL, os.rename, "full", "full/below")


@test
def deleted_files_stay_open():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.unlink("f")
    os.write(fd, b"still here")
    assert os.pread(fd, 100, 0) == b"still here"
    assert os.fstat(fd).st_nlink == 0
    os.ftruncate(fd, 5)
    os.fchmod(fd, 0o600)
    assert os.fstat(fd).st_size == 5
    os.mkdir("d")
    directory = os.open("d", os.O_RDONLY)
    os.rmdir("d")
    assert os.listdir(directory) == []


@test
def files_without_a_name():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"unseen")
    assert os.fstat(fd).st_nlink == 0 and os.listdir(".") == []
    publish(fd, "seen")
    assert read("seen") == b"unseen" and os.stat("seen").st_nlink == 1
    os.write(fd, b" more")
    os.fsync(fd)
    time.sleep(1.1)
    assert read("seen") == b"unseen more"
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o640)
    fails(errno.ENOENT, publish, fd, "never")


@test
def memory_maps():
    write("f", b"\0" * 3 * mmap.PAGESIZE)
    fd = os.open("f", os.O_RDWR)
    with mmap.mmap(fd, 0) as first, mmap.mmap(fd, 0) as second:
        first[0:5] = b"hello"
        assert second[0:5] == b"hello"
        first.flush()
        assert os.pread(fd, 5, 0) == b"hello"
        os.pwrite(fd, b"world", mmap.PAGESIZE)
        assert first[mmap.PAGESIZE : mmap.PAGESIZE + 5] == b"world"
    with mmap.mmap(fd, 0, access=mmap.ACCESS_COPY) as private:
        private[0:5] = b"other"
        assert os.pread(fd, 5, 0) == b"hello"
    write("program", read("/bin/true"), 0o755)
    assert subprocess.run(["./program"]).returncode == 0


@test
def record_locks():
    write("f", b"0" * 100)
    fd = os.open("f", os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)

    def overlapping():
        other = os.open("f", os.O_RDWR)
        fcntl.lockf(other, fcntl.LOCK_EX, 10, 50)
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)

    assert "BlockingIOError" in as_user(0, 0, overlapping)
    fcntl.lockf(fd, fcntl.LOCK_UN, 10, 0)
    assert as_user(0, 0, overlapping) == ""


@test
def whole_file_locks():
    write("f")
    fd = os.open("f", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    other = os.open("f", os.O_RDWR)
    fails(errno.EAGAIN, fcntl.flock, other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_SH)
    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(fd)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@test
def sparse_files():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"end", 1 << 30)
    assert os.fstat(fd).st_size == (1 << 30) + 3 and os.fstat(fd).st_blocks < 1000
    assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 30
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
    os.posix_fallocate(fd, 0, 1 << 20)
    assert os.fstat(fd).st_blocks >= 2048
    flags = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    checked(libc.fallocate(fd, flags, ctypes.c_long(0), ctypes.c_long(1 << 20)))
    assert os.fstat(fd).st_blocks < 1000 and os.pread(fd, 4, 100) == b"\0" * 4
    os.ftruncate(fd, 1 << 40)
    assert os.fstat(fd).st_size == 1 << 40


@test
def appends_do_not_overwrite():
    children = []
    for letter in b"abcd":
        pid = os.fork()
        if pid == 0:
            fd = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for _ in range(50):
                os.write(fd, bytes([letter]) * 99 + b"\n")
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    lines = read("log").split(b"\n")
    assert len(lines) == 201 and all(len(set(line)) <= 1 for line in lines)


@test
def times():
    write("f")
    os.utime("f", ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
    found = os.stat("f")
    assert abs(found.st_atime_ns - 1_234_567_890_123_456_789) < 1000
    assert abs(found.st_mtime_ns - 987_654_321_987_654_321) < 1000
    before = time.time()
    write("f", b"new")
    assert abs(os.stat("f").st_mtime - before) < 2


@test
def copies():
    write("from", os.urandom(1 << 20))
    source, target = os.open("from", os.O_RDONLY), os.open("to", os.O_CREAT | os.O_WRONLY)
    left = 1 << 20
    while left:
        left -= os.copy_file_range(source, target, left)
    assert read("from") == read("to")


@test
def long_and_odd_names():
    longest = "n" * 255
    write(longest)
    fails(errno.ENAMETOOLONG, write, "n" * 256)
    odd = [b"\xff\xfe", b" ", b"-rf", b"new\nline", "ü".encode()]
    for name in odd:
        write(name)
    assert sorted(os.listdir(b".")) == sorted(odd + [longest.encode()])


@test
def directories_with_many_entries():
    names = {f"file-{number:05}" for number in range(3000)}
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    assert set(os.listdir(".")) == names
    assert {entry.name for entry in os.scandir(".") if entry.is_file()} == names
    for name in names:
        os.unlink(name)
    assert os.listdir(".") == []


@test
def inode_numbers_are_stable_and_unique():
    numbers = set()
    for number in range(500):
        write(str(number))
        numbers.add(os.stat(str(number)).st_ino)
    assert len(numbers) == 500
    before = os.stat("7").st_ino
    time.sleep(1.1)
    assert os.stat("7").st_ino == before


@test
def the_file_system_tells_its_size():
    found = os.statvfs(".")
    assert found.f_blocks > 0 and found.f_bavail > 0 and found.f_namemax == 255


@test
def synchronisation():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"x" * 100_000)
    os.fdatasync(fd)
    os.fsync(fd)
    directory = os.open(".", os.O_RDONLY)
    os.fsync(directory)
    checked(libc.syncfs(fd))


def many(number):
    """So many files known to the kernel, and a thousand of them open."""
    for index in range(number):
        if index % 1000 == 0:
            os.mkdir(str(index // 1000))
        os.close(os.open(f"{index // 1000}/{index}", os.O_CREAT | os.O_WRONLY))
    seen = sum(len(files) for _, _, files in os.walk("."))
    assert seen == number, f"{seen} files"
    opened = [os.open(f"0/{index}", os.O_RDONLY) for index in range(min(1000, number))]
    for fd in opened:
        os.close(fd)
    subprocess.run(["sh", "-c", "rm -rf ./*"], check=True)


def main():
    directory = os.path.abspath(sys.argv[1])
    if len(sys.argv) == 4 and sys.argv[2] == "--many":
        number = int(sys.argv[3])
        tests.append(lambda: many(number))
        tests[-1].__name__ = f"{number}_files"
    failed = 0
    for index, function in enumerate(tests):
        name = function.__name__.replace("_", " ")
        place = os.path.join(directory, f"posix-{os.getpid()}-{index}")
        os.mkdir(place)
        os.chdir(place)
        begin = time.monotonic()
        try:
            function()
            result = "ok"
        except Exception as error:
            failed += 1
            line = traceback.extract_tb(error.__traceback__)[1].lineno
            result = f"FAILED: {type(error).__name__} {error} (line {line})"
        print(f"{name}: {result} ({(time.monotonic() - begin) * 1000:.0f} ms)", flush=True)
        os.chdir(directory)
        subprocess.run(["rm", "-rf", place])
    print(f"{len(tests) - failed} of {len(tests)} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
