"""Programs: LiveCodeBench's format, verdicts, and a sandbox that hostile programs do not leave."""

from __future__ import annotations

import base64
import functools
import json
import os
import pathlib
import pickle
import socket
import threading
import time
import zlib

import pytest

from sapo_jax import rewards, types
from sapo_jax.tasks import make
from sapo_jax.tasks.programs import Problem, Programs, last_block, parse, same_output, same_value
from sapo_jax.tasks.verifiers.sandbox import MODES, Limits, Sandbox

PYTHONS = {"namespaces": "", "plain": "/usr/bin/python3"}  # plain: one that other users can read
PATIENT = Limits(seconds=30.0, memory_mb=256)  # a busy machine changes no verdict
LIMITS = Limits(seconds=0.5, memory_mb=256, disk_mb=8, output_bytes=1 << 16)
GRACE = 0.5  # seconds past its limit in which a program must be judged


def sandbox(program, mode, limits=PATIENT, **options):
    return Sandbox(program, mode=mode, python=PYTHONS[mode], limits=limits, **options)


@functools.cache
def permitted(mode):
    try:
        sandbox("", mode).close()
    except (RuntimeError, FileNotFoundError):
        return False
    return True


@pytest.fixture(params=MODES)
def mode(request):
    """Every sandbox that this machine permits."""
    if not permitted(request.param):
        pytest.skip(f"no sandbox {request.param} on this machine")
    return request.param


def case(given, output, kind="stdin"):
    return {"input": given, "output": output, "testtype": kind}


ADD = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"


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
        ("import tempfile as t; f = t.TemporaryFile(dir='.'); f.write(b'x')", "ok", ""),
        ("import math, collections, heapq, itertools, bisect, re, decimal, random", "ok", ""),
        ("import numpy", "error", ""),
    ],
)
def test_what_programs_may_do(mode, program, status, output):
    with sandbox(program, mode) as box:
        outcome = box.stdin("")
        assert (outcome.status, outcome.output) == (status, output)


def test_threads_work_where_processes_are_counted():
    if not permitted("namespaces"):
        pytest.skip("no namespaces on this machine")
    program = "import threading as t\nt.stack_size(2**26)\nx = t.Thread(target=print, args=(7,))\n"
    with sandbox(program + "x.start(); x.join()", "namespaces") as box:
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


def test_nothing_survives_a_sandbox(mode):
    """A daemon in its own session, ignoring signals, dies with the sandbox."""
    if mode == "plain":
        pytest.skip("starts no processes")
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


def test_no_folder_is_left_behind(mode):
    with sandbox("open('f', 'w').write('x')", mode) as box:
        assert box.stdin("").status == "ok"
        assert os.path.isdir(box._folder)
    assert not os.path.exists(box._folder)


def test_a_program_sees_no_expected_output(mode):
    """Only inputs enter the sandbox: searching its memory finds no answers."""
    program = (
        "import gc\nfor o in gc.get_objects():\n"
        "  if isinstance(o, dict) and any(k in o for k in ('expected', 'tests')): print('found')"
    )
    with sandbox(program, mode) as box:
        assert "found" not in box.stdin("secret").output


def test_a_machine_without_the_sandbox_says_so(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(RuntimeError, match="does not permit the sandbox 'plain'"):
        Sandbox("", mode="plain", python=str(fake))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("```python\nx\n```", "x\n"),
        ("so\n```py\nx\n```\nor\n```python\ny\n```\nend", "y\n"),
        ("```\nx\n```", "x\n"),
        ("```python\nx\n```\n```json\n{}\n```", "x\n"),
        ("```python\nx", None),
        ("```json\n{}\n```", None),
        ("print(1)", None),
        ("", None),
        ("```python\n" + "x" * 10**6 + "\n```", None),
        ("```python\nx\n```python\ny\n```", "x\n```python\ny\n"),
        ("```" * 10**5, None),
        ("```python\n" * 10**5, None),
        ("```\n" * 10**5, ""),
    ],
)
def test_the_last_block_counts(completion, expected):
    start = time.process_time()
    assert last_block(completion) == expected
    assert time.process_time() - start < 0.5


def test_outputs_are_compared_by_line_and_number():
    for a, b in (
        ("1\n", "1"),
        ("1 2\n3", " 1 2 \n3\n\n"),
        ("0.5", "0.50"),
        ("a 1.0", "a 1"),
        ("", "\n"),
    ):
        assert same_output(a, b), (a, b)
    wrong = (("1", "2"), ("1", "1\n1"), ("1 2", "12"), ("a", "A"), ("1", "1.0000001"), ("", "x"))
    for a, b in (*wrong, ("nan", "NaN x"), ("1", "1e999999999"), ("1", "9" * 10**6)):
        assert not same_output(a, b), (a, b[:9])


