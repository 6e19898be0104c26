"""A fence on the real machine, for where namespaces are refused: weaker, and only for who asks.

Three layers. Landlock: files, TCP and signals, by the kernel. seccomp: the system calls that a
program may make, by the kernel; no other process among them. And an audit hook with a list of what
Python may do, which stands alone where the kernel, or the interpreter, lacks the other two: it
stops accidents and simple attacks, and is no wall. As root, the program is a user without rights.
"""

import errno
import importlib
import os
import sys

allowed = importlib.import_module("allowed")  # a script, as this one: there is no package here

NOBODY = 65534
CLONE_THREAD = 0x10000
TERMINAL, CLOEXEC = 0x5401, 0x5451  # what isatty() and open() ask by ioctl
DEVICES = ("/dev/null", "/dev/zero", "/dev/stdin", "/dev/stdout", "/dev/stderr")
STREAMS = tuple(f"{folder}/{fd}" for folder in ("/dev/fd", "/proc/self/fd") for fd in range(3))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def enter(setup, paths):
    """Become a user without rights, and find out what the kernel offers; returns that as words."""
    root = os.geteuid() == 0
    if root:
        drop_user(setup)
    os.stat(os.__file__)  # must still be readable
    for name in sorted(set(allowed.NATIVE.split()).intersection(sys.builtin_module_names)):
        importlib.import_module(name)  # later, there is no way to
    setup["paths"] = paths
    setup["layers"] = [layer for layer in LAYERS if works(setup, layer)]
    setup["threads"] = seccomp in setup["layers"]
    # Without seccomp only this limit forbids processes, and with them threads. It counts those of
    # a user: who shares the trainer's name can have no bound of their own.
    if not setup["threads"]:
        setup["processes"] = 0
    else:
        setup["processes"] = setup["processes"] + 2 if root else None
    return ", ".join("no " * (f not in setup["layers"]) + f.__name__ for f in LAYERS)


def drop_user(setup):
    """Become a user that owns nothing but the work folder."""
    os.setgroups([])
    for user in (setup["user"], NOBODY):  # some machines know few users
        try:
            os.chown(setup["folder"], user, user)
            os.setresgid(user, user, user)
            return os.setresuid(user, user, user)
        except OSError as error:
            refused = error
    raise refused


def works(setup, layer):
    """Whether a layer can be put on here; what it needs is imported only then."""
    child = os.fork()
    if child == 0:
        try:
            layer({**setup, "place": setup["folder"]})
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        return False
    importlib.import_module(LAYERS[layer])
    return True


def landlock(setup):
    """Files: the library to read, the work folder to use; no TCP, no signals to others."""
    from landlockpy import AccessFS, RestrictFlag, Ruleset, Scope

    read = AccessFS.READ_FILE | AccessFS.READ_DIR
    use = read | AccessFS.WRITE_FILE | AccessFS.TRUNCATE | AccessFS.MAKE_REG | AccessFS.REMOVE_FILE
    with Ruleset(scoped=Scope.SIGNAL | Scope.ABSTRACT_UNIX_SOCKET) as rules:
        for path in setup["paths"]:
            rules.allow_path(path, read if os.path.isdir(path) else AccessFS.READ_FILE)
        rules.allow_path("/dev/null", AccessFS.READ_FILE | AccessFS.WRITE_FILE)
        rules.allow_path(setup["place"], use)
        rules.restrict(RestrictFlag.LOG_SAME_EXEC_OFF)


def seccomp(setup):
    """System calls: those of a program that computes, reads and prints, and of its threads."""
    from seccompy import Action, ArgCmp, CmpOp, Filter

    calls = Filter(Action.ERRNO | errno.EPERM)
    for name in allowed.CALLS.split():
        try:
            calls.allow(name)
        except ValueError:  # unknown to this processor
            continue
    calls.allow("clone", args=[ArgCmp(0, CmpOp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD)])
    calls.errno("clone3", errno.ENOSYS)  # hides its flags from a filter; libraries fall back
    calls.allow("prlimit64", args={0: 0})  # of the process itself
    for request in (TERMINAL, CLOEXEC):
        calls.allow("ioctl", args={1: request})
    calls.load()


