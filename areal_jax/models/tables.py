"""The weight tables: one row per parameter, read in both directions by load, export and weight push.

A row says which parameter of ours is which tensor of the checkpoint. Our matrices lie as the checkpoint's do, so a
row's transformation is at most a reshape (`join`: heads and head size are one axis there), and one slice per layer and
expert.
"""

import dataclasses
import math
from collections.abc import Iterator

from areal_jax.models.config import ModelConfig, ModelError


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of ours and the checkpoint's name for it."""

    path: str  # ours, with slashes; under layers/ the first axis is the layer
    name: str  # the checkpoint's; {layer} and {expert} count our leading axes
    join: int | None = None  # our axes join and join + 1 (after the counted ones) are one axis there

    @property
    def counted(self) -> int:
        """How many leading axes of ours the checkpoint spreads over separate tensors."""
        return self.name.count("{")

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one tensor in the checkpoint, from the shape of our parameter."""
        shape = tuple(shape[self.counted :])
        if self.join is None:
            return shape
        return (*shape[: self.join], shape[self.join] * shape[self.join + 1], *shape[self.join + 2 :])

    def names(self, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """`(checkpoint name, index into our leading axes)` of each of its tensors, in order."""
        counts = shape[: self.counted]
        for flat in range(math.prod(counts)):
            index, rest = [], flat
            for count in reversed(counts):
                rest, i = divmod(rest, count)
                index.append(i)
            index.reverse()
            yield self.name.format(**dict(zip(("layer", "expert"), index))), tuple(index)


_L = "model.layers.{layer}"
_EMBEDDING = Row("embedding", "model.embed_tokens.weight")
_FINAL = (Row("final_norm", "model.norm.weight"), Row("head", "lm_head.weight"))
_NORMS = (
    Row("layers/attention_norm", f"{_L}.input_layernorm.weight"),
    Row("layers/mlp_norm", f"{_L}.post_attention_layernorm.weight"),
)
_ATTENTION = (
    *(Row(f"layers/attention/{x}/kernel", f"{_L}.self_attn.{x}_proj.weight", 0) for x in "qkv"),
    *(Row(f"layers/attention/{x}/bias", f"{_L}.self_attn.{x}_proj.bias", 0) for x in "qkv"),
    Row("layers/attention/o/kernel", f"{_L}.self_attn.o_proj.weight", 1),
    Row("layers/attention/o/bias", f"{_L}.self_attn.o_proj.bias"),
)
_QK_NORM = tuple(Row(f"layers/attention/{x}_norm", f"{_L}.self_attn.{x}_norm.weight") for x in "qk")
_MLP = tuple(Row(f"layers/mlp/{x}/kernel", f"{_L}.mlp.{x}_proj.weight") for x in ("gate", "up", "down"))
_EXPERTS = (
    Row("layers/mlp/router", f"{_L}.mlp.gate.weight"),
    *(Row(f"layers/mlp/{x}", f"{_L}.mlp.experts.{{expert}}.{x}_proj.weight") for x in ("gate", "up", "down")),
)
_DENSE = (_EMBEDDING, *_NORMS, *_ATTENTION, *_MLP, *_FINAL)

# Rows for parameters that a config lacks (biases, an untied head) are skipped; every parameter it has must be in a row.
TABLES: dict[str, tuple[Row, ...]] = {
    "qwen2": _DENSE,
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen3": (_EMBEDDING, *_NORMS, *_ATTENTION, *_QK_NORM, *_MLP, *_FINAL),
    "qwen3_moe": (_EMBEDDING, *_NORMS, *_ATTENTION, *_QK_NORM, *_EXPERTS, *_FINAL),
}


def rows(config: ModelConfig, flat_params: dict[str, object]) -> list[Row]:
    """The rows of this config's parameters, in table order.

    Raises:
      ModelError: a parameter is in no row: the table and the network disagree.
    """
    table = [row for row in TABLES[config.family] if row.path in flat_params]
    if missing := set(flat_params) - {row.path for row in table}:
        raise ModelError(f"the weight table of {config.family!r} lacks {sorted(missing)}")
    return table


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Nested dicts to one dict with slashes in its keys."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return flat


def unflatten(flat: dict[str, object]) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
