"""The sandbox: what programs may do, and what hostile ones do not get."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from sapo_jax.tasks.programs import Problem, Programs
from sapo_jax.tasks.verifiers import sandbox as outside
from sapo_jax.tasks.verifiers.sandbox import MODES, Limits, Outcome, Sandbox

PYTHONS = {"namespaces": "", "plain": "/usr/bin/python3"}  # plain: one that other users can read
PATIENT = Limits(seconds=30.0, memory_mb=256)  # a busy machine changes no verdict
LIMITS = Limits(seconds=0.5, memory_mb=256, disk_mb=8, output_bytes=1 << 16)
GRACE = 0.5  # seconds past its limit in which a program must be judged


def sandbox(program, mode, limits=PATIENT, **options):
    return Sandbox(program, mode=mode, python=PYTHONS[mode], limits=limits, **options)


@functools.cache
def refusal(mode):
    """Why this machine has no such sandbox, in its own words; None if it has."""
    try:
        sandbox("", mode).close()
    except (RuntimeError, FileNotFoundError) as error:
        return f"isolation={mode} is refused here: {error}"
    return None


NO_SECCOMP = "this kernel has no seccomp, without which threads count as processes"
ADD = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.fixture(params=MODES)
def mode(request):
    """Every sandbox that this machine permits."""
    if why := refusal(request.param):
        pytest.skip(why)
    return request.param


def test_programs_that_read_and_print(mode):
    with sandbox("import sys\nfor line in sys.stdin: print(int(line) * 2)", mode) as box:
        assert box.stdin("1\n2\n").output == "2\n4\n"
        assert box.stdin("x\n").status == "error"
        assert box.stdin("").status == "ok"
        assert box.stdin("21").output == "42\n"
        big = "7\n" * 10_000
        assert box.stdin(big).output == "14\n" * 10_000


def test_functions_and_methods(mode):
    method = (
        "class Solution:\n  def f(self, xs, k):\n    print('noise')\n    return [x * k for x in xs]"
    )
    with sandbox(method, mode, function="f") as box:
        assert box.call([1, 2], 3).output == "[3, 6]"
        assert box.call(None, 3).status == "error"
        assert box.call([1], 2).output == "[2]"
    with sandbox("def f(x): return (x, float(x))", mode, function="f") as box:
        assert json.loads(box.call(1).output) == [1, 1.0]
    for broken in ("def g(x): pass", "def f(x): return {1}", "1 +", "class Solution: pass"):
        with sandbox(broken, mode, function="f") as box:
            assert box.call(1).status == "error"


@pytest.mark.parametrize(
    ("program", "status", "output"),
    [
        ("print('a', end=''); exit()", "ok", "a"),
        ("raise SystemExit(3)", "error", ""),
        ("import os; os._exit(0)", "ok", ""),
        ("import sys; sys.stdout.write('é')", "ok", "é"),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", "ok", "\ufffd"),
        ("if __name__ == '__main__': print(1)", "ok", "1\n"),
        ("open('f', 'w').write('x'); print(open('f').read())", "ok", "x\n"),
        ("open('./f', 'w').write('x'); import os; print(*os.listdir(os.getcwd()))", "ok", "f\n"),
        (
            "import os; open(os.path.abspath('f'), 'w'); os.rename('f', 'g'); os.remove('g')",
            "ok",
            "",
        ),
        (
            "import pathlib as p; p.Path('f').write_text('x'); print(*p.Path().iterdir())",
            "ok",
            "f\n",
        ),
        ("import tempfile as t; f = t.TemporaryFile(dir='.'); f.write(b'x')", "ok", ""),
        ("import tempfile as t; f = t.TemporaryFile(); f.write(b'x')", "ok", ""),
        ("import math, collections, heapq, itertools, bisect, re, decimal, random", "ok", ""),
        ("import numpy", "error", ""),
    ],
)
def test_what_programs_may_do(mode, program, status, output):
    with sandbox(program, mode) as box:
        outcome = box.stdin("")
        assert (outcome.status, outcome.output) == (status, output)


# Reads and prints as PyRival's template does: objects of its own in the place of the streams.
FAST_IO = r"""
import os, sys
from io import BytesIO, IOBase

class FastIO(IOBase):
    newlines = 0
    def __init__(self, file):
        self._fd, self.buffer = file.fileno(), BytesIO()
        self.writable = "x" in file.mode or "r" not in file.mode
        self.write = self.buffer.write if self.writable else None
    def readline(self):
        while self.newlines == 0:
            b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
            self.newlines = b.count(b"\n") + (not b)
            ptr = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
        self.newlines -= 1
        return self.buffer.readline()
    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)

class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush, self.writable = self.buffer.flush, self.buffer.writable
        self.write = lambda s: self.buffer.write(s.encode("ascii"))
        self.readline = lambda: self.buffer.readline().decode("ascii")

sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip("\r\n")
print(*map(int, input().split()))
"""
INPUT = "3 4\n"
KEPT = {  # programs, and what each prints for INPUT
    "a template": (FAST_IO, "3 4\n"),
    "at exit": ("import atexit\natexit.register(print, 5)\nprint(4)", "4\n5\n"),
    "thread": ("import threading\nthreading.Thread(target=lambda: print(input())).start()", INPUT),
    "slow thread": (
        "import threading as t, time\n"
        "t.Thread(target=lambda: (time.sleep(0.2), print(5))).start()\nprint(4)",
        "4\n5\n",
    ),
    "pool": (
        "from concurrent.futures import ThreadPoolExecutor as T\nT(2).submit(lambda: print(5))",
        "5\n",
    ),
    "descriptor": ("import os\nos.write(1, b'5')", "5"),
    "file of the descriptor": ("f = open(1, 'w')\nf.write('5')", "5"),
    "in a cycle": ("f = open(1, 'w')\nl = [f]\nl.append(l)\nf.write('5')", "5"),
    "in a frame": ("def g():\n  f = open(1, 'w')\n  f.write('5')\n  exit()\ng()", "5"),
    "path": ("open('/dev/stdout', 'w').write('5')", "5"),
    "path of a descriptor": ("open('/dev/fd/1', 'w').write('5')", "5"),
    "path of the process": ("open('/proc/self/fd/1', 'w').write('5')", "5"),
    "path of errors": ("open('/dev/stderr', 'w').write('5')\nprint(4)", "4\n"),
    "replaced": ("import sys, io\nsys.stdout = io.TextIOWrapper(open(1, 'wb'))\nprint(5)", "5\n"),
    "buffer": ("import sys\nsys.stdout.buffer.write(b'5')", "5"),
    "kept in memory": (
        "import sys, io, os, atexit\nsys.stdout = io.StringIO()\nprint(5)\n"
        "atexit.register(lambda: os.write(1, sys.stdout.getvalue().encode()))",
        "5\n",
    ),
    "destructor": ("class A:\n  def __del__(self): print(5)\na = A()", "5\n"),
    "logger": (
        "import logging, sys\nlogging.basicConfig(stream=sys.stdout)\nlogging.error('5')",
        "ERROR:root:5\n",
    ),
    "input: path": ("print(open('/dev/stdin').read(), end='')", INPUT),
    "input: path of a descriptor": ("print(open('/dev/fd/0').read(), end='')", INPUT),
    "input: path of the process": ("print(open('/proc/self/fd/0').read(), end='')", INPUT),
    "input: file of the descriptor": ("print(open(0).read(), end='')", INPUT),
    "input: Path": ("import pathlib as p\nprint(p.Path('/dev/stdin').read_text(), end='')", INPUT),
    "input: bytes": ("import os\nos.write(1, os.read(0, os.fstat(0).st_size or 99))", INPUT),
    "input: all at once": ("import sys\nprint(*map(int, sys.stdin.buffer.read().split()))", INPUT),
    "input: lines": ("import fileinput\nfor l in fileinput.input(): print(l, end='')", INPUT),
    "module of the program": ("import __main__\nx = 5\nprint(__main__.x)", "5\n"),
    "class that is looked up": (
        "import pickle\nclass A: x = 5\nprint(pickle.loads(pickle.dumps(A())).x)",
        "5\n",
    ),
    "as the harness imports": (
        "def f(x: Optional[List[int]]) -> Dict[str, Tuple[int, ...]]: ...\n"
        "print(gcd(4, 6), inf, Counter('aab')['a'], reduce(add, [1, 2]), [*accumulate([1, 1])],"
        " ascii_lowercase[:2], heapq.heappop([3]), bisect.bisect([1], 1), bisect_left([1], 1),"
        " datetime.date(2020, 2, 1), copy.copy(1), deepcopy(2), math.pi > 3, json.dumps([]),"
        " mean([1, 3]), pow(2, 3, 5), random.randint(1, 1), re.sub('a', 'b', 'a'),"
        " stdin.readline().strip(), string.digits[0], io.StringIO('y').read(),"
        " functools.cache(abs)(-1), cache(abs)(-1), statistics.mode([4]), itemgetter(0)([6]))",
        "2 inf 2 3 [1, 2] ab 3 1 0 2020-02-01 1 2 True [] 2 3 1 b 3 4 0 y 1 1 4 6\n",
    ),
    "as deep as the harness": (
        "def f(n): return n and 1 + f(n - 1)\nprint(f(49_000), sys.getrecursionlimit())",
        "49000 50000\n",
    ),
    "deep in C": (
        "@lru_cache(None)\ndef f(n): return n and 1 + f(n - 1)\n"
        "n = 20_000 if version_info < (3, 12) else 100  # later ones have a bound of their own\n"
        "print(f(n) == n)",
        "True\n",
    ),
    "large stack": (
        f"import resource as r\nhard = {resource.getrlimit(resource.RLIMIT_STACK)[1]}\n"
        "r.setrlimit(r.RLIMIT_STACK, (hard, hard))\nprint(5)",
        "5\n",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_programs_are_ordinary_scripts(mode, name):
    """Also at their end: threads are waited for, and what was written is flushed."""
    program, expected = KEPT[name]
    with sandbox(program, mode, Limits(seconds=30.0, memory_mb=1024)) as box:
        if "no seccomp" in box.locks and name in ("thread", "slow thread", "pool"):
            pytest.skip(NO_SECCOMP)
        assert box.stdin(INPUT) == Outcome("ok", expected)


def test_a_starter_of_the_benchmark_runs(mode):
    program = (
        "class Solution:\n  def f(self, xs: List[int], k: Optional[int] = None) -> List[int]:\n"
        "    return sorted(xs, key=cmp_to_key(lambda a, b: b - a))[:k]"
    )
    with sandbox(program, mode, function="f") as box:
        assert box.call([1, 3, 2], 2).output == "[3, 2]"


def test_what_the_harness_imports_answers_no_problem(mode):
    for program, status in (("", "error"), ("from math import gcd", "ok"), ("gcd = min", "ok")):
        with sandbox(program, mode, function="gcd") as box:
            assert box.call(2, 4).status == status, program


def test_threads_work_where_processes_are_counted(mode):
    """The usual way to a large stack; without seccomp, threads cannot be told from processes."""
    program = "import threading as t\nt.stack_size(2**26)\nx = t.Thread(target=print, args=(7,))\n"
    with sandbox(program + "x.start(); x.join()", mode) as box:
        if "no seccomp" in box.locks:
            pytest.skip(NO_SECCOMP)
        assert box.stdin("").output == "7\n"


FORK = "import os\n"
HOSTILE = {
    "fork bomb": FORK + "while True:\n  try: os.fork()\n  except OSError: pass",
    "daemon that forks on": FORK
    + "while True:\n  try:\n    if os.fork(): os._exit(0)\n  except OSError: 1",
    "daemon": FORK + "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    while 1: pass",
    "daemon holds the output": FORK
    + "if os.fork() == 0:\n  os.setsid()\n  while 1: pass\nprint(5)",
    "threads": "import threading as t, time\n"
    "while 1: t.Thread(target=time.sleep, args=(9,)).start()",
    "sleep": "import time\ntime.sleep(1000)",
    "loop": "while True: pass",
    "loop in C": "9 ** 9 ** 9",
    "ignore signals": "import signal as s\nfor i in range(1, 64):\n  try: s.signal(i, s.SIG_IGN)\n"
    "  except (OSError, ValueError): pass\nwhile 1: pass",
    "catch everything": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "memory": "x = [0]\nwhile True: x += x",
    "memory at once": "x = bytearray(10**11)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "deep nesting": "eval('(' * 10**5 + ')' * 10**5)",
    "huge output": "while True: print('x' * 10**6)",
    "output byte by byte": "import os\nwhile True: os.write(1, b'x')",
    "huge errors": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "fill disk": "f = open('f', 'wb')\nwhile True: f.write(b'x' * 10**6)",
    "fill disk with files": "i = 0\nwhile True:\n  i += 1\n"
    "  open(str(i), 'wb').write(b'x' * 10**6)",
    "fill /tmp": "f = open('/tmp/hostile', 'wb')\nwhile True: f.write(b'x' * 10**6)",
    "fill shared memory": "f = open('/dev/shm/hostile', 'wb')\nwhile True: f.write(b'x' * 10**6)",
    "write home": "import os\nopen(os.path.expanduser('~root/hostile'), 'w')",
    "write CANARY": "open('CANARY', 'w').write('changed')",
    "remove CANARY": "import os\nos.remove('CANARY')",
    "rename CANARY": "import os\nos.rename('CANARY', 'stolen')",
    "link to CANARY": "import os\nos.symlink('CANARY', 'l')\nopen('l', 'w').write('changed')",
    "shadow": "print(open('/etc/shadow').read())",
    "environment of the parent": "import os\nprint(open(f'/proc/{os.getppid()}/environ').read())",
    "memory of the parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b').read(1)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "kill the tests": "import os\nos.kill(PID, 9)",
    "kill the group": "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "datagram": "import socket as s\nx = s.socket(s.AF_INET, s.SOCK_DGRAM)\n"
    "x.sendto(b'x', ('127.0.0.1', PORT))\nraise SystemExit(1)",
    "resolve": "import socket\nsocket.getaddrinfo('example.com', 80)",
    "socket of a service": "import socket as s\nx = s.socket(s.AF_UNIX)\n"
    "x.connect('/run/docker.sock')",
    "shell": "import os\nraise SystemExit(os.system('touch CANARY.shell') or 1)",
    "subprocess": "import subprocess\nsubprocess.run(['touch', 'CANARY.run'], check=True)",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'n', b'/', b'tmpfs', 0, None): 1 / 0",
    "new namespaces": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): 1 / 0",
    "become root": "import os\nos.setuid(0)",
    "device": "import os\nos.mknod('disk', 0o60666, os.makedev(8, 0))",
    "crash": "import ctypes\nctypes.string_at(0)",
    "close the pipes": "import os\nos.closerange(0, 999)\nwhile True: pass",
    "forge a result": "import os\nfor i in range(99):\n"
    "  try: os.write(i, b'{}\\n'.replace(b'}', b'\"status\": \"ok\"}'))\n"
    "  except OSError: pass\nos.abort()",
    "not UTF-8": "\ud800",
    "NUL": "print(1)\x00",
}


def test_hostile_programs(mode, tmp_path):
    """Each fails in time, does no harm, and the next program runs."""
    canary = tmp_path / "canary"
    canary.write_text("unharmed")
    tmp_path.chmod(0o755)
    canary.chmod(0o666)
    before = {p for place in ("/tmp", "/dev/shm") for p in pathlib.Path(place).glob("hostile*")}
    assert not before
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0)
    words = {"CANARY": str(canary), "PORT": str(listener.getsockname()[1]), "PID": str(os.getpid())}
    assert len(HOSTILE) >= 20
    for name, program in HOSTILE.items():
        for word, value in words.items():
            program = program.replace(word, value)
        seconds = []
        while not seconds or (seconds[-1] > LIMITS.seconds + GRACE and len(seconds) < 4):
            with sandbox(program, mode, LIMITS) as box:
                start = time.perf_counter()
                outcome = box.stdin("")
                seconds.append(time.perf_counter() - start)
        got_nothing = outcome.output in ("", "5\n")  # signals to the parent are ignored
        assert outcome.status != "ok" or got_nothing, (name, outcome.output[:80])
        assert min(seconds) <= LIMITS.seconds + GRACE, name
        assert "root:" not in outcome.output
        assert canary.read_text() == "unharmed", name
        assert len(list(tmp_path.iterdir())) == 1, name
    for place in ("/tmp", "/dev/shm", "/root"):
        if os.access(place, os.R_OK):
            assert not list(pathlib.Path(place).glob("hostile*"))
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    with sandbox("print(1)", mode) as box:
        assert box.stdin("").output == "1\n"


@pytest.mark.parametrize("mode", ["namespaces"], indirect=True)  # the other starts no processes
def test_nothing_survives_a_sandbox(mode):
    """A daemon in its own session, ignoring signals, dies with the sandbox."""
    program = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(31.4159)"

    def survivors():
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if b"jail.py" in path.read_bytes():
                    found.append(path.parent.name)
            except OSError:
                continue
        return set(found)

    before = survivors()
    with sandbox(program, mode, LIMITS) as box:
        assert box.stdin("").status in ("ok", "error", "time")
    for _ in range(100):
        if not survivors() - before:
            return
        time.sleep(0.02)
    assert not survivors() - before


def folders(place):
    return [path for path in pathlib.Path(place).iterdir() if "program" in path.name]


@pytest.fixture
def place(monkeypatch):
    """A temporary directory that other users can enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield folder


