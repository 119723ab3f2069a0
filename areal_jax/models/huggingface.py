"""Parameters from and to Hugging Face tensors: checkpoint folders, and streams of named arrays for the weight push.

Everything walks the family's weight table (`tables.py`), one of our parameters at a time, so that little is in host
memory beside what lives on the devices: some layers of one parameter when loading, all of them when exporting.
"""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from areal_jax.models import lora as lora_lib
from areal_jax.models.config import ModelConfig, ModelError
from areal_jax.models.files import INDEX, WHOLE, is_redundant, weight_files
from areal_jax.models.gather import host_pieces
from areal_jax.models.model import Model, Params, add_lora
from areal_jax.models.tables import flatten, rows, unflatten

STAGED_BYTES = 2**30  # of a parameter in host memory at a time, while it is loaded

# Copied on export when the source has them: everything about the tokenizer and about generation, nothing about weights.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model.v3", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip


def hf_tensor_specs(model: Model, dtype=jnp.bfloat16) -> list[tuple[str, tuple[int, ...], np.dtype]]:
    """`(name, shape, dtype)` of every checkpoint tensor, in the fixed order of `to_hf`; a tied head is left out."""
    base, dtype = model.with_(lora=None), jnp.dtype(dtype)
    flat = flatten(base.abstract_params())
    return [
        (name, row.hf_shape(flat[row.path].shape), dtype)
        for row in rows(model.config, flat)
        for name, _ in row.names(flat[row.path].shape)
    ]


