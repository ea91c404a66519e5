"""What Linux offers to confine a process, as system calls: no privileged helper, no program to install.

Every function raises OSError if the kernel refuses, so a protection is never left out silently. The numbers are those
of the kernel's headers.
"""

import ctypes
import errno
import os
import signal
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = -100, 0x8000, 442
READ_ONLY = struct.pack("=QQQQ", 1 | 2 | 4, 0, 0, 0)  # read only, no set-user-id programs, no devices
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CAPABILITY_VERSION = 0x20080522
FIRST_FREE_UID = 0x70000000  # above the ids that systems give to users

LANDLOCK_CREATE, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
# Landlock's rights on files; version 1 has 13 of them, the following bits came with versions 2, 3 and 5
EXECUTE, WRITE_FILE, READ_FILE, READ_FOLDER, TRUNCATE, IOCTL = 1, 2, 4, 8, 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_FOLDER
WRITE = (1 << 16) - 1
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL  # the other rights belong to folders
TCP, SIGNALS_AND_ABSTRACT_SOCKETS = 3, 3

SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
SCRATCH = ("/tmp", "/dev/shm")  # folders of a private root that can be written

SECCOMP_ALLOW, SECCOMP_ERRNO = 0x7FFF0000, 0x00050000


class Condition(ctypes.Structure):
    """What a rule requires of an argument of a call: libseccomp's `scmp_arg_cmp`."""

    _fields_ = (("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def _differs(argument: int, value: int = 0) -> Condition:
    return Condition(argument, 1, value)


def _low_bits(argument: int, mask: int, value: int) -> Condition:
    return Condition(argument, 7, mask, value)


PACKET_SOCKETS, DATAGRAMS, RAW = 17, 2, 3
Rule = tuple[str, list[Condition]]  # a call, and what holds for the arguments that it concerns
# No namespace has its own of the address families after these (vsock reaches the host of a virtual machine), and
# io_uring makes sockets that no rule sees.
REFUSED_IN_NAMESPACES: list[Rule] = [("socket", [Condition(0, 6, PACKET_SOCKETS)]), ("io_uring_setup", [])]
# Memory that belongs to no process, so no limit counts it; libraries have other ways for systems without these.
UNCOUNTED: list[Rule] = [(name, []) for name in ("memfd_create", "memfd_secret", "shmget")]
# What reaches outside and Landlock does not know: sockets, also a pair that can send elsewhere; queues, semaphores and
# keys of this user; limits and priorities of its other processes.
REFUSED: list[Rule] = [
    *((name, []) for name in ("socket", "io_uring_setup", "msgget", "semget")),
    *((name, []) for name in ("add_key", "request_key", "keyctl")),
    *(("socketpair", [_low_bits(1, 0xF, kind)]) for kind in (DATAGRAMS, RAW)),
    ("prlimit64", [_differs(0), _differs(2)]),
    *((name, [_differs(0)]) for name in ("sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr")),
    *(("setpriority", [_differs(argument)]) for argument in (0, 1)),
    *(("ioprio_set", [condition]) for condition in (_differs(0, 1), _differs(1))),
]
# A change of metadata has no effect and reports success, because programs also call it for their own files, after
# copying one for example.
SET_FLAGS = (0x40086602, 0x40046602, 0x401C5820)  # ioctl: FS_IOC_SETFLAGS, FS_IOC32_SETFLAGS, FS_IOC_FSSETXATTR
IGNORED: list[Rule] = [
    *((name, []) for name in ("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat")),
    *((name, []) for name in ("utime", "utimes", "futimesat", "utimensat", "setxattr", "lsetxattr", "fsetxattr")),
    *((name, []) for name in ("setxattrat", "removexattr", "lremovexattr", "fremovexattr", "removexattrat")),
    ("file_setattr", []),
    *(("ioctl", [_low_bits(1, 0xFFFFFFFF, number)]) for number in SET_FLAGS),
]
# Calls that are newer than some releases of libseccomp; the same numbers everywhere
NEW_CALLS = {"fchmodat2": 452, "setxattrat": 463, "removexattrat": 466, "file_setattr": 469}


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library.

    Raises:
        OSError: it failed; the message names it.
    """
    result: int = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


# Namespaces


def enter_namespaces() -> None:
    """Leave the system's network, IPC and mounts; the next child is the first process of a new process namespace.

    Users other than root need a user namespace for it, in which they stay the same.
    """
    uid, gid = os.getuid(), os.getgid()
    call("unshare", NEWNS | NEWIPC | NEWPID | NEWNET | (NEWUSER if uid else 0))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def enter_private_root(readable: Iterable[str], size: int) -> None:
    """Replace the whole file system by an empty one in memory, of `size` bytes, which vanishes with its last process.

    `readable` appears in it, read-only; besides it, only a new /proc, some devices, and the folders in `SCRATCH`.
    Requires `enter_namespaces`, in the first process of the namespace.
    """
    # Opened first: the new root hides them, and a private folder above them does not matter to an open one.
    sources = {path: os.open(path, os.O_PATH | os.O_NOFOLLOW) for path in (*readable, *DEVICES)}
    root = "/tmp"
    options = f"mode=755,size={size},nr_inodes={max(1024, size >> 12)}"
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())
    for path, source in sources.items():
        _show(path, source, root + path)
        os.close(source)
    Path(root, "proc").mkdir()
    call("mount", b"proc", f"{root}/proc".encode(), b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    Path(root, "dev/fd").symlink_to("/proc/self/fd")
    for folder in SCRATCH:
        Path(root + folder).mkdir(exist_ok=True)
        Path(root + folder).chmod(0o1777)
    os.chdir(root)
    machine = os.uname().machine
    if machine not in PIVOT_ROOT:
        raise OSError(errno.ENOSYS, f"pivot_root: its number on {machine} is not known")
    call("syscall", PIVOT_ROOT[machine], b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def _show(path: str, source: int, target: str) -> None:
    """Show an open file or folder at `target`; a link is copied."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    mode = os.fstat(source).st_mode
    if stat.S_ISLNK(mode):
        Path(target).symlink_to(os.readlink("", dir_fd=source))
        return
    if stat.S_ISDIR(mode):
        Path(target).mkdir(exist_ok=True)
    else:
        Path(target).touch()
    call("mount", f"/proc/self/fd/{source}".encode(), target.encode(), None, MS_BIND | MS_REC, None)
    if path not in DEVICES:
        call("syscall", MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, READ_ONLY, len(READ_ONLY))


def deny_cgroup_namespaces() -> None:
    """Let nobody in this user namespace mount the control group that it is in, and change its limits.

    Requires `enter_namespaces` as a user other than root: for root, it would hold for the whole system.
    """
    Path("/proc/sys/user/max_cgroup_namespaces").write_text("0")


# Users and processes


def become(uid: int) -> None:
    """Become another user permanently, with a group of the same number and no other."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    allow_inspection()


def drop_capabilities() -> None:
    """Give up all capabilities, also those in a user namespace; no program can bring them back."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("capset", struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24))


def die_with_parent() -> None:
    """Be killed when the parent ends."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def guard_processes() -> None:
    """Become the parent of all descendants that lose theirs, and hide this process's memory from them."""
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def allow_inspection() -> None:
    """Undo for this process what `guard_processes`, or a change of user, hides."""
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


# Landlock


def landlock_version() -> int:
    """The version of the kernel's Landlock; 0 without it."""
    version: int = libc.syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION)
    return max(0, version)


def landlock_rules(readable: Iterable[str], writable: Iterable[str]) -> int | None:
    """Prepare the strictest rules that this kernel has: these files, no TCP, no signals or abstract sockets to outside.

    Returns:
        A descriptor for `enforce_landlock`, or None without Landlock.
    """
    version = landlock_version()
    if not version:
        return None
    files = (1 << 13 + (version >= 2) + (version >= 3) + (version >= 5)) - 1
    handled = struct.pack("=QQQ", files, TCP * (version >= 4), SIGNALS_AND_ABSTRACT_SOCKETS * (version >= 6))
    rules = call("syscall", LANDLOCK_CREATE, handled, len(handled), 0)
    for path, rights in {**dict.fromkeys(readable, READ), **dict.fromkeys(writable, WRITE)}.items():
        descriptor = os.open(path, os.O_PATH)
        allowed = rights & files & (-1 if Path(path).is_dir() else ON_FILES)
        rule = struct.pack("=Qi", allowed, descriptor)
        call("syscall", LANDLOCK_ADD_RULE, rules, LANDLOCK_PATH_BENEATH, rule, 0)
        os.close(descriptor)
    return rules


def enforce_landlock(rules: int) -> None:
    """Apply rules to this process and its future children, permanently. Requires `drop_capabilities`."""
    call("syscall", LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


# Seccomp


def seccomp_available() -> bool:
    """Whether libseccomp is installed."""
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return False
    return True


def deny_calls(in_namespaces: bool) -> None:
    """Refuse calls that reach outside or escape limits, and without namespaces ignore `IGNORED`; also in children.

    Requires `drop_capabilities`.
    """
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(SECCOMP_ALLOW))
    for rule in REFUSED_IN_NAMESPACES if in_namespaces else REFUSED:
        _add_rule(seccomp, context, SECCOMP_ERRNO | errno.EACCES, *rule)
    for rule in UNCOUNTED:
        _add_rule(seccomp, context, SECCOMP_ERRNO | errno.ENOSYS, *rule)
    for rule in [] if in_namespaces else IGNORED:
        _add_rule(seccomp, context, SECCOMP_ERRNO, *rule)
    _require(seccomp.seccomp_load(context), "seccomp_load")


def _add_rule(
    seccomp: ctypes.CDLL, context: ctypes.c_void_p, action: int, name: str, conditions: list[Condition]
) -> None:
    number = seccomp.seccomp_syscall_resolve_name(name.encode())
    number = number if number >= 0 else NEW_CALLS.get(name, number)
    if number >= 0:  # otherwise this architecture does not have it
        array = (Condition * len(conditions))(*conditions)
        _require(seccomp.seccomp_rule_add_array(context, action, number, len(conditions), array), name)


def _require(status: int, what: str) -> None:
    if status:
        raise OSError(-status, f"{what}: {os.strerror(-status)}")