def test_no_folder_is_left_behind(mode, place):
    with sandbox("open('f', 'w').write('x')", mode) as box:
        assert box.stdin("").status == "ok"
        assert len(folders(place)) == (mode == "plain")  # namespaces need none
    assert not folders(place)


KILLED = """
import os, signal, sys
from sapo_jax.tasks.verifiers.sandbox import Sandbox
boxes = [Sandbox("open('f', 'w').write('x')", mode=sys.argv[1], python=sys.argv[2]) for _ in "ab"]
boxes[0].stdin("")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folders_of_a_killed_process_go_at_the_next_start(mode, place):
    killed = subprocess.run([sys.executable, "-c", KILLED, mode, PYTHONS[mode]], check=False)
    assert killed.returncode == -9
    assert len(folders(place)) == 2 * (mode == "plain")
    other = pathlib.Path(place, "program-of-somebody")
    other.mkdir()
    with sandbox("", mode) as living:
        outside._remove_stale.cache_clear()  # as another process would
        with sandbox("", mode):
            assert living.stdin("").status == "ok"
            assert len(folders(place)) == 1 + 2 * (mode == "plain")
    assert folders(place) == [other]


FINDER = """
import gc, hashlib, os, sys
def strings(*objects, depth=6):
    for o in objects:
        if isinstance(o, (str, bytes)):
            yield from o.split() if isinstance(o, str) else o.decode('latin1').split()
        elif depth and isinstance(o, dict):
            yield from strings(*o.values(), depth=depth - 1)
        elif depth and isinstance(o, (list, tuple, set)):
            yield from strings(*o, depth=depth - 1)
