"""Which processes a run has, and what each of them inherits."""

import ctypes
import os
import subprocess
import sys

import pytest

from areal_jax import config as configs
from areal_jax.config import ConfigError
from areal_jax.exits import WRONG_SETTING
from areal_jax.launch.roles import KEEP_BUFFERS, roles_of
from areal_jax.launch.supervisor import ROOT
from configs import quickstart


def environments(tmp_path, **settings):
    config = quickstart.get_config()
    config.update_from_flattened_dict(settings)
    roles, _ = roles_of(configs.resolve(config), tmp_path)
    return {role.name: role.env for role in roles}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    for name in ("MALLOC_MMAP_MAX_", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("engine", "gpus", "expected"),
    [("jax", "", {"trainer-0", "rollout-0"}), ("vllm", "", {"trainer-0"}), ("jax", "0,1", set())],
)
def test_processes_that_compute_with_jax_on_cpus_keep_their_buffers(tmp_path, monkeypatch, engine, gpus, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    found = environments(tmp_path, **{"rollout.engine": engine})
    assert {name for name, env in found.items() if env.get("MALLOC_MMAP_MAX_") == "0"} == expected


# Takes aligned buffers and returns them, as XLA does in every step; of small objects beside them some live for a while.
BUFFERS = """
import ctypes, random
libc, numbers, kept = ctypes.CDLL(None), random.Random(1), []
libc.aligned_alloc.restype = libc.malloc.restype = ctypes.c_void_p
libc.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
for step in range(1000):
    buffers = [libc.aligned_alloc(64, 64 * size) for size in (400_000, 50_000, 16_000, 16_000, 16_000, 2_000)]
    small = [libc.malloc(numbers.choice((16, 24, 40, 56, 72, 88, 104, 136, 200, 400))) for _ in range(40)]
    numbers.shuffle(buffers)
    kept += small[::3]
    for block in buffers + small[1::3] + small[2::3]:
        libc.free(block)
    while len(kept) > 2000:
        libc.free(kept.pop(numbers.randrange(len(kept))))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:")) * 1024)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="these settings are glibc's")
def test_the_heap_of_a_role_does_not_grow_by_another_buffer_when_one_was_returned():
    """With the threads' caches, glibc 2.36 comes to more than a hundred times of what is in use."""
    env = os.environ | KEEP_BUFFERS
    done = subprocess.run([sys.executable, "-c", BUFFERS], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * 64 * 516_000


@pytest.mark.parametrize(
    ("gpus", "expected"), [("", "0 glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=0 once"),
                           ("0", "unset glibc.malloc.hugetlb=0 once")],
)  # fmt: skip
def test_a_tool_measures_in_the_environment_of_a_role(gpus, expected):
    program = (
        "import os, sys; from areal_jax.launch.roles import as_role; as_role(); "
        "print(os.environ.get('MALLOC_MMAP_MAX_', 'unset'), os.environ['GLIBC_TUNABLES'], *sys.argv[1:])"
    )
    own = {"CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": ROOT, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    env = os.environ | own
    done = subprocess.run([sys.executable, "-c", program, "once"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_a_setting_of_the_config_comes_before_what_the_launcher_would_set(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = {"launch.trainer_env": {"MALLOC_MMAP_MAX_": "7"}, "launch.env": {"MALLOC_ARENA_MAX": "2"}}
    found = environments(tmp_path, **config)
    assert found["trainer-0"]["MALLOC_MMAP_MAX_"] == "7"
    assert {env["MALLOC_ARENA_MAX"] for env in found.values()} == {"2"}


@pytest.mark.parametrize("config", [{}, {"launch.env": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}])
def test_what_a_user_tunes_of_glibc_stays(tmp_path, monkeypatch, config):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    found = environments(tmp_path, **config)
    assert found["trainer-0"]["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"
    assert found["controller"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_rollout_workers_get_the_first_gpus_and_the_trainer_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    found = environments(tmp_path, **{"launch.rollout_gpus": 1, "rollout.workers": 2})
    seen = {name: env.get("CUDA_VISIBLE_DEVICES") for name, env in found.items()}
    assert (seen["rollout-0"], seen["rollout-1"], seen["trainer-0"]) == ("4", "5", "6,7")
    assert all(found[name]["JAX_PLATFORMS"] == "cpu" for name in ("controller", "rewards-0"))


def test_too_few_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match=r"launch\.rollout_gpus=1 .* needs 1 GPUs.*; 1 are visible"):
        environments(tmp_path, **{"launch.rollout_gpus": 1})


@pytest.mark.parametrize("role", ["rollout", "rewards"])
def test_a_role_says_by_its_exit_code_that_a_setting_is_wrong(tmp_path, role):
    """Another start would change nothing: the launcher does not try."""
    (tmp_path / "config.json").write_text('{"rollout": {"slotz": 1}}')
    command = [sys.executable, "-m", f"areal_jax.{role}", "--workdir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == WRONG_SETTING and "slotz" in done.stderr and "Traceback" not in done.stderr