def to_hf(
    model: Model, params: Params, dtype=jnp.bfloat16, *, timings: dict[str, float] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters as checkpoint tensors, one at a time, in the order of `hf_tensor_specs`.

    Each parameter is cast on its device and fetched once; the tensors are views of it. Adapters are merged. With
    several processes all must iterate: sharded parameters are gathered, some layers at a time, and the first process
    has them. `timings["gather"]`, where given, grows by the seconds that this takes.
    """
    dtype = jnp.dtype(dtype)
    flat = flatten(lora_lib.merge(model, params))
    timings = {} if timings is None else timings
    for row in rows(model.config, flat):
        value = flat[row.path]
        if value.dtype != dtype:
            value = jax.block_until_ready(value.astype(dtype))
        names, shape = list(row.names(value.shape)), row.hf_shape(value.shape)
        for first, piece in host_pieces(value, bool(row.counted), timings):
            for name, index in names:
                if not index:
                    yield name, piece.reshape(shape)
                elif first <= index[0] < first + len(piece):
                    yield name, piece[(index[0] - first, *index[1:])].reshape(shape)


def from_hf(
    model: Model,
    named_tensors: Iterable[tuple[str, np.ndarray]],
    param_dtype=jnp.float32,
    shardings: Params | None = None,
) -> Params:
    """Parameters from a stream of checkpoint tensors, in any order.

    Args:
      model: with adapters (`lora`), these start as new ones do.
      named_tensors: every tensor of `hf_tensor_specs` once, of any floating dtype; a tied head, or rotary frequencies,
        may be present and are then ignored.
      param_dtype: dtype of the result.
      shardings: tree of shardings; default the model's mesh, or else the default device.

    Raises:
      ModelError: a tensor is missing, unknown, given twice or of the wrong shape; the message names it.
    """
    base = model.with_(lora=None)
    abstract = flatten(base.abstract_params(param_dtype))
    where = {name: (row.path, index, row.hf_shape(abstract[row.path].shape)) for row, name, index in _targets(base)}
    places = _flat_shardings(base, shardings)
    host: dict[str, np.ndarray] = {}
    left = {path: 0 for path in abstract}
    for path, _, _ in where.values():
        left[path] += 1
    seen, done = set(), {}
    for name, tensor in named_tensors:
        if is_redundant(name, model.config.tie_embeddings):
            continue
        if name not in where:
            raise ModelError(f"tensor {name!r} belongs to no parameter of this {model.config.family!r} model")
        if name in seen:
            raise ModelError(f"tensor {name!r} was given twice")
        seen.add(name)
        path, index, shape = where[name]
        _check_shape(name, tensor.shape, shape)
        if path not in host:
            host[path] = np.empty(abstract[path].shape, jnp.dtype(param_dtype))
        host[path][index] = np.asarray(tensor).reshape(host[path][index].shape)
        left[path] -= 1
        if not left[path]:
            value = host.pop(path)
            done[path] = _place(value.__getitem__, value.shape, places.get(path))
    if missing := [name for name in where if name not in seen]:
        raise ModelError(f"tensors missing: {_list(missing)}")
    return add_lora(model, unflatten({path: done[path] for path in abstract}))


def _targets(model: Model):
    flat = flatten(model.abstract_params())
    return [(row, name, i) for row in rows(model.config, flat) for name, i in row.names(flat[row.path].shape)]


def _flat_shardings(model: Model, shardings: Params | None) -> dict:
    if shardings is None and model.mesh is not None:
        shardings = model.param_shardings()
    return flatten(shardings) if shardings is not None else {}


def _check_shape(name: str, found, expected) -> None:
    if tuple(found) != tuple(expected):
        raise ModelError(f"tensor {name!r} has shape {tuple(found)}, the config asks for {tuple(expected)}")


def _list(names) -> str:
    names = sorted(names)
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# -- folders -----------------------------------------------------------------------------------------------------------


class _Files:
    """The tensors of a checkpoint folder, opened lazily; nothing is read before it is asked for."""

    def __init__(self, folder: str):
        self.files = {}
        for path in weight_files(folder):
            try:
                file = safe_open(path, framework="np")
            except SafetensorError as e:
                raise ModelError(f"{path!r} is not a readable safetensors file: {e}") from e
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name in self.files:
                    raise ModelError(f"tensor {name!r} is in two files of {folder!r}")
                self.files[name] = file

    def slice(self, name: str):
        return self.files[name].get_slice(name)


def load_hf(path: str | os.PathLike, mesh=None, param_dtype=jnp.float32, rules=None, **options) -> tuple[Model, Params]:
    """Loads a Hugging Face checkpoint folder, each device reading only what it will hold.

    Args:
      path: folder with `config.json` and `*.safetensors`.
      mesh: as from `make_mesh`; None keeps everything on the default device.
      param_dtype: dtype of the parameters.
      rules: sharding rules, default `sharding.RULES`.
      **options: further fields of `Model` (`compute_dtype`, `attention`, `remat`, `lora`).

    Returns:
      `(model, params)`.

    Raises:
      ModelError: the architecture is not implemented, or a tensor is missing, unknown or of the wrong shape.
    """
    path = os.fspath(path)
    model = Model(ModelConfig.from_hf(path), mesh=mesh, **({"rules": rules} if rules is not None else {}), **options)
    base, files = model.with_(lora=None), _Files(path)
    abstract = flatten(base.abstract_params(param_dtype))
    expected = [name for _, name, _ in _targets(base)]
    if missing := set(expected) - set(files.files):
        raise ModelError(f"tensors missing in {path!r}: {_list(missing)}")
    unknown = set(files.files) - set(expected)
    if extra := {name for name in unknown if not is_redundant(name, model.config.tie_embeddings)}:
        raise ModelError(
            f"tensors in {path!r} that this {model.config.family!r} model has no place for: {_list(extra)}"
        )
    if "lm_head.weight" in unknown:
        _check_tied(files)
    places = _flat_shardings(base, None)
    flat = {}
    for row in rows(model.config, abstract):
        spec = abstract[row.path]
        for name, _ in row.names(spec.shape):
            _check_shape(name, files.slice(name).get_shape(), row.hf_shape(spec.shape))
        flat[row.path] = _stream(_reader(files, row, spec), spec, places.get(row.path), stacked=row.counted > 0)
    return model, add_lora(model, unflatten({path: flat[path] for path in abstract}))


def _check_tied(files: _Files) -> None:
    """A head that was trained by itself differs from the embedding in every row: the first ones tell."""
    embedding, head = files.slice("model.embed_tokens.weight"), files.slice("lm_head.weight")
    _check_shape("lm_head.weight", head.get_shape(), embedding.get_shape())
    first = slice(min(1024, embedding.get_shape()[0]))
    if (head[first].astype(embedding[first].dtype) != embedding[first]).any():
        raise ModelError("'lm_head.weight' is not the embedding, which tie_word_embeddings says: correct one of both")


def _stream(read, spec, place, stacked: bool) -> jax.Array:
    """The parameter that `read` gives, on its shards; a large one is built where it will live, some layers at a time.

    So host memory beside the model stays near `STAGED_BYTES` (or one layer, or an embedding, where that is larger).
    """
    layers = max(1, STAGED_BYTES // (math.prod(spec.shape[1:]) * spec.dtype.itemsize)) if stacked else spec.shape[0]
    if layers >= spec.shape[0]:
        return _place(read, spec.shape, place)

    def at(start: int, index: tuple[slice, ...]) -> np.ndarray:
        here, *rest = index  # of one device: all of these layers, unless the rules split that axis
        first, stop, _ = here.indices(min(layers, spec.shape[0] - start))
        return read((slice(start + first, start + stop), *rest))

    array = jax.jit(lambda: jnp.zeros(spec.shape, spec.dtype), out_shardings=place)()
    put = jax.jit(_put_layers, donate_argnums=0, out_shardings=place)
    for start in range(0, spec.shape[0], layers):
        shape = (min(layers, spec.shape[0] - start), *spec.shape[1:])
        array = put(array, _place(partial(at, start), shape, place), np.int32(start))
        jax.block_until_ready(array)  # else all the parts would wait in host memory for their turn
    return array


def _put_layers(array: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=0)


def _place(read, shape: tuple[int, ...], place) -> jax.Array:
    if place is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    parts: dict[tuple, np.ndarray] = {}

    def once(index: tuple[slice, ...]) -> np.ndarray:  # devices that hold the same part share one array
        key = tuple(i.indices(n) for i, n in zip(index, shape, strict=True))
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(shape, place, once)


def _reader(files: _Files, row, spec):
    """A function from an index into our parameter to its values, which reads no more than it must from the files."""

    def read(index):
        ranges = [range(*i.indices(n)) for i, n in zip(index, spec.shape, strict=True)]
        out = np.empty([len(r) for r in ranges], spec.dtype)
        for name, position in row.names(spec.shape):
            if any(i not in r for i, r in zip(position, ranges)):
                continue
            here = tuple(i - r.start for i, r in zip(position, ranges))
            inner = ranges[row.counted :]
            if row.join is None:
                out[here] = files.slice(name)[tuple(slice(r.start, r.stop) for r in inner)]
            else:
                # Whole heads lie next to one another there, so a range of heads is one range of the joined axis.
                first, size = inner[row.join], spec.shape[row.counted + row.join + 1]
                joined = slice(first.start * size, first.stop * size)
                cut = tuple(slice(r.start, r.stop) for r in inner)
                block = files.slice(name)[(*cut[: row.join], joined, *cut[row.join + 2 :])]
                shape = (*block.shape[: row.join], len(first), size, *block.shape[row.join + 1 :])
                out[here] = block.reshape(shape)[(slice(None),) * (row.join + 1) + (cut[row.join + 1],)]
        return out

    return read


def export_hf(
    model: Model, params: Params, path: str | os.PathLike, source: str | os.PathLike | None = None, dtype=jnp.bfloat16,
    max_shard_bytes: int = 5_000_000_000, overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes a Hugging Face checkpoint folder that `transformers` and vLLM load.

    The folder appears whole or not at all: it is written beside its place and renamed. Adapters are merged, a tied head
    is left out. With several processes all must call it; the first writes.

    Args:
      model, params: what to write.
      path: the folder to create.
      source: the folder the model came from: its config, generation config, tokenizer and chat template are copied.
        None writes a config made from the model's own and no tokenizer.
      dtype: of the tensors in the files.
      max_shard_bytes: a file is closed before it would grow beyond this.
      overwrite: replace `path` if it exists.

    Raises:
      ModelError: `path` exists and `overwrite` is off, or `source` describes another architecture.
      OSError: the disk does not take it; what was there before still is.
    """
    path, dtype = os.path.abspath(os.fspath(path)), jnp.dtype(dtype)
    if os.path.exists(path) and not overwrite:
        raise ModelError(f"{path!r} exists; choose another folder or pass overwrite=True")
    config = _export_config(model, source, dtype)
    writer = jax.process_index() == 0
    staging = None
    if writer:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        staging = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    try:
        _write_shards(model, params, dtype, max_shard_bytes, staging)
        if not writer:
            return
        _copy_source(source, staging)
        with open(os.path.join(staging, "config.json"), "w", encoding="utf-8") as f:
            json.dump(config, f, indent=2)
        os.chmod(staging, 0o755)
        old = f"{staging}.old"
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(staging, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if staging:
            shutil.rmtree(staging, ignore_errors=True)


def _export_config(model: Model, source, dtype: np.dtype) -> dict:
    if source is None:
        return model.config.to_hf() | {"dtype": dtype.name, "torch_dtype": dtype.name}
    if ModelConfig.from_hf(source) != model.config:
        raise ModelError(f"config.json in {os.fspath(source)!r} describes another model than the one to export")
    with open(os.path.join(source, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    present = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(present, dtype.name)


def _copy_source(source, staging: str) -> None:
    for name in COPIED if source is not None else ():
        original = os.path.join(source, name)
        if os.path.isdir(original):
            shutil.copytree(original, os.path.join(staging, name))
        elif os.path.exists(original):
            shutil.copyfile(original, os.path.join(staging, name))


def _write_shards(model: Model, params: Params, dtype: np.dtype, max_bytes: int, folder: str | None) -> None:
    """Writes the tensors, file after file; a process without a folder only takes part in the gathering."""
    shard_of, size, shard = {}, 0, 0
    for name, shape, _ in hf_tensor_specs(model, dtype):
        nbytes = int(np.prod(shape)) * dtype.itemsize
        if size and size + nbytes > max_bytes:
            shard, size = shard + 1, 0
        shard_of[name], size = shard, size + nbytes
    count, total, held = shard + 1, 0, {}

    def file_of(i):
        return WHOLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"

    def flush(i):
        if held:
            path = os.path.join(folder, file_of(i))
            with open(path, "wb") as file:  # whom the user lets read; safetensors leaves it to its owner alone
                mode = os.fstat(file.fileno()).st_mode
            try:
                save_file(held, path, metadata={"format": "pt"})
                os.chmod(path, mode)
            except SafetensorError as error:  # a full disk, in its words
                raise OSError(errno.EIO, str(error), path) from None
            held.clear()

    current = 0
    for name, tensor in to_hf(model, params, dtype):
        if folder is None:
            continue
        if shard_of[name] != current:
            flush(current)
            current = shard_of[name]
        held[name] = np.ascontiguousarray(tensor)
        total += tensor.nbytes
    if folder is None:
        return
    flush(current)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: file_of(i) for n, i in shard_of.items()}}
        with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as f:
            json.dump(index, f, indent=2)