def places():
    frame = sys._getframe()
    while frame:
        yield from (frame.f_locals, frame.f_globals)
        frame = frame.f_back
    yield from ([vars(m) for m in sys.modules.values() if m], dict(os.environ))
    for fd in range(64):
        try: yield os.read(fd, 1 << 20)
        except OSError: pass
    try: yield from gc.get_objects()
    except PermissionError: pass
found = (s for p in places() for s in strings(p))
print(next((s for s in found if hashlib.md5(s.encode()).hexdigest() == HASH), ''))
"""


def test_the_expected_output_is_nowhere_in_a_program(mode):
    """Who compares is another process: no object, frame or descriptor leads to the answer."""
    answer, task = os.urandom(8).hex(), Programs(isolation=mode, python=PYTHONS[mode], seconds=30.0)
    program = FINDER.replace("HASH", repr(hashlib.md5(answer.encode()).hexdigest()))
    assert task.passes(Problem("", ((answer, answer),)), program)  # it finds what is there
    assert not task.passes(Problem("", (("x", answer),)), program)


def test_a_machine_without_the_sandbox_says_what_to_do(tmp_path, capsys, monkeypatch):
    """Nobody gets the weaker sandbox who has not asked for it by its name."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"does not permit the sandbox 'plain'.*other users"):
        Sandbox("", mode="plain", python=str(fake))
    refusal = r"does not permit the sandbox 'namespaces'.*userns.*isolation='plain'.*docs/sandbox"
    for task in (Programs(python=str(fake)), Programs(sandbox="auto", python=str(fake))):
        for begin in (task.start, lambda task=task: task.passes(Problem("", (("", ""),)), "")):
            with pytest.raises(RuntimeError, match=refusal):
                begin()
    assert Programs(sandbox="plain").isolation == "plain"  # as it was called


