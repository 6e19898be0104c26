"""The inside of the sandbox: a script that locks itself up and runs a program's tests.

Started by ``sandbox.py`` as ``python -I -S jail.py``; it needs nothing but the standard library. It
reads a line of JSON with the limits and the program, then a line per test, and writes a line per
result. Each test runs in a forked child, which inherits the locks. Expected outputs stay outside.

``namespaces``: mounts, processes, network and IPC of its own, a root file system that holds the
interpreter and the system's libraries read-only, a bounded memory file system for work, and a user
without rights. ``plain``, where the kernel refuses those: an audit hook against sockets, processes,
signals, foreign code and writes outside the work folder, and as root a user without rights. That is
a fence against accidents and simple attacks, and no wall.
"""

import builtins
import contextlib
import json
import os
import resource
import select
import signal
import sys
import time

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
NEW_NS, NEW_UTS, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY = 442, -100, 0x8000, 1
PDEATHSIG, DUMPABLE, NO_NEW_PRIVS, CAPABILITIES = 1, 4, 38, 0x20080522
NOBODY = 65534
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/null", "/dev/zero")
BOX = "/box"
DENIED = (
    "socket.", "ctypes.", "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill",
    "os.spawn", "subprocess.", "pty.", "signal.", "shutil.chown", "mmap.",
)  # fmt: skip
CHANGES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link",
    "os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.removexattr", "os.chflags",
)  # fmt: skip
UNAUDITED = ("mknod", "mkfifo", "pidfd_open", "setpriority", "sched_setaffinity", "chroot")


