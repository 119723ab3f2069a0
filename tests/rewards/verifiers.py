"""Verifiers for the tests of the pool: each does one thing that a user's verifier may do, or must not."""

import asyncio
import os
import subprocess
import sys
import time


def agree(completion, answer):
    return float(completion == answer)


async def agree_later(completion, answer):
    await asyncio.sleep(0)
    right = completion == answer
    return {"reward": 5.0 if right else -5.0, "accuracy": right, "length": len(completion)}


def everything(**fields):
    return {"reward": 1.0, "fields": len(fields), "prompt_given": "prompt" in fields}


def token_count(completion_tokens):
    return len(completion_tokens)


def give_back(value):
    return {"nan": float("nan"), "none": None, "text": "1.0", "no_reward": {"accuracy": 1.0}, "bool": True}[value]


def raises(completion):
    raise RuntimeError(f"cannot judge {completion}")


def exits(completion):
    sys.exit(0)


def dies(completion):
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)


def loops(pid_file=None):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    if pid_file:
        with open(pid_file, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
    while True:
        time.sleep(0.01)


def naps(seconds=0):
    time.sleep(seconds)
    return 1.0


def c_loop():
    return len(str(9 ** (9**9))) * 1.0  # one call into C: no signal handler runs until it ends


def prints(completion):
    print("this must not reach the protocol" * 100)
    os.write(1, b"nor this")
    return 1.0


def modules():
    from areal_jax.rewards import verify_math

    verify_math("\\boxed{\\frac{1}{2}}", "0.5")
    return {"reward": 1.0} | {name: name in sys.modules for name in ("jax", "torch", "sympy")}


def pid():
    return os.getpid()
