"""A rollout worker that dies takes vLLM with it, with several processes and the memory between them.

Of a vLLM of one process the same is seen in test_run.
"""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import pytest

from areal_jax.weights import cleanup
from tests.vllm import checkpoints
from tests.vllm.processes import vllm_processes

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.faults]
ROOT = Path(__file__).parents[2]


def test_a_killed_rollout_worker_leaves_no_process_no_memory_and_no_file(tmp_path):
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
            two = {{"tensor_parallel_size": 2}}
            engine = VllmEngine({str(tmp_path / "model")!r}, slots=2, max_length=64, engine_args=two)
            await engine.start(manifest)
            print("ready", flush=True)
            await asyncio.sleep(600)

        if __name__ == "__main__":
            asyncio.run(main())
    """)
    (tmp_path / "worker.py").write_text(script)
    checkpoints.write_config("qwen3", tmp_path / "model")
    temporary = tempfile.TemporaryDirectory(prefix="areal_jax-")  # a short path: vLLM has sockets there
    worker = subprocess.Popen(
        [sys.executable, str(tmp_path / "worker.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": temporary.name},
    )
    try:
        while (line := worker.stdout.readline().strip()) != "ready":
            assert worker.poll() is None, line
        children = vllm_processes(worker.pid)
        assert len(children) >= 3  # the engine, and a worker per rank
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
    assert any("cpushm" in path for path in shared) and not [path for path in shared if os.path.exists(path)]
    with temporary as folder:
        assert not list(Path(folder).glob("vllm_dist*"))
