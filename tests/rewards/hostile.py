# ruff: noqa: E501  (programs in strings)
"""Hostile programs for the code verifier: each tries to be graded 1 without solving the task, or to do harm.

RULE: where the sandbox is broken, these programs run for real. So each one shows that it *could* do harm, and does none
beyond the test's own folder and process: bounded counts, signal 0, files opened but not changed, never "/" or everyone.

The task is always `double(n)`, tested by assertions; `{...}` are filled in by the test. The value is (program, a part of
the reason that must be given, or several of which one).
"""

BUSY = ("cpu_limit", "timeout")  # a machine with much to do may reach the wall time first
LIMITS = {
    "endless loop": ("def double(n):\n    while True: pass", BUSY),
    "endless loop on import": ("while True: pass", BUSY),
    "sleeps for ever": ("import time\ndef double(n):\n    time.sleep(1000)", "timeout"),
    "ignores the CPU limit's signal": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef double(n):\n    while True: pass",
        ("SIGKILL", "timeout"),
    ),
    "fork bomb": ("import os\nfor _ in range(8): os.fork() or os._exit(0)", "PermissionError"),
    "fork bomb that does not give up": (
        "import os\nforked = 0\nwhile forked < 8:\n    try:\n        os.fork() or os._exit(0)\n        forked += 1\n"
        "    except OSError: pass",
        BUSY,
    ),
    "thread bomb": (
        "import threading, time\nfor _ in range(3000): threading.Thread(target=time.sleep, args=(30,), daemon=True).start()",
        "can't start new thread",
    ),
    "memory bomb": ("def double(n):\n    return [0] * (1 << 28)", "MemoryError"),
    "memory bomb by anonymous files": ("import os\nos.memfd_create('x')", "PermissionError"),
    "huge output": ("def double(n):\n    while True: print('x' * 10_000)", "output_limit"),
    "huge output on stderr": ("import sys\nwhile True: sys.stderr.write('x' * 10_000)", "output_limit"),
    "huge result": ("def double(n):\n    return 'x' * (20 << 20)", "16 MiB"),
    "deep result": ("def double(n):\n    x = []\n    for _ in range(100_000): x = [x]\n    return x", "RecursionError"),
    "huge file": ("open('x', 'wb').write(b'x' * (100 << 20))", "File too large"),
    "many files": (
        "import os\nfor i in range(20): open('x' + str(i), 'wb').write(b'x' * (10 << 20))\nimport time; time.sleep(99)",
        ("disk_limit", "No space left"),
    ),
}
LIMITS["a very deep folder"] = (
    "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nwhile True: pass",
    ("disk_limit", *BUSY),
)
LIMITS["a very deep folder, quickly"] = (
    "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nraise SystemExit",
    ("SystemExit", "disk_limit"),
)
LIMITS["stops itself"] = ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout")
REACH = {
    "reads a file outside": ("print(open({secret!r}).read())", ("PermissionError", "FileNotFoundError")),
    "lists a folder outside": ("import os\nos.listdir({outside!r})", ("PermissionError", "FileNotFoundError")),
    "writes a file outside": ("open({outside!r} + '/new', 'w')", ("PermissionError", "FileNotFoundError", "Read-only")),
    "deletes a file outside": ("import os\nos.remove({secret!r})", ("PermissionError", "FileNotFoundError")),
    "renames a file outside": ("import os\nos.rename({secret!r}, 'x')", ("PermissionError", "FileNotFoundError")),
    "truncates a file outside": ("import os\nos.truncate({secret!r}, 0)", ("PermissionError", "FileNotFoundError")),
    "changes a file's mode": ("import os\nos.chmod({secret!r}, 0)", "PermissionError"),
    "changes a file's times": ("import os\nos.utime({secret!r}, (0, 0))", "PermissionError"),
    "links to a file outside": (
        "import os\nos.symlink({secret!r}, 'x')\nprint(open('x').read())",
        ("PermissionError", "FileNotFoundError"),
    ),
    "deletes a folder outside": (
        "import shutil\nshutil.rmtree({outside!r})",
        ("PermissionError", "FileNotFoundError"),
    ),
    "opens Python's library for writing": (
        "import os\nopen(os.__file__, 'r+b').close()\nraise SystemExit",
        ("PermissionError", "Read-only", "FileNotFoundError"),
    ),
    "connects over TCP": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)", "PermissionError"),
    "opens a UDP socket": ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "PermissionError"),
    "connects to a local socket": (
        "import socket\nsocket.socket(socket.AF_UNIX).connect({outside!r})",
        "PermissionError",
    ),
    "sends a datagram to a local socket": (
        "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "PermissionError",
    ),
    "resolves a name": ("import socket\nsocket.getaddrinfo('example.org', 80)", "name resolution"),
    "signals its parent": (
        "import os, signal\nos.kill(os.getppid() or 1, 0)",
        ("PermissionError", "ProcessLookupError"),
    ),
    "signals everyone": ("import os, signal\nos.kill(-1, 0)", "PermissionError"),
    "signals its process group": ("import os, signal\nos.killpg(0, 0)", "PermissionError"),
    "kills a process by its number": ("import os, signal\nos.kill({pid}, signal.SIGKILL)", "PermissionError"),
    "signals a process by way of a pipe": (
        "import os, fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {pid})",
        "PermissionError",
    ),
    "lowers another process's limits": (
        "import resource\nresource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
        ("PermissionError", "ProcessLookupError"),
    ),
    "raises its own limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)",
        ("ValueError", "PermissionError"),
    ),
    "reads another process's memory": (
        "import os\nprint(open('/proc/{pid}/mem', 'rb').read(1))",
        ("PermissionError", "FileNotFoundError"),
    ),
    "reads the process list": ("import os\nos.listdir('/proc')", ("PermissionError", "FileNotFoundError")),
    "traces a process": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nr = c.ptrace(16, {pid}, 0, 0)\n"
        "raise OSError(ctypes.get_errno(), 'ptrace') if r < 0 else SystemExit",
        "PermissionError",
    ),
    "starts a shell": ("import os\nos.system('touch x')\nos.execv('/bin/sh', ['sh'])", "PermissionError"),
    "starts a subprocess": ("import subprocess\nsubprocess.run(['ls'])", "PermissionError"),
    "leaves its session": ("import os\nos.setsid()", "PermissionError"),
    "enters a new user namespace": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nr = c.unshare(0x10000000)\n"
        "raise OSError(ctypes.get_errno(), 'unshare') if r < 0 else SystemExit",
        "PermissionError",
    ),
    "uses io_uring": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nr = c.syscall(425, 8, bytes(120))\n"
        "raise OSError(ctypes.get_errno(), 'io_uring') if r < 0 else SystemExit",
        "PermissionError",
    ),
    "uses the x32 system calls": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nr = c.syscall(0x40000000 + 41, 2, 1, 0)\n"
        "raise OSError(ctypes.get_errno(), 'x32') if r < 0 else SystemExit",
        "Errno 38",
    ),
    "injects keys into the terminal": (
        "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')",
        ("Inappropriate ioctl", "PermissionError"),
    ),
}
CHEAT = {
    "exits with status 0 on import": ("import sys\nsys.exit(0)", ("SystemExit", "ended")),
    "exits with status 0 when called": ("import sys\ndef double(n):\n    sys.exit(0)", "SystemExit"),
    "ends the process when called": ("import os\ndef double(n):\n    os._exit(0)", "ended"),
    "ends the process at exit": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit", "SystemExit"),
    "returns what is equal to everything": (
        "class Yes(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    __hash__ = int.__hash__\ndef double(n): return Yes(0)",
        "wrong_answer",
    ),
    "returns an object that is equal to everything": (
        "class Yes:\n    def __eq__(self, other): return True\n    def __sub__(self, other): return 0\n"
        "    def __abs__(self): return 0\ndef double(n): return Yes()",
        "wrong_answer",
    ),
    "returns a list that is equal to everything": (
        "class Yes(list):\n    def __eq__(self, other): return True\ndef double(n): return Yes()",
        "wrong_answer",
    ),
    "raises what tests raise": ("def double(n):\n    raise AssertionError", "wrong_answer"),
    "raises what ends a run": ("def double(n):\n    raise SystemExit(0)", "SystemExit"),
    "raises what ends an iteration": ("def double(n):\n    raise StopIteration", "StopIteration"),
    "patches the comparison": (
        "import builtins, operator\nbuiltins.AssertionError = KeyError\nbuiltins.abs = lambda x: 0\n"
        "operator.eq = lambda a, b: True\nimport json\njson.loads = json.dumps = lambda *a, **k: True\n"
        "def double(n): return 'stolen'",
        ("wrong_answer", "not a", "ended", "exit status", "exception"),
    ),
    "patches the harness": (
        "import sys, gc\nfor m in list(sys.modules.values()):\n    for name in ('run_tests', 'encode', 'check', 'main'):\n"
        "        if m is not None: setattr(m, name, lambda *a, **k: True)\n"
        "for f in gc.get_objects():\n    if getattr(f, '__name__', '') in ('check', 'run_tests'): f.__code__ = (lambda *a: 1).__code__\n"
        "def double(n): return 'stolen'",
        ("wrong_answer", "not callable"),
    ),
    "looks for the tests on the stack and in memory": (
        "import sys, gc\ndef double(n):\n    f = sys._getframe()\n    while f:\n"
        "        if ''.join(['EXPECT', 'ED']) in str(f.f_locals) + str(f.f_globals): return n * 2\n        f = f.f_back\n"
        "    if any(''.join(['candidate(4', ') ==']) in str(o) for o in gc.get_objects() if type(o) in (dict, list, tuple)): return n * 2\n"
        "    return 'not found'",
        "wrong_answer",
    ),
    "looks for the tests in its arguments, environment and files": (
        "import sys, os\nfound = str(sys.argv + sys.orig_argv) + str(dict(os.environ)) + str(os.listdir('.'))\n"
        "double = (lambda n: n * 2) if ''.join(['EXPECT', 'ED']) in found else (lambda n: 'not found')",
        "wrong_answer",
    ),
    "reads every descriptor it has": (
        "import os\nfound = b''\nfor fd in range(3, 64):\n    try:\n        os.set_blocking(fd, False)\n        found += os.read(fd, 1 << 20)\n"
        "    except OSError: pass\ndouble = (lambda n: n * 2) if b''.join([b'EXPECT', b'ED']) in found else (lambda n: 'not found')",
        ("wrong_answer", "ended", "sent", "BlockingIOError"),
    ),
    "writes a verdict to every descriptor": (
        "import os, json, struct\nv = json.dumps({{'passed': 1, 'total': 1, 'reason': ''}}).encode()\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, struct.pack('<I', len(v)) + v)\n    except OSError: pass\ndef double(n): return 'stolen'",
        ("wrong_answer", "reply", "unnamed"),
    ),
    "floods the pipe": (
        "import os\nfor fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'\\xff' * 1000)\n    except OSError: pass",
        ("MiB", "ended", "limit", "timeout", "sent"),
    ),
    "says that it is confined in vain": ("import os\nos._exit(125)", "exit status 125"),
    "answers with a function of its own": (
        "def double(n):\n    return lambda *a: True",
        "wrong_answer",
    ),
    "empties the arguments of its callers": ("def double(n):\n    return 0", "wrong_answer"),
}
# Programs that try to make the *verifier* fail, so that their sample is dropped instead of scored 0. They are called with
# JSON arguments, and their results are compared in the verifier's own process: (program, expected results).
_SEND = (
    "import os, struct\ndef double(n):\n    for fd in range(3, 64):\n"
    "        try: os.write(fd, struct.pack('<I', {n}) + {data!r})\n        except OSError: pass\n    return 1"
)
BREAK = {
    "an int that no float holds": ("def double(n):\n    return 10**400", [8, 10.5]),
    "a key with too many digits": ("def double(n):\n    return {10**5000: 1}", [{"1": 8}, {"1": 8}]),
    "a result that is a list": (_SEND.format(n=2, data=b"[]"), [8, 10]),
    "a result that is a number": (_SEND.format(n=1, data=b"7"), [8, 10]),
    "a result that is a text": (_SEND.format(n=4, data=b'"ok"'), [8, 10]),
    "a fraction that takes for ever": (
        "class Fraction:\n    numerator, denominator = 1 << 4_000_000, 3\n    def __str__(self): return '1e999999999'\n"
        "Fraction.__module__ = 'fractions'\ndef double(n): return Fraction()",
        [8, 10],
    ),
    "an error of half a character": (
        "def double(n):\n    class E(Exception):\n        def __str__(self): return chr(0xdc80)\n    raise E",
        [8, 10],
    ),
    "a set of numbers that all have one hash": (
        "import json, os, struct\nv = [k * (2**61 - 1) for k in range(1, 300_000)]\ndef double(n):\n"
        "    frame = json.dumps({'ok': ['s', v]}).encode()\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, struct.pack('<I', len(frame)) + frame)\n        except OSError: pass\n    return 1",
        [8, 10],
    ),
    "a deep result": ("def double(n):\n    d = {}\n    for _ in range(400): d = {'a': d}\n    return d", [{"a": 8}, 10]),
}
