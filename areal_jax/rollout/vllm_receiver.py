"""The receiving end of a weight update inside vLLM's worker processes.

Each worker maps the version's file itself, in two steps. `open`, while generation goes on: find the bytes and check
them, changing nothing. `receive_weights`, while generation is paused: hand every tensor to vLLM's loader, which takes
this rank's share and repacks it into the parameters' own memory. Only this file and `vllm_engine` know vLLM.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from areal_jax.rollout import vllm_weights
from areal_jax.transport.messages import Manifest
from areal_jax.weights import OpenVersion, WeightsRefused, open_version

vllm_weights.register()  # the worker extension is imported early in every worker: this serves an uninstalled tree too


@dataclasses.dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclasses.dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    version: int  # must have been opened


class Receiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM's weight-transfer interface over `areal_jax.weights`."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.timings: dict[str, float] = {}
        self._open: OpenVersion | None = None
        self._complete = False  # whether some version has filled every parameter

    def open(self, manifest: Manifest, verified: list[int] | None, workdir: str | None, timeout: float) -> None:
        """Map a version; its checksums are compared unless `verified` identifies the very file that is found."""
        self.shutdown()
        version = open_version(manifest, workdir=workdir, timeout=timeout, verify=False)
        try:
            if verified is None or version.identity != tuple(verified):
                version.verify()
        except BaseException:
            version.close()
            raise
        self._open = version
        self.timings = dict(version.timings)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load the opened version. A failure in here leaves the parameters undefined: the engine must end."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self._open is None or self._open.version != update_info.version:
            raise RuntimeError(f"version {update_info.version} was not opened before it was to be loaded")
        # vLLM warns at every update of layers that have no weights; what is missing is said below.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        start = time.perf_counter()
        wanted = {name for name, _ in self.model.named_parameters()}
        if self.device.type == "cpu":
            _forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(_tensors(self._open))
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_tied_heads(self.model)
        if not self._complete and loaded is not None and (missing := wanted - set(loaded)):
            raise RuntimeError(f"version {update_info.version} lacks what vLLM calls {', '.join(sorted(missing))}")
        self._complete = True
        self.timings["load"] = time.perf_counter() - start

    def finish_weight_update(self) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class WorkerExtension:
    """Methods that vLLM adds to its workers, called by `collective_rpc`; errors come back as text, rank by rank."""

    def areal_jax_open_weights(self, manifest: dict, verified: list[int] | None, workdir: str | None, timeout: float):
        """Empty, or why this rank refuses the version."""
        try:
            self.weight_transfer_engine.open(msgspec.convert(manifest, Manifest), verified, workdir, timeout)
        except (WeightsRefused, OSError) as error:
            return str(error)
        return ""

    def areal_jax_drop_names(self) -> None:
        """Remove the files by which this engine's ranks have found each other: an engine that is killed leaves them.

        On a CPU these are a rendezvous file and, with several ranks, shared memory, which all have mapped by now.
        """
        if name := os.environ.get("VLLM_DIST_IDENT"):
            for path in (Path(tempfile.gettempdir(), name), *Path("/dev/shm").glob(f"{name}-*")):
                path.unlink(missing_ok=True)

    def areal_jax_weight_timings(self) -> dict[str, float]:
        return self.weight_transfer_engine.timings


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """On CPU vLLM 0.32 packs the weights of experts only when it makes their kernel, so let it make it again.

    Otherwise a reload would leave them unpacked under a kernel that takes them for packed.
    """
    for layer in model.modules():
        if getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None:
            layer.quant_method.moe_kernel = None


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """On CPU a layer computes with a packed copy of its weight; vLLM 0.32's reload leaves that of a tied head stale.

    The head is given no tensor of its own, so nothing there tells it that the weight it shares has changed.
    """
    seen = set()
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and id(weight) in seen and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
        seen.add(id(weight))


def _tensors(version: OpenVersion) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the mapped file; the loader copies what it needs."""
    for name, array in version:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no read-only tensors; the loader only reads
            raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
        yield name, raw.view(getattr(torch, array.dtype.name)).reshape(array.shape)