LAYERS = {landlock: "landlockpy", seccomp: "seccompy"}


def prepare(setup, test):
    """A folder for one test; returns its input, and both ends of its output."""
    setup["place"] = os.path.join(setup["folder"], str(os.getpid()))
    os.mkdir(setup["place"], 0o700)
    source = os.memfd_create("stdin")
    with os.fdopen(source, "wb", closefd=False) as file:
        file.write(test.get("stdin", "").encode())
    os.lseek(source, 0, os.SEEK_SET)
    return source, *os.pipe()


def clean(setup):
    """Remove the folder, in which a program can only make files."""
    for name in os.listdir(setup["place"]):
        os.unlink(os.path.join(setup["place"], name))
    os.rmdir(setup["place"])


def confine(setup):
    """Put on every layer that works here."""
    import _imp
    import posix

    os.chdir(setup["place"])
    for layer in setup["layers"]:
        layer(setup)
    for name in allowed.UNAUDITED.split():
        for module in (os, posix):
            vars(module).pop(name, None)
    del _imp.create_builtin  # raises no event, and makes new what was deleted
    for name in ("ctypes", "_ctypes", *LAYERS.values()):
        sys.modules.pop(name, None)
    sys.addaudithook(fence(setup))


def fence(setup):
    """The audit hook. It calls nothing that a program could put something else in the place of."""
    kind, text, raw, number, refused, missing = type, str, bytes, int, PermissionError, ImportError
    events = frozenset((allowed.EVENTS + allowed.THREADS * setup["threads"]).split())
    native = frozenset(allowed.NATIVE.split())
    foreign = frozenset(sys.builtin_module_names) - native
    place, folder, size = setup["place"], setup["place"] + "/", len(setup["place"]) + 1
    roots = tuple(path + "/" for path in setup["paths"] if os.path.isdir(path))
    devices, writing = frozenset(DEVICES + STREAMS), WRITING

    def exact(path):  # of no class of the program's own
        if kind(path) is raw:
            return path.decode()
        return path if kind(path) is text else "/"

    def own(path):  # links and folders cannot be made, so a name without / is what it seems
        name = path[size:] if path.startswith(folder) else path.removeprefix("./")
        return "/" not in name and name not in ("", ".", "..")

    def library(path):
        return "/.." not in path and (path + "/").startswith(roots)

    def audit(event, arguments):
        if event not in events:
            raise refused(event + " is refused")
        if event == "open" and kind(arguments[0]) is not number:
            path, mode, flags = exact(arguments[0]), arguments[1], arguments[2]
            opener = path in (place, ".") and mode is not None  # gets a folder; open() refuses one
            reads = not flags & writing and library(path)
            if not (own(path) or opener or reads or path in devices):
                raise refused("open is refused outside the work folder")
        elif event in ("os.listdir", "os.scandir"):
            path = "." if arguments[0] is None else exact(arguments[0])
            if not (path in (place, ".") or library(path)):
                raise refused(event + " is refused outside the work folder")
        elif event in ("os.remove", "os.rename", "os.truncate"):
            for path in arguments[: 2 if event == "os.rename" else 1]:
                if kind(path) is not number and not own(exact(path)):
                    raise refused(event + " is refused outside the work folder")
        elif event == "import":
            name, path = arguments[:2]
            if kind(name) is not text or name in foreign:
                raise missing("this module is refused")
            if path is not None and not (name in native and library(exact(path))):
                raise missing(name + " is refused")
        elif event == "object.__getattr__" and arguments[1] == "tb_frame":
            raise refused("frames of errors are refused: they lead into this function")

    return audit
