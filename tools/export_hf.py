#!/usr/bin/env python3
"""Turns a run's checkpoint into a Hugging Face folder: python tools/export_hf.py RUN --out FOLDER

RUN is the folder of a run (`--workdir`). The newest checkpoint is taken, or that of `--version`; its parameters alone
are read, on the CPU, adapters are merged. Config, tokenizer and chat template come from the model the run started with,
or from `--source`. The folder appears whole or not at all, and loads in transformers and vLLM.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import orbax.checkpoint as ocp

from areal_jax import models
from areal_jax.models.tables import flatten, unflatten
from areal_jax.trainer.checkpoint import CheckpointError, read_memory


def read_params(folder: str, model: models.Model, version: int | None) -> tuple[int, models.Params]:
    """The parameters of one checkpoint, without the optimizer's moments: `(version, params)`."""
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "controller": ocp.StandardCheckpointHandler()}
    handlers["memory"] = ocp.JsonCheckpointHandler()  # not read, but orbax warns of what it could not read
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        version = manager.latest_step() if version is None else version
        if version not in manager.all_steps():
            raise CheckpointError(f"no checkpoint of version {version} in {folder}; there are {manager.all_steps()}")
        saved = dict(manager.item_metadata(version)["state"].tree)
        wanted = {f"params/{path}": spec for path, spec in flatten(model.abstract_params()).items()}
        found = {name: x for name, x in saved.items() if name.startswith("params/")}
        if wrong := sorted({n for n in set(wanted) | set(found) if n not in wanted or n not in found}):
            raise CheckpointError(f"checkpoint {version} in {folder} is of another model: {', '.join(wrong)}")
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for n, x in found.items()}
        restore = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        state = manager.restore(version, args=ocp.args.Composite(state=restore))["state"]
    return version, unflatten({name.removeprefix("params/"): state[name] for name in wanted})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a run, which holds checkpoints/")
    parser.add_argument("--out", required=True, help="the folder to create")
    parser.add_argument("--version", type=int, help="which checkpoint; default the newest")
    parser.add_argument("--source", help="the original checkpoint; default the model that the run started with")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of the tensors in the files"
    )
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size limit of one file, in 10^9 bytes")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")
    args = parser.parse_args(argv)
    folder = os.path.abspath(os.path.join(args.run, "checkpoints"))
    try:
        if not os.path.isdir(folder):
            raise CheckpointError(f"{args.run!r} holds no checkpoints/")
        config = read_memory(folder)["config"]
        source, rank = args.source or config["model"], config["trainer"].get("lora_rank", 0)
        if not os.path.isdir(source):
            raise CheckpointError(f"there is no folder {source!r}, the model that the run started with: give --source")
        lora = models.Lora(rank) if rank else None
        model = models.Model(models.ModelConfig.from_hf(source), lora=lora)
        version, params = read_params(folder, model, args.version)
        models.export_hf(
            model, params, args.out, source=source, dtype=args.dtype, max_shard_bytes=int(args.max_shard_gb * 1e9),
            overwrite=args.overwrite,
        )  # fmt: skip
    except (CheckpointError, models.ModelError, OSError) as error:
        print(f"export_hf: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: version {version}, {model.num_params():,} parameters, {args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