def test_values_are_compared_as_json():
    for a, b in (
        ([1, 2], "[1, 2]"),
        (2, "2.0"),
        ("x", '"x"'),
        (None, "null"),
        ({"a": 1}, '{"a": 1}'),
    ):
        assert same_value(a, b)
    for a, b in (
        (True, "1"),
        (1, "true"),
        ([1], "1"),
        (1, "x"),
        (1, ""),
        ([], "[" * 10**5),
        ("1", "1"),
    ):
        assert not same_value(a, b)


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def question(name="q", **fields):
    tests = json.dumps([case("1 2\n", "3\n"), case("5 -5\n", "0\n")])
    row = {"question_content": f"Add. {name}", "question_id": name, "public_test_cases": tests}
    return {**row, **fields}


def test_live_code_bench_problems(tmp_path):
    hidden = json.dumps([case("[1, 2]\n3", "6", "functional")])
    packed = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
    function = question(
        "f",
        public_test_cases=[case("[1]\n1", "2", "functional")],
        private_test_cases=packed,
        metadata=json.dumps({"func_name": "total"}),
        starter_code="class Solution:\n    def total(self, xs, k):",
    )
    task = make("programs", test=write(tmp_path / "t.jsonl", question(), function), seconds=5.0)
    add, total = task.examples("test")
    assert "Add. q" in add.prompt
    assert "def total" in total.prompt
    assert max(len(add.prompt), len(total.prompt)) == task.max_prompt_chars
    assert set(add.prompt + total.prompt) <= set(task.alphabet)
    assert task.isolation in MODES
    method = "class Solution:\n  def total(self, xs, k): return sum(xs) + k"
    verdicts = [
        (add, ADD, 1), (add, "```python\nprint(3)\n```", 0), (add, "3", 0),
        (total, f"```python\n{method}\n```", 1), (total, f"```python\n{method} - 1\n```", 0),
        (total, "```python\nclass Solution:\n  def total(self, xs, k): return 2\n```", 0),
    ]  # fmt: skip
    for example, completion, verdict in verdicts:
        assert task.verify(example, completion) == verdict, completion
    rows = [rewards.Row(e, completion, types.STOP, 9) for e, completion, _ in verdicts]
    with rewards.Scorer(task, workers=3) as scorer:
        found = [future.result().parts["accuracy"] for future in scorer.submit(rows)]
    assert found == [v for _, _, v in verdicts]


class Evil:
    def __reduce__(self):
        return os.system, ("touch hostile-pickle",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"public_test_cases": "[]"}, "no tests"),
        ({"public_test_cases": "[1"}, "public_test_cases is not JSON"),
        ({"public_test_cases": "[1]"}, "list of objects"),
        ({"public_test_cases": [{"input": 1, "output": ""}]}, "list of objects"),
        ({"private_test_cases": "!!"}, "private_test_cases cannot be unpacked"),
        ({"public_test_cases": [case("", "", "other")]}, "testtype must be"),
        ({"public_test_cases": [case("1", "1", "functional")]}, "func_name"),
        ({"metadata": "{"}, "metadata is not JSON"),
        ({"question_content": None}, "field 'question_content'"),
    ],
)
def test_broken_problems_are_refused_with_their_line(tmp_path, fields, message):
    path = write(tmp_path / "t.jsonl", question(), question("b", **fields))
    with pytest.raises(ValueError, match=rf"line 2: .*{message}"):
        make("programs", test=path).examples("test")


def test_a_data_file_cannot_run_code(tmp_path, monkeypatch):
    """The original format is a pickle, which may name any function to call."""
    monkeypatch.chdir(tmp_path)
    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(ValueError, match="in a data file"):
        parse(question(private_test_cases=packed))
    assert not list(tmp_path.iterdir())


def test_tests_are_limited_and_options_checked():
    assert len(parse(question(), max_tests=1).tests) == 1
    for options, message in (({"seconds": 0}, "seconds"), ({"sandbox": "no"}, "namespaces, plain")):
        with pytest.raises(ValueError, match=message):
            Programs(**options)


def test_programs_side_by_side_do_not_share_their_limits(mode):
    """The bound on processes counts per user: sandboxes of one user would starve each other."""
    task = Programs(sandbox=mode, python=PYTHONS[mode], seconds=20.0)
    problem = Problem("", (("1 2", "3"),) * 3)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(task.passes(problem, last_block(ADD))))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 12
