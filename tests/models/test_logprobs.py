"""Chunked log-probs and entropies: the numbers and gradients of the full softmax, without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax.models import logprobs
from tests.models import tiny


def _full(hidden, head, targets, temperature):
    """The oracle: the whole softmax, differentiated by jax."""
    log_p = jax.nn.log_softmax(logprobs.head_logits(hidden, head) / temperature, axis=-1)
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


@pytest.fixture(params=[False, True], ids=["two passes", "one pass"])
def on_gpu(request, monkeypatch):
    """Both ways to take the sums of a softmax; that of GPUs is right anywhere."""
    monkeypatch.setattr(logprobs, "on_gpu", lambda: request.param)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("chunk", [7, 16, 50])
def test_chunks_equal_the_full_softmax_and_its_gradient(chunk):
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((2, 50, 12), np.float32), rng.standard_normal((37, 12), np.float32)
    targets = rng.integers(0, 37, (2, 50), dtype=np.int32)
    w_logprob, w_entropy = rng.standard_normal((2, 2, 50), np.float32)
    temperature = jnp.float32(0.7)

    def loss(f, hidden, head):
        logprob, entropy = f(hidden, head, targets, temperature)
        return jnp.sum(w_logprob * logprob + w_entropy * entropy), (logprob, entropy)

    chunked = lambda *args: logprobs.chunked_logprobs(*args, chunk)  # noqa: E731
    (want, want_aux), want_grad = tiny.jit(jax.value_and_grad(functools.partial(loss, _full), (0, 1), has_aux=True))(
        hidden, head
    )
    (got, got_aux), got_grad = tiny.jit(jax.value_and_grad(functools.partial(loss, chunked), (0, 1), has_aux=True))(
        hidden, head
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip((*got_aux, *got_grad), (*want_aux, *want_grad), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("chunk", [7, 16, 50])
def test_a_loss_by_chunks_equals_that_of_the_full_softmax_and_its_gradient(chunk):
    rng = np.random.default_rng(1)
    hidden, head = rng.standard_normal((2, 50, 12), np.float32), rng.standard_normal((37, 12), np.float32)
    targets = rng.integers(0, 37, (2, 50), dtype=np.int32)
    weights = tuple(rng.standard_normal((2, 2, 50), np.float32))
    temperature, power = jnp.float32(0.7), jnp.float32(1.5)

    def of_tokens(logprob, entropy, arrays):  # not linear, so that its gradient needs the values
        (w, u), power = arrays
        return jnp.sum(w * jnp.exp(power * logprob) + u * entropy**2), {"count": jnp.sum(w != 0)}

    def full(hidden, head):
        return of_tokens(*_full(hidden, head, targets, temperature), (weights, power))

    def chunked(hidden, head):
        given = (targets, (weights, power), temperature, chunk)
        value, aux = logprobs.chunked_loss(of_tokens, hidden, head, *given)
        return 3.0 * value, aux  # what follows the sum counts

    (want, _), want_grad = tiny.jit(jax.value_and_grad(full, (0, 1), has_aux=True))(hidden, head)
    (got, aux), got_grad = tiny.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(got, 3 * want, rtol=1e-5)
    assert aux["count"] == 100
    for a, b in zip(got_grad, want_grad, strict=True):
        np.testing.assert_allclose(a, 3 * b, atol=6e-5)


@pytest.mark.usefixtures("on_gpu")
def test_logits_as_far_apart_as_float32_allows():
    logits = jnp.array([[[80.0, -80.0, 0.0], [-1e20, 5.0, 5.0], [1e38, 0.0, -1e38]]])
    targets = jnp.array([[0, 1, 0]])
    logprob, entropy, _ = logprobs._statistics(logits, targets)
    np.testing.assert_allclose(logprob, [[0.0, -np.log(2), 0.0]], atol=1e-6)
    np.testing.assert_allclose(entropy, [[0.0, np.log(2), 0.0]], atol=1e-6)


@pytest.mark.usefixtures("on_gpu")
def test_one_token_by_hand():
    """Logits (ln 1, ln 2, ln 5) at temperature 1: probabilities 1/8, 2/8, 5/8; squared and renormalised at 0.5."""
    hidden, head = jnp.ones((1, 1, 1)), jnp.log(jnp.array([[1.0], [2.0], [5.0]]))
    for temperature, p in ((1.0, np.array([1, 2, 5]) / 8), (0.5, np.array([1, 4, 25]) / 30)):
        targets = jnp.ones((1, 1), jnp.int32)
        logprob, entropy = logprobs.chunked_logprobs(hidden, head, targets, jnp.float32(temperature), 1)
        np.testing.assert_allclose(logprob[0, 0], np.log(p[1]), rtol=1e-6)
        np.testing.assert_allclose(entropy[0, 0], -(p * np.log(p)).sum(), rtol=1e-6)


def test_chunk_size_bounds_the_logits_that_are_alive():
    for tokens, vocab in ((16_384, 151_936), (100, 24), (8192, 24), (1, 152_000), (5000, 2**25)):
        chunk = logprobs.chunk_size(tokens, vocab)
        assert 1 <= chunk <= tokens
        assert chunk * vocab <= logprobs.LOGITS_PER_CHUNK or chunk <= 128
    assert logprobs.chunk_size(8192, 24) == 8192  # small vocabularies are not cut


def _by_logprobs(hidden, head, targets, chunk):
    logprob, entropy = logprobs.chunked_logprobs(hidden, head, targets, jnp.float32(1.0), chunk)
    return jnp.sum(logprob) + jnp.sum(entropy)


def _by_loss(hidden, head, targets, chunk):
    def of_tokens(logprob, entropy, arrays):
        return jnp.sum(logprob) + jnp.sum(entropy), ()

    return logprobs.chunked_loss(of_tokens, hidden, head, targets, ((), ()), jnp.float32(1.0), chunk)[0]


def _temporary_bytes(loss, tokens: int, vocab: int, width: int = 896) -> int:
    """What forward and backward need beside arguments and results, from XLA's own memory analysis; nothing runs."""
    shapes = jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16), jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    loss = functools.partial(loss, chunk=logprobs.chunk_size(tokens, vocab))
    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes, targets)
    return lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("loss", [_by_logprobs, _by_loss])
def test_memory_does_not_grow_with_tokens_times_vocabulary(loss):
    vocab = 151_936
    few, many = _temporary_bytes(loss, 4096, vocab), _temporary_bytes(loss, 16_384, vocab)
    whole = 4 * 16_384 * vocab  # one float32 copy of the logits, 9.96 GB
    print(f"temporaries: {few / 1e9:.2f} GB at 4k tokens, {many / 1e9:.2f} GB at 16k; the logits: {whole / 1e9:.2f} GB")
    assert many < whole / 3
    assert many - few < 0.05 * whole


def test_aligned_with_the_token_and_zero_where_nothing_was_drawn():
    model, params = tiny.model_and_params("qwen2-untied")
    tokens, positions, segment_ids = tiny.packed(2, 40)
    logits = tiny.jit(model.logits)(params, tokens, positions, segment_ids)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    got, entropy = map(np.asarray, tiny.jit(model.token_logprobs)(params, tokens, positions, segment_ids))
    for row in range(2):
        for t in range(40):
            if segment_ids[row, t] and positions[row, t]:
                np.testing.assert_allclose(got[row, t], log_p[row, t - 1, tokens[row, t]], atol=1e-5)
                p = np.exp(log_p[row, t - 1])
                np.testing.assert_allclose(entropy[row, t], -(p * log_p[row, t - 1]).sum(), atol=1e-5)
            else:
                assert got[row, t] == entropy[row, t] == 0