def enter_namespaces(setup):
    """Leave the machine behind; returns in a new process that is the first of its namespace."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    root, user = setup["folder"], os.geteuid()

    def check(result):
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def mount(source, target, kind, flags, options=None):
        encode = [x and x.encode() for x in (source, target, kind)]
        check(libc.mount(*encode, ctypes.c_ulong(flags), options and options.encode()))

    group = os.getegid()
    spaces = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    check(libc.unshare(spaces | (NEW_USER if user else 0)))
    if user:
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1"),
        ):  # fmt: skip
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in dict.fromkeys([*SYSTEM, setup["prefix"]]):
        inside = root + path
        if os.path.exists(inside) or not os.path.exists(path):
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
    os.mkdir(root + BOX)
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    check(libc.syscall(MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, size))
    mount("none", root + BOX, "tmpfs", MS_NOSUID | MS_NODEV, f"size={setup['disk_mb']}m,mode=777")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    child = os.fork()
    if child:
        os._exit(os.waitpid(child, 0)[1] >> 8)
    os.chroot(root)
    os.chdir(BOX)
    if not user:
        drop_user(setup["user"])
    header, none = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, none))
    check(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    check(libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def drop_user(user):
    """Become a user that owns nothing; where only some exist, the one named nobody."""
    os.setgroups([])
    try:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def hook(folder):
    """Refuse what a program has no business with; the fence where there are no namespaces."""
    import posix

    for name in UNAUDITED:
        for module in (os, posix):
            if hasattr(module, name):
                delattr(module, name)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    outside_refused = writing | os.O_DIRECTORY | os.O_PATH
    realpath, join, slash, inside = os.path.realpath, os.path.join, os.sep, folder + os.sep
    fsdecode, kinds, modules = os.fsdecode, (str, bytes), {"ctypes", "_ctypes", "_posixsubprocess"}
    denied, changes, error = DENIED, CHANGES, PermissionError

    def check(path):
        if not isinstance(path, kinds):
            return
        if not (realpath(join(folder, fsdecode(path))) + slash).startswith(inside):
            raise error("writes outside the work folder are refused")

    def audit(event, arguments):
        if event.startswith(denied) or (event == "import" and arguments[0] in modules):
            raise error(f"{event} is refused")
        if event == "open" and (arguments[2] or 0) & outside_refused:
            check(arguments[0])
        elif event in changes:
            for path in arguments[:2]:
                check(path)

    sys.addaudithook(audit)


def limit(setup):
    """Bound a test's process; ``processes`` counts threads too."""
    cpu, memory = int(setup["seconds"]) + 1, setup["memory_mb"] << 20
    for name, value in (
        ("CPU", cpu), ("AS", memory), ("FSIZE", setup["disk_mb"] << 20), ("CORE", 0),
        ("NOFILE", 64), ("NPROC", setup["processes"]), ("MEMLOCK", 0), ("MSGQUEUE", 0),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def child(setup, test, output):
    """Run the program on one test; never returns."""
    status = 1
    try:
        source = os.memfd_create("stdin")
        os.write(source, test.get("stdin", "").encode())
        os.lseek(source, 0, os.SEEK_SET)
        nowhere = os.open("/dev/null", os.O_RDWR)
        function = setup["function"]
        result = os.dup(output)
        os.dup2(source, 0)
        os.dup2(nowhere if function else output, 1)
        os.dup2(nowhere, 2)
        os.closerange(3, result)
        os.closerange(result + 1, 1024)
        sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
        sys.argv = ["program.py"]
        builtins.exit = builtins.quit = sys.exit
        limit(setup)
        if setup["mode"] == "plain":
            hook(setup["folder"])
        scope = {"__name__": "__main__" if not function else "solution"}
        exec(compile(setup["program"], "program.py", "exec"), scope)
        if function:
            owner = scope["Solution"]() if "Solution" in scope else None
            call = getattr(owner, function) if owner else scope[function]
            text = json.dumps(call(*test["arguments"])).encode()
            while text:
                text = text[os.write(result, text) :]
        status = 0
    except SystemExit as end:
        status = 0 if end.code in (None, 0) else 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(status)


def run(setup, test):
    """Status and output of one test, and the death of all that it started."""
    reader, writer = os.pipe()
    end = time.monotonic() + setup["seconds"]
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        child(setup, test, writer)
    os.close(writer)
    data, status, code, closed = [], "time", None, False
    while (left := end - time.monotonic()) > 0:
        if not closed and select.select([reader], [], [], min(left, 0.01))[0]:
            piece = os.read(reader, 1 << 16)
            closed = not piece
            data.append(piece)
            if sum(map(len, data)) > setup["output_bytes"]:
                status = "output"
                break
            continue
        if closed and code is None:
            time.sleep(0.001)
        if code is not None:  # ended, and nothing is left in the pipe
            status = "error" if code else "ok"
            break
        done, result = os.waitpid(pid, os.WNOHANG)
        code = result if done else None
    os.close(reader)
    sweep(setup, pid, code is None)
    return {"status": status, "output": b"".join(data).decode("utf-8", "replace")}


def sweep(setup, pid, alive):
    """Kill what a test left behind."""
    for target, kill in ((pid, os.killpg), (-1, os.kill)):
        if kill is os.kill and setup["mode"] != "namespaces":
            break
        with contextlib.suppress(OSError):
            kill(target, signal.SIGKILL)
    with contextlib.suppress(OSError):
        if alive:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        while setup["mode"] == "namespaces":
            os.waitpid(-1, 0)


def serve(setup, requests, replies):
    """A result line for every test line."""
    os.set_inheritable(replies, False)
    os.write(replies, b'{"status": "ready"}\n')
    for line in requests:
        text = json.dumps(run(setup, json.loads(line))).encode() + b"\n"
        while text:
            text = text[os.write(replies, text) :]


def main():
    """Lock up, then serve."""
    line = sys.stdin.buffer.readline()
    setup = json.loads(line)
    if setup["mode"] == "namespaces":
        enter_namespaces(setup)
    else:
        if os.geteuid() == 0:
            os.chmod(setup["folder"], 0o777)
            drop_user(setup["user"])
            os.stat(os.__file__)  # must still be readable
        os.chdir(setup["folder"])
        setup["processes"] = 0
    import ctypes

    ctypes.CDLL(None).prctl(DUMPABLE, 0, 0, 0, 0)  # no test may read this process
    serve(setup, sys.stdin.buffer, os.dup(1))


if __name__ == "__main__":
    main()
