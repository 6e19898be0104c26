"""The inside of the sandbox: locks itself up, then runs a program on one test after another.

Started by ``sandbox.py`` as ``python -I -S jail``; it needs nothing but the standard library. It
reads a line of JSON with the limits and the program, then a line per test, and writes a line per
result. Expected outputs never enter: who compares is outside.

    server ── runner, one a test: its place, its clock, its result
                 └── program: locked up, and an ordinary Python script from there to its exit

A runner trusts nothing that the program's process says but its output and its exit status. How
things are locked up is a module per mode, ``namespaces`` and ``plain``, with functions ``enter``
(once), ``prepare`` and ``clean`` (by the runner) and ``confine`` (by the program's process).
"""

import builtins
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time

SYSTEM = (
    "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo",
    "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random",
)  # fmt: skip
STACK = 112 << 20  # bytes; deep recursion needs them, and the kernel leaves 128 MiB of room
# What LiveCodeBench's own harness puts before every program.
STARRED = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random",
    "statistics", "itertools", "functools", "operator", "io", "sys", "json",
)  # fmt: skip
PRELUDE = "\n".join(
    [f"from {name} import *" for name in (*STARRED, "builtins", "typing")]
    + [f"import {name}" for name in STARRED]
    + ["sys.setrecursionlimit(50000)"]
)


def readable():
    """What a program may read: its interpreter's library, the system's, and harmless devices."""
    library = os.path.join(os.path.dirname(os.path.dirname(sys.executable)), "lib")
    paths = (*SYSTEM, library, *sys.path, sys.executable)
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def limit(setup):
    """Bound the program's process; ``processes`` counts threads too."""
    cpu, memory = int(setup["seconds"]) + 1, setup["memory_mb"] << 20
    for name, value in (
        ("CPU", cpu), ("AS", memory), ("FSIZE", setup["disk_mb"] << 20), ("CORE", 0),
        ("NOFILE", 64), ("NPROC", setup["processes"]), ("MEMLOCK", 0), ("MSGQUEUE", 0),
        ("STACK", STACK),
    ):  # fmt: skip
        which = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(which)[1]
        value = hard if value is None or 0 <= hard < value else value
        # Programs ask for all the stack there is, which the address space bounds.
        resource.setrlimit(which, (value, hard if name == "STACK" else value))


def execute(setup, test, lock, files):
    """Be the program, on one test, until the interpreter's own end of it."""
    source, output = files
    nowhere, function = os.open("/dev/null", os.O_RDWR), setup["function"]
    for target, file in enumerate((source, nowhere if function else output, nowhere, output)):
        os.dup2(file, target)
    os.closerange(4 if function else 3, os.sysconf("SC_OPEN_MAX"))
    program, dumps, write = setup["program"], json.dumps, os.write
    module = type(sys)("solution" if function else "__main__")
    sys.modules[module.__name__], scope, sys.argv = module, module.__dict__, ["program.py"]
    builtins.exit = builtins.quit = sys.exit
    exec(PRELUDE, scope)
    if "Solution" not in program:
        scope.pop(function, None)  # else the prelude's gcd would solve the problem of that name
    limit(setup)
    lock.confine(setup)
    exec(compile(program, "program.py", "exec"), scope)
    if function:
        owner = scope["Solution"]() if "Solution" in scope else None
        call = getattr(owner, function) if owner else scope[function]
        text = dumps(call(*test["arguments"])).encode()
        while text:
            text = text[write(3, text) :]


def watch(setup, reader, pid):
    """Status and output of a program's process, which has ended when this returns."""
    data, size, code, end = [], 0, None, time.monotonic() + setup["seconds"]
    while True:
        left = end - time.monotonic()
        if left <= 0 or size > setup["output_bytes"]:
            status = "time" if left <= 0 else "output"
            break
        ready = select.select([reader], [], [], min(left, 0.01))[0]
        piece = os.read(reader, 1 << 16) if ready else b""
        if piece:
            data.append(piece)
            size += len(piece)
            continue
        if code is not None:  # it had ended before nothing more was found
            status = "error" if code else "ok"
            break
        done, ended = os.waitpid(pid, os.WNOHANG)
        code = ended if done else None
        if code is None and ready:  # its output is closed, and it goes on
            time.sleep(0.001)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"status": status, "output": b"".join(data).decode("utf-8", "replace")}


def reply(replies, **message):
    """Write a line."""
    text = json.dumps(message).encode() + b"\n"
    while text:
        text = text[os.write(replies, text) :]


def serve(setup, lock, requests, replies):
    """Answer the tests; returns in a program's process alone, with its test and its files."""
    for line in requests:
        runner = os.fork()
        if runner:
            if os.waitpid(runner, 0)[1]:
                sys.exit("a test could not be set up, or left something behind")
            continue
        test = json.loads(line)
        source, reader, output = lock.prepare(setup, test)
        pid = os.fork()
        if pid == 0:
            requests.close()
            return test, (source, output)
        os.close(output)
        result = watch(setup, reader, pid)
        lock.clean(setup)
        reply(replies, **result)
        os._exit(0)
    os._exit(0)


def main():
    """Lock up and serve; in a program's process, go on as the program."""
    folder, *sys.path = sys.path
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    setup = json.loads(requests.readline())
    exec(PRELUDE, {})  # imported once, for all tests
    library, paths = sys.path, readable()
    sys.path = [*library, folder, *setup["packages"]]
    try:
        lock = importlib.import_module(setup["mode"])
        note = lock.enter(setup, paths)
    except (OSError, ImportError) as error:
        reply(replies, status="refused", output=str(error))
        return
    sys.path = library
    gc.freeze()  # a program's end, which collects garbage, need not copy all of these pages
    reply(replies, status="ready", output=note)
    test, files = serve(setup, lock, requests, replies)
    execute(setup, test, lock, files)


if __name__ == "__main__":
    main()
