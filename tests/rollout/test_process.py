"""The worker as a process, with a checkpoint folder, published weights and the embedded engine."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from areal_jax import config as configs
from areal_jax.models import Model, ModelConfig, to_hf
from areal_jax.transport.messages import (
    Assign,
    Goodbye,
    Heartbeat,
    Hello,
    SampleDone,
    Score,
    Task,
    UpdateWeights,
    WeightsLoaded,
    Welcome,
)
from areal_jax.transport.server import Server
from areal_jax.weights import Publisher
from tests.models import tiny

ALPHABET = ["<end>", "<pad>", *"0123456789+=;?#"]
ROOT = Path(__file__).resolve().parents[2]


def make_checkpoint(folder: Path) -> Model:
    """Config and tokenizer; the weights come from the trainer."""
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder)  # fmt: skip
    config = ModelConfig(
        family="qwen2", vocab_size=len(ALPHABET), hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_size=32, qkv_bias=True, init_std=0.5,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return Model(config)


async def receive(controller, kind):
    """The next message that is neither a heartbeat nor a hello."""
    while True:
        peer, message = await controller.receive()
        if not isinstance(message, Heartbeat):
            assert isinstance(message, kind), message
            return peer, message


@pytest.mark.slow
def test_a_worker_process_generates_under_published_weights_until_it_is_terminated(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    config = configs.default_config()
    config.update({"model": str(tmp_path / "model"), "seed": 3, "data": {"template": "none"}})
    config.rollout.update({"slots": 8, "max_length": 32, "max_new_tokens": 12})
    configs.save(config, tmp_path)
    params = [tiny.random_params(model, version) for version in range(2)]

    async def story(publisher):
        async with (
            Server("tcp://127.0.0.1:*", "controller", tmp_path) as controller,
            Server("tcp://127.0.0.1:*", "rewards-0", tmp_path) as rewards,
        ):
            command = [sys.executable, "-m", "areal_jax.rollout", "--workdir", str(tmp_path), "--index", "0"]
            process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=dict(os.environ))
            peer, _ = await receive(controller, Hello)
            await controller.send(peer, Welcome(heartbeat_seconds=0.5))
            answering = asyncio.create_task(answer_all(rewards))
            samples = {}
            for version in range(2):
                manifest = publisher.publish(version, to_hf(model, params[version], np.float32))
                await controller.send(peer, UpdateWeights(manifest=manifest))
                _, loaded = await receive(controller, WeightsLoaded)
                assert (loaded.version, loaded.error) == (version, "")
                tasks = [
                    Task(group=version, sample=i, record={"prompt": "3+5?", "answer": "8"}) for i in range(12)
                ]
                await controller.send(peer, Assign(tasks=tasks))
                for _ in tasks:
                    _, done = await receive(controller, SampleDone)
                    samples[done.group, done.sample] = done.trajectories[0]
            process.send_signal(signal.SIGTERM)
            _, goodbye = await receive(controller, Goodbye)
            assert goodbye.reason == "SIGTERM" and await process.wait() == 0
            answering.cancel()
            return samples

    async def answer_all(rewards):
        async for peer, message in rewards:
            await rewards.send(peer, Score(request=message.request, reward=float("8" in message.completion)))

    with Publisher(tmp_path) as publisher:
        samples = asyncio.run(asyncio.wait_for(story(publisher), 300))
    score = tiny.jit(model.token_logprobs)
    for (group, _), t in samples.items():
        assert t.tokens[:4].tolist() == [ALPHABET.index(c) for c in "3+5?"]
        assert set(t.versions[t.loss_mask].tolist()) == {group}
        assert t.finish_reason == ("stop" if t.tokens[-1] == 0 else "length")
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(t.tokens)] = t.tokens
        segments = (np.arange(32) < len(t.tokens)).astype(np.int32)[None]
        scored, _ = score(params[group], padded, np.arange(32, dtype=np.int32)[None], segments, np.float32(1.0))
        np.testing.assert_allclose(t.logprobs, np.where(t.loss_mask, scored[0, : len(t.tokens)], 0), atol=1e-4)
    assert len(samples) == 24 and len({tuple(t.tokens.tolist()) for t in samples.values()}) > 12
