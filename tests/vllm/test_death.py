"""A vLLM that dies is reported within seconds, and a rollout worker that dies takes vLLM with it."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from areal_jax.rollout.engine import EngineDied
from areal_jax.weights import cleanup
from tests.vllm import checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.faults]
ROOT = Path(__file__).parents[2]


def vllm_processes(pid: int | None = None) -> list[psutil.Process]:
    """The children of `pid` (this process, if None) that belong to vLLM, the engine process first."""
    found = psutil.Process(pid).children(recursive=True)
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(p.cmdline())]


@pytest.mark.parametrize("harness", [("qwen3", {})], indirect=True)
def test_a_killed_engine_is_reported_to_all_who_wait(harness):
    """Requests that run, requests that wait for a slot, later requests, updates: all raise `EngineDied`."""

    async def kill():
        requests = [harness.request(5, 190, seed=i) for i in range(3 * harness.slots)]
        running = [asyncio.create_task(harness.engine.generate(r)) for r in requests]
        await asyncio.sleep(0.2)
        for process in vllm_processes():
            process.kill()
        return await asyncio.gather(*running, return_exceptions=True)

    results = harness.run(kill(), timeout=30)
    assert sum(isinstance(r, EngineDied) for r in results) >= 2 * harness.slots
    assert all(isinstance(r, EngineDied) for r in results if isinstance(r, BaseException)), results
    with pytest.raises(EngineDied):
        harness.run(harness.engine.generate(harness.request(5, 5)), timeout=30)
    with pytest.raises(EngineDied):
        harness.run(harness.engine.update_weights(harness.publish(1)), timeout=30)
    harness.run(harness.engine.close())
    assert not vllm_processes()


def test_a_killed_rollout_worker_leaves_no_process_and_no_memory(tmp_path):
    script = textwrap.dedent(f"""
        import asyncio, sys
        import numpy as np
        from areal_jax.rollout.vllm_engine import VllmEngine
        from areal_jax.weights import Publisher
        sys.path.insert(0, {str(ROOT)!r})

        async def main():
            from areal_jax import models
            from tests.vllm import checkpoints
            import jax.numpy as jnp
            model = models.Model(models.ModelConfig.from_hf({str(tmp_path / "model")!r}))
            manifest = Publisher({str(tmp_path)!r}).publish(0, models.to_hf(model, checkpoints.random_params(model, 0)))
            engine = VllmEngine({str(tmp_path / "model")!r}, slots=2, max_length=64)
            await engine.start(manifest)
            print("ready", flush=True)
            await asyncio.sleep(600)

        if __name__ == "__main__":
            asyncio.run(main())
    """)
    (tmp_path / "worker.py").write_text(script)
    checkpoints.write_config("qwen3", tmp_path / "model")
    worker = subprocess.Popen(
        [sys.executable, str(tmp_path / "worker.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        while (line := worker.stdout.readline().strip()) != "ready":
            assert worker.poll() is None, line
        children = vllm_processes(worker.pid)
        assert len(children) >= 2
        shared = {m.path for p in children for m in p.memory_maps() if m.path.startswith("/dev/shm")}
        assert shared
        worker.send_signal(signal.SIGKILL)
        worker.wait(10)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    finally:
        worker.kill()
        worker.stdout.close()
    cleanup(tmp_path)
    assert not [path for path in shared if os.path.exists(path)]