REFUSING = """
import errno, sys
import seccompy
machine = seccompy.Filter()
for name in sys.argv[1].split():
    machine.errno(name, errno.EPERM)
machine.load()
from sapo_jax.tasks.verifiers.sandbox import check
print(check(*sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("calls", "mode", "expected"),
    [
        ("unshare", "namespaces", "Operation not permitted. Let users create namespaces"),
        ("seccomp", "namespaces", "no seccomp"),
        ("unshare", "plain", "landlock, seccomp"),
        ("landlock_restrict_self", "plain", "no landlock, seccomp"),
        ("seccomp", "plain", "landlock, no seccomp"),
        ("seccomp landlock_create_ruleset", "plain", "no landlock, no seccomp"),
    ],
)
def test_what_a_machine_refuses_is_told(calls, mode, expected):
    """As containers do; found out in processes of their own, before the first program."""
    pytest.importorskip("seccompy")
    if why := refusal(mode):
        pytest.skip(why)
    command = [sys.executable, "-c", REFUSING, calls, mode, PYTHONS[mode]]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert expected in found.stdout + found.stderr


# Each writes EXPECTED if it gets at the file SECRET, or does harm. They stand for their kinds.
ATTACKS = {
    "read": "print(open(SECRET).read())",
    "read by bytes": "print(open(SECRET.encode()).read())",
    "read in C": "import _io\nprint(_io.FileIO(SECRET).read())",
    "read by descriptor": "print(os.read(os.open(SECRET, 0), 99))",
    "read as code": "import io\nprint(io.open_code(SECRET).read())",
    "read by a library": "import linecache\nprint(linecache.getlines(SECRET))",
    "up": "print(open('../' * 9 + SECRET).read())",
    "up from the library": "print(open('/usr/lib/' + '../' * 9 + SECRET).read())",
    "folder as descriptor": "f = os.open(FOLDER, 0)\n"
    "print(os.read(os.open('secret', 0, dir_fd=f), 99))",
    "own folder as descriptor": "f = os.open('.', 0)\n"
    "print(os.read(os.open('../' * 9 + SECRET, 0, dir_fd=f), 99))",
    "change folder": "os.chdir(FOLDER)\nprint(open('secret').read())",
    "write there": "os.chdir(FOLDER)\nopen('ckpt.bin', 'w')",
    "symlink": "os.symlink(SECRET, 'l')\nprint(open('l').read())",
    "hard link": "os.link(SECRET, 'l')\nprint(open('l').read())",
    "rename in": "os.rename(SECRET, 'l')\nprint(open('l').read())",
    "rename out": "open('f', 'w')\nos.rename('f', FOLDER + '/f')",
    "truncate": "os.truncate(SECRET, 0)",
    "times": "os.utime(SECRET, (0, 0))",
    "mode": "os.chmod(SECRET, 0)",
    "list": "if os.listdir(FOLDER): print('EXPECTED')",
    "scan": "if list(os.scandir(FOLDER)): print('EXPECTED')",
    "root of the process": "print(open('/proc/self/root' + SECRET).read())",
    "root of others": "for p in (os.getppid(), PID, 1):\n"
    "  try: print(open(f'/proc/{p}/root{SECRET}').read())\n  except OSError: pass",
    "memory": "for p in (os.getppid(), PID, 1):\n"
    "  try: open(f'/proc/{p}/mem', 'rb').read(0); print('EXPECTED')\n  except OSError: pass",
    "environment": "for p in (os.getppid(), PID, 1):\n"
    "  try: open(f'/proc/{p}/environ').read(); print('EXPECTED')\n  except OSError: pass",
    "command lines": "for p in range(99999):\n"
    "  try: open(f'/proc/{p}/cmdline').read(); print('EXPECTED')\n  except OSError: pass",
    "descriptors of others": "for p in (os.getppid(), PID, 1):\n"
    "  try: os.listdir(f'/proc/{p}/fd'); print('EXPECTED')\n  except OSError: pass",
    "limits of the trainer": "import resource as r\n"
    "r.prlimit(PID, r.RLIMIT_NOFILE, (9, 9))\nprint('EXPECTED')",
    "priority of the trainer": "os.setpriority(os.PRIO_PROCESS, PID, 19)\nprint('EXPECTED')",
    "processors of the trainer": "os.sched_setaffinity(PID, [0])\nprint('EXPECTED')",
    "signal to the trainer": "os.kill(PID, 0)\nprint('EXPECTED')",
    "sqlite": "import sqlite3\nsqlite3.connect(FOLDER + '/d').execute('create table t (a)')",
    "sqlite reads": "import sqlite3\nsqlite3.connect(SECRET)\n"
    "sqlite3.connect('d').execute('attach ? as a', (SECRET,))\nprint('EXPECTED')",
    "dbm": "import dbm\ndbm.open(FOLDER + '/d', 'c')['a'] = 'b'",
    "gdbm": "import dbm.gnu\ndbm.gnu.open(FOLDER + '/d', 'c')['a'] = 'b'",
    "ndbm": "import dbm.ndbm\ndbm.ndbm.open(FOLDER + '/d', 'c')['a'] = 'b'",
    "history": "import readline\nreadline.write_history_file(FOLDER + '/h')",
    "shared memory": "open('/dev/shm/hostile', 'w')\nprint('EXPECTED')",
    "semaphore": "import _multiprocessing as m\nm.SemLock(1, 1, 1, '/hostile', False)",
    "C library": "import ctypes\nf = ctypes.CDLL(None).open(SECRET.encode(), 0)\n"
    "print(os.read(f, 99))",
    "C library from a file": "import sysconfig, shutil, importlib.machinery as m\n"
    "import importlib.util as u, glob\n"
    "c, = glob.glob(sysconfig.get_path('platstdlib') + '/lib-dynload/_ctypes.*')\n"
    "open('c.so', 'wb').write(open(c, 'rb').read())\n"
    "l = m.ExtensionFileLoader('_ctypes', 'c.so')\n"
    "c = u.module_from_spec(u.spec_from_loader('_ctypes', l))\n"
    "f = c.dlsym(c.dlopen(None, 0), 'open')\n"
    "class F(c.CFuncPtr): _flags_, _restype_ = 1, c._SimpleCData\n"
    "print(os.read(F(f)(SECRET.encode(), 0), 99))",
    "trace the trainer": "import ctypes\n"
    "if ctypes.CDLL(None).ptrace(16, PID, 0, 0) == 0: print('EXPECTED')",
    "trace the parent from a child": "import ctypes\nif os.fork() == 0:\n"
    "  if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0: print('EXPECTED', flush=True)",
    "trace the server": "import ctypes\n"
    "if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0: print('EXPECTED')",
    "keys": "import ctypes\n"
    "if ctypes.CDLL(None).syscall(248, b'user', b'k', b'v', 1, -3) > 0: print('EXPECTED')",
    "virtual sockets": "import socket\nsocket.socket(40, 1)\nprint('EXPECTED')",
    "process": "import _posixsubprocess as p\nr, w = os.pipe()\n"
    "p.fork_exec([b'cat', SECRET.encode()], [b'/bin/cat'], True, (), None, None, -1, -1, -1, -1,"
    " -1, -1, r, w, True, True, 0, None, None, None, -1, None, False)\n"
    "import time\ntime.sleep(0.2)",
    "spawn": "os.posix_spawn('/bin/cat', ['cat', SECRET], {})\nimport time\ntime.sleep(0.2)",
    "become another": "os.execv('/bin/cat', ['cat', SECRET])",
    "interpreter without hooks": "import _xxsubinterpreters as i\n"
    "i.run_string(i.create(), f'print(open({SECRET!r}).read())')",
    "fresh module": "import _imp, importlib.machinery as m\n"
    "s = m.ModuleSpec('posix', None)\np = _imp.create_builtin(s)\n_imp.exec_builtin(p)\n"
    "p.mkfifo(FOLDER + '/x')",
    "builtins": "import builtins\n"
    "for n in ('isinstance', 'type', 'str', 'len', 'any', 'all', 'PermissionError', 'OSError'):\n"
    "  setattr(builtins, n, lambda *a: False)\nprint(open(SECRET).read())",
    "libraries": "import posixpath\nfor n in dir(posixpath):\n"
    "  if n.isidentifier(): setattr(posixpath, n, lambda *a, **k: '/usr/lib/')\n"
    "for n in ('fspath', 'fsdecode', 'lstat', 'stat', 'readlink'): setattr(os, n, lambda *a: '')\n"
    "print(open(SECRET).read())",
    "own string": "class S(str):\n  def startswith(s, *a): return True\n"
    "  def __contains__(s, x): return False\n  def __hash__(s): return hash('/dev/null')\n"
    "  def __eq__(s, o): return True\n  __ne__ = lambda s, o: False\n"
    "  def __add__(s, o): return '/usr/lib/'\n  def __getitem__(s, i): return 'x'\n"
    "print(open(S(SECRET)).read())",
    "frames of the hook": "try: open(SECRET)\nexcept PermissionError as e:\n"
    "  f = e.__traceback__.tb_next.tb_frame\n"
    "  for n, v in f.f_locals.items():\n"
    "    if callable(v) and hasattr(v, '__code__'): v.__code__ = (lambda p: True).__code__\n"
    "print(open(SECRET).read())",
    "system files": "print('EXPECTED', open('/etc/passwd').read())",
    "programs of the system": "open('/usr/bin/env', 'rb')\nprint('EXPECTED')",
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "layers"), [*((mode, "all") for mode in MODES), ("plain", "hook")], indirect=["mode"]
)
def test_attacks(mode, layers, place, monkeypatch):
    """Of each, its kind: the hook withstands them alone, too."""
    if layers == "hook":
        monkeypatch.setattr(outside, "_packages", list)
    secret = pathlib.Path(place, "secret")
    secret.write_text("EXPECTED OUTPUT")
    secret.chmod(0o666)
    os.chmod(place, 0o777)
    words = f"PID, FOLDER, SECRET = {os.getpid()}, {place!r}, {str(secret)!r}\n"
    before, limits = secret.stat(), resource.getrlimit(resource.RLIMIT_NOFILE)
    with sandbox("import os, sys\nexec(sys.stdin.read())", mode) as box:
        for name, attack in ATTACKS.items():
            found = box.stdin(words + attack)
            assert "EXPECTED" not in found.output, (name, found)
            assert found.status in ("ok", "error"), name
            now = secret.stat()
            assert (now.st_mode, now.st_mtime) == (before.st_mode, before.st_mtime), name
            assert secret.read_text() == "EXPECTED OUTPUT", name
            left = [path.name for path in pathlib.Path(place).iterdir()]
            assert len(left) == 1 + (mode == "plain"), (name, left)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    assert not list(pathlib.Path("/dev/shm").glob("*hostile*"))


def test_the_kernels_layers_hold_alone(place, monkeypatch):
    """Where a program gets past the hook, as some will."""
    if why := refusal("plain"):
        pytest.skip(why)
    jail = shutil.copytree(outside.JAIL, pathlib.Path(place, "jail"))
    script = jail / "plain.py"
    for line in ("sys.addaudithook(fence(setup))", "del _imp.create_builtin", "vars(module).pop"):
        assert script.read_text().count(line) == 1
        script.write_text(script.read_text().replace(line, "str" if line[-1] == "p" else "pass  #"))
    monkeypatch.setattr(outside, "JAIL", str(jail))
    secret = pathlib.Path(place, "secret")
    secret.write_text("EXPECTED OUTPUT")
    secret.chmod(0o666)
    words = f"PID, FOLDER, SECRET = {os.getpid()}, {place!r}, {str(secret)!r}\n"
    with sandbox("import os, sys\nexec(sys.stdin.read())", "plain") as box:
        if box.locks != "landlock, seccomp":
            pytest.skip("not all layers on this machine")
        for name, attack in ATTACKS.items():
            assert "EXPECTED" not in box.stdin(words + attack).output, name
    assert len(list(pathlib.Path(place).iterdir())) == 2


REMEMBER = {
    "file": ("open('f', 'w')", "open('f')"),
    "hidden file": ("open('.f', 'w')", "open('.f')"),
    "file elsewhere": ("open('/tmp/f', 'w')", "open('/tmp/f')"),
    "file in shared memory": ("open('/dev/shm/f', 'w')", "open('/dev/shm/f')"),
    "closed folder": ("os.makedirs('d/e')\nos.chmod('d', 0)", "os.chmod('d', 0o700)"),
    "deep folder": ("for _ in range(2000): os.mkdir('d'); os.chdir('d')", "os.rmdir('d')"),
    "times of the folder": ("os.utime('.', (1, 1))", "assert os.stat('.').st_mtime == 1"),
    "segment": ("C.shmget(7, 9, 0o1777) >= 0 or 1 / 0", "C.shmget(7, 9, 0o777) >= 0 or 1 / 0"),
    "queue": ("C.msgget(7, 0o1777) >= 0 or 1 / 0", "C.msgget(7, 0o777) >= 0 or 1 / 0"),
    "number of processes": (
        "for _ in range(50):\n  if os.fork() == 0: os._exit(0)\n  os.wait()",
        "assert os.fork() > 40",
    ),
    "module": ("import math\nmath.x = 1", "import math\nmath.x"),
    "daemon": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0x')\ns.listen()\n"
        "if os.fork() == 0:\n  os.setsid()\n  import time\n  time.sleep(99)",
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0x')",
    ),
}


def test_nothing_persists_between_tests(mode):
    """A program that knows which test it is at can say what is right for that one."""
    setup = "import os, sys, ctypes\nC = ctypes.CDLL(None)\n" if mode == "namespaces" else ""
    with sandbox(f"import os, sys\n{setup}exec(sys.stdin.read())", mode) as box:
        for name, (write, find) in REMEMBER.items():
            box.stdin(write)
            assert box.stdin(find + "\nprint('EXPECTED')") != Outcome("ok", "EXPECTED\n"), name
        assert box.stdin("print(os.listdir('.'))").output == "[]\n"


FORGERS = [
    "import os\nfor i in range(64):\n"
    '  try: os.write(i, b\'{"status": "ok", "output": "41"}\\n\')\n'
    "  except OSError: pass\nos._exit(0)",
    "import json\njson.dumps = lambda *a, **k: '41\\n'\njson.loads = lambda *a: 41",
    "import sys\nclass E:\n  __eq__ = lambda s, o: True\n  __hash__ = lambda s: 0\n"
    "  __str__ = __repr__ = lambda s: 'E'\nprint(E())\nf = lambda x: E()",
    "import os\nos._exit(0)",
    "raise SystemExit(0)",
    "import sys\nsys.stdout = sys.__stdout__ = None",
    "import sys\nfor m in list(sys.modules): sys.modules.pop(m)",
    "import atexit, os\natexit.register(os._exit, 0)",
    "import sys\ndef f(x):\n  sys.exit(0)",
    "class Solution:\n  def __getattr__(self, n): return lambda *a: self",
    "import builtins\nbuiltins.__import__ = None\nbuiltins.print = lambda *a: None",
    "import threading, os\nthreading.Thread(target=os._exit, args=(0,)).start()",
    "f = lambda x: float('nan')",
    "def f(x):\n  import sys\n  sys._getframe(1).f_locals['function'] = ''\n  return x",
]


@pytest.mark.parametrize("function", ["", "f"])
def test_results_cannot_be_forged(mode, function):
    """Nothing but the right output is a pass, whatever is done to the objects around it."""
    problem = Problem(function, ((["40"] if function else "40", 41 if function else "41"),) * 2)
    task = Programs(isolation=mode, python=PYTHONS[mode], seconds=20.0)
    for program in FORGERS:
        assert "41" in program or not task.passes(problem, program), program
    # What says "41" itself passes iff that is what comes out.
    assert not task.passes(problem, FORGERS[0])
    right = "f = lambda x: int(x) + 1\nif not FUNCTION: print(f(input()))"
    assert task.passes(problem, right.replace("FUNCTION", repr(function)))


LEAK = """
import glob, json, os, sys
lines = [open('/proc/%s/cmdline' % p).read() for p in os.listdir('/proc') if p.isdigit()]
for path in [word for line in lines for word in line.split('\\0') if word.endswith('.jsonl')]:
    for line in open(path):
        for case in json.loads(line)['public_test_cases']: print(case['output'])
"""
TRAINER = """
import sys
from sapo_jax.tasks import make
path, isolation, python, leak = sys.argv[1:]
task = make("programs", test=path, isolation=isolation, python=python, seconds=20.0)
print(task.verify(task.examples("test")[0], "```python\\n" + leak + "\\n```"))
"""


def test_a_path_on_the_command_line_leads_to_no_reward(mode, place):
    """The trainer's own command line names its data, which any user may read."""
    path = pathlib.Path(place, "problems.jsonl")
    tests = [{"input": "", "output": "secret", "testtype": "stdin"}]
    path.write_text(json.dumps({"question_content": "q", "public_test_cases": tests}))
    path.chmod(0o644)
    command = [sys.executable, "-c", TRAINER, str(path), mode, PYTHONS[mode], LEAK]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(found.stdout.splitlines()[-1]) == 0.0


def test_programs_side_by_side_do_not_share_their_limits(mode):
    """The bound on processes counts per user: sandboxes of one user would starve each other."""
    task = Programs(sandbox=mode, python=PYTHONS[mode], seconds=20.0)
    problem = Problem("", (("1 2", "3"),) * 3)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(task.passes(problem, ADD)))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 12
