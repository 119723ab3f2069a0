"""The network: Hugging Face checkpoints as pure functions of a parameter tree, sharded over a mesh.

    model, params = models.load_hf(folder)
    logprobs, entropy = model.token_logprobs(params, tokens, positions, segment_ids)
    models.export_hf(model, params, new_folder, source=folder)

`model` is a frozen, hashable description without arrays; `params` is a plain tree of nested dicts.
"""

from areal_jax.models.config import ModelConfig, ModelError, Rope
from areal_jax.models.decode import insert_cache, resize_cache, unstack_layers
from areal_jax.models.huggingface import export_hf, from_hf, hf_tensor_specs, load_hf, to_hf
from areal_jax.models.lora import merge as merge_lora
from areal_jax.models.lora import trainable
from areal_jax.models.model import REMAT, Model, Params, add_lora, param_shardings
from areal_jax.models.sharding import RULES, make_mesh, on_gpu
from areal_jax.models.transformer import Lora

__all__ = [
    "REMAT",
    "RULES",
    "Lora",
    "Model",
    "ModelConfig",
    "ModelError",
    "Params",
    "Rope",
    "add_lora",
    "export_hf",
    "from_hf",
    "hf_tensor_specs",
    "insert_cache",
    "load_hf",
    "make_mesh",
    "merge_lora",
    "on_gpu",
    "param_shardings",
    "resize_cache",
    "to_hf",
    "trainable",
    "unstack_layers",
]
