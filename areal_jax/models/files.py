"""Which files of a checkpoint folder hold its weights, and which of the tensors there no network needs."""

import glob
import json
import os

from areal_jax.models.config import ModelError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: str | os.PathLike) -> list[str]:
    """Paths of the weights, chosen as `transformers` does: the whole in one file, or those that the index names.

    A folder without either may name its files as it likes. What lies beside them is often the same weights once more,
    in another layout (Mistral's `consolidated.safetensors`), or adapters.

    Raises:
      ModelError: there are none, or one that the index names is not there.
    """
    folder = os.fspath(folder)
    whole, index = os.path.join(folder, WHOLE), os.path.join(folder, INDEX)
    if os.path.isfile(whole):
        return [whole]
    if not os.path.isfile(index):
        if paths := sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
            return paths
        raise ModelError(f"no *.safetensors in {folder!r}; other weight formats are not read")
    try:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(f"{index!r} is not the index of a checkpoint: {error!r}") from error
    if missing := [name for name in names if not os.path.isfile(os.path.join(folder, name))]:
        raise ModelError(f"{folder!r} is not whole: {', '.join(missing)} (named by {INDEX}) missing")
    return [os.path.join(folder, name) for name in names]


def is_redundant(name: str, tied: bool) -> bool:
    """Whether a tensor says what is known without it: a tied head, or rotary frequencies, which old files have."""
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
