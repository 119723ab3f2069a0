"""Which processes are vLLM's."""

import psutil


def vllm_processes(pid: int | None = None) -> list[psutil.Process]:
    """The children of `pid` (this process, if None) that belong to vLLM, the engine process first."""
    found = psutil.Process(pid).children(recursive=True)
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(p.cmdline())]
