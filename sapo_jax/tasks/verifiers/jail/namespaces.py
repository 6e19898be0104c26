"""A machine of its own: mounts, processes, network and IPC that hold nothing of the real one.

Its root holds the interpreter, the system's libraries and harmless devices, read-only. Every test
has a memory file system, processes and IPC of its own besides, which end with it. The program is a
user without rights; that its root is no mount point denies it user namespaces, too.
"""

import contextlib
import ctypes
import errno
import os
import signal

try:
    import seccompy
except ImportError:
    seccompy = None

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
NEW_NS, NEW_UTS, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY = 442, -100, 0x8000, 1
PDEATHSIG, NO_NEW_PRIVS, CAPABILITIES = 1, 38, 0x20080522
NOBODY = 65534
ROOT = "/proc"  # any directory that every machine has: it is covered for this process alone
BOX = "/box"
STREAMS = ("stdin", "stdout", "stderr")
# They reach what namespaces do not separate, or parts of the kernel that a program has no need of.
DENIED = (
    "add_key", "keyctl", "request_key", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup",
    "ptrace", "process_vm_readv", "process_vm_writev", "kexec_load", "kcmp", "quotactl", "sync",
    "syslog",
)  # fmt: skip
FAMILIES = (1, 2, 10)  # of sockets, that have a namespace: unix, inet, inet6
libc = ctypes.CDLL(None, use_errno=True)


def check(result):
    """Raise what the C library reports."""
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(source, target, kind, flags, options=None):
    """mount(2)."""
    encode = [x and x.encode() for x in (source, target, kind)]
    check(libc.mount(*encode, ctypes.c_ulong(flags), options and options.encode()))


def enter(setup, paths):
    """Leave the machine behind; returns in a new process, the first of its namespace."""
    user, group = os.geteuid(), os.getegid()
    setup["filter"] = deny()
    spaces = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    check(libc.unshare(spaces | (NEW_USER if user else 0)))
    if user:
        setup["user"] = None
        setup["processes"] += 3  # of the same user: the outer process, server and runner
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1"),
        ):  # fmt: skip
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("none", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    build(paths)
    child = os.fork()
    if child:
        os._exit(os.waitpid(child, 0)[1] >> 8)
    os.chroot(ROOT)
    os.chdir("/")
    check(libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    return "seccomp" if setup["filter"] else "no seccomp"


def build(paths):
    """Fill the root, and make it read-only."""
    for path in paths:
        inside = ROOT + path
        if os.path.lexists(inside):
            continue
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.mkdir(inside)
        else:
            open(inside, "w").close()
        mount(path, inside, None, MS_BIND | MS_REC)
    os.makedirs(ROOT + "/proc/self/fd")
    os.symlink("/proc/self/fd", ROOT + "/dev/fd")
    for number, name in enumerate(STREAMS):  # of what /proc tells, these names alone
        for link in (f"dev/{name}", f"proc/self/fd/{number}"):
            os.symlink(f"{BOX}/{name}", f"{ROOT}/{link}")
    os.mkdir(ROOT + BOX)
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    check(libc.syscall(MOUNT_SETATTR, AT_FDCWD, ROOT.encode(), AT_RECURSIVE, attributes, size))


def deny():
    """A filter of system calls; None where there is nothing to make one."""
    try:
        if not seccompy or not seccompy.supported():
            return None
    except OSError:
        return None
    found = seccompy.Filter()
    for family in FAMILIES:
        found.allow("socket", args={0: family})
    for name in (*DENIED, "socket"):
        found.errno(name, errno.EPERM)
    return found


def prepare(setup, test):
    """Files, processes and IPC for one test; returns its input, and both ends of its output."""
    check(libc.unshare(NEW_NS | NEW_IPC | NEW_PID))
    os.umask(0)
    text = test.get("stdin", "").encode()
    size = (setup["disk_mb"] << 20) + len(text)
    mount("none", BOX, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=755")
    os.mkdir(f"{BOX}/work")
    os.symlink("/dev/null", f"{BOX}/stderr")
    with open(f"{BOX}/stdin", "wb") as file:
        file.write(text)
    source = os.open(f"{BOX}/stdin", os.O_RDONLY)
    if setup["function"]:
        os.symlink("/dev/null", f"{BOX}/stdout")
        return source, *os.pipe()
    os.mkfifo(f"{BOX}/stdout")  # which a program can open again by its name
    reader = os.open(f"{BOX}/stdout", os.O_RDONLY | os.O_NONBLOCK)
    return source, reader, os.open(f"{BOX}/stdout", os.O_WRONLY)


def clean(setup):
    """Nothing: the end of a program, the first process of its namespace, ends all of a test."""


def confine(setup):
    """Become a user without rights."""
    os.umask(0o022)
    os.setsid()  # out of the group of the processes outside, which kill(0) would reach
    os.chdir(f"{BOX}/work")
    if setup["user"] is not None:
        os.setgroups([])
        for user in (setup["user"], NOBODY):  # some machines know few users
            with contextlib.suppress(OSError):
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                break
        if os.getuid() == 0:
            raise OSError(errno.EPERM, "still root")
    header, none = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, none))
    check(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    if setup["filter"]:
        setup["filter"].load()
