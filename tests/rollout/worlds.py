"""A controller and a reward service that a test plays, an engine that does as it is told, and a character tokenizer."""

import asyncio
import contextlib

import numpy as np

from areal_jax.data.config import DataConfig
from areal_jax.metrics.clock import Clock
from areal_jax.rollout.engine import Completion, EngineDied, Sampling, WeightsRefused
from areal_jax.rollout.verification import RewardClients
from areal_jax.rollout.worker import Worker, WorkerSettings
from areal_jax.rollout.workflows import SingleTurn
from areal_jax.transport.client import Client
from areal_jax.transport.messages import (
    Assign,
    Heartbeat,
    Hello,
    Manifest,
    Score,
    Task,
    UpdateWeights,
    Verify,
    WeightsLoaded,
    Welcome,
)
from areal_jax.transport.server import Server


class Characters:
    """One token per character; 0 ends a text."""

    eos_token, eos_token_id, chat_template = "<end>", 0, None

    def __init__(self, chat=False):
        self.chat_template = "<role>" if chat else None

    def encode(self, text, add_special_tokens=True):
        pieces = text.split(self.eos_token)
        return [t for i, piece in enumerate(pieces) for t in [*([0] if i else []), *map(ord, piece)]]

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(t) if t else "" if skip_special_tokens else self.eos_token for t in tokens)

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, return_dict=True):
        text = "".join(f"[{m['role']}]{m['content']}<end>\n" for m in messages)
        text += "[assistant]" if add_generation_prompt else ""
        return self.encode(text) if tokenize else text


class ScriptedEngine:
    """Answers what `script` says for a prompt (text to text); waits for `gates[prompt]` where there is one."""

    slots, max_length = 4, 200

    def __init__(self, script=lambda prompt: prompt.upper() + "\0"):
        self.script, self.gates, self.requests, self.cancelled = script, {}, [], []
        self.version, self.paused, self.on_change, self.death = -1, False, None, None
        self.refused, self.asked, self.loads, self.load_gate, self.closed = set(), [], [], None, False

    async def start(self, manifest):
        await self.update_weights(manifest)

    async def generate(self, request):
        prompt = Characters().decode(request.tokens.tolist())
        self.requests.append(request)
        version = self.version
        try:
            if prompt in self.gates:
                await self.gates[prompt].wait()
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise
        if self.death:
            raise self.death
        text = self.script(prompt)
        if isinstance(text, Exception):
            raise text
        tokens = np.asarray([ord(c) for c in text], np.int32)[: request.sampling.max_new_tokens]
        n = len(tokens)
        versions = np.linspace(version, self.version + 0.999, n).astype(np.int32)
        logprobs = -np.arange(1, n + 1, dtype=np.float32) / 8
        stopped = n > 0 and tokens[-1] in request.sampling.stop_token_ids
        return Completion(
            tokens=tokens, logprobs=logprobs, versions=versions, finish_reason="stop" if stopped else "length"
        )

    async def update_weights(self, manifest):
        self.asked.append(manifest.version)
        if self.load_gate:
            await self.load_gate.wait()
        if manifest.version in self.refused:
            raise WeightsRefused(f"version {manifest.version}: checksum")
        self.version = manifest.version
        self.loads.append(manifest.version)
        return {"pause": 0.5}

    def stats(self):
        return {"tokens_generated": 7.0, "running": 0.0, "waiting": 0.0}

    async def close(self):
        self.closed = True

    def die(self):
        self.death = EngineDied("a test killed it")


def manifest(version):
    return Manifest(version=version, nbytes=0, tensors=[], path="", host="")


class World:
    """Plays the controller and the reward services for one worker."""

    def __init__(self, folder, engine=None, *, workflow=None, services=1, patience=20.0, limit=60.0, tokenizer=None):
        self.folder, self.engine = folder, engine or ScriptedEngine()
        self.workflow, self.tokenizer = workflow or SingleTurn(), tokenizer or Characters()
        self.patience, self.limit, self.services = patience, limit, services
        self.heartbeats = []

    async def __aenter__(self):
        self.controller = Server("tcp://127.0.0.1:*", "controller", self.folder)
        self.rewards = [Server("tcp://127.0.0.1:*", f"rewards-{i}", self.folder) for i in range(self.services)]
        sampling = {"max_new_tokens": 50, "stop_token_ids": (0,)}
        self.worker = Worker(
            WorkerSettings(
                name="rollout-0", seed=11, data=DataConfig(),
                sampling=Sampling(temperature=0.8, **sampling), eval_sampling=Sampling(temperature=0.0, **sampling),
            ),
            engine=self.engine,
            workflow=self.workflow,
            tokenizer=self.tokenizer,
            verifier=RewardClients(
                [Client("rollout-0", self.folder, server=f"rewards-{i}") for i in range(self.services)],
                patience=self.patience, limit=self.limit,
            ),
            connect=lambda hello: Client("rollout-0", self.folder, hello=hello),
            clock=Clock(),
        )  # fmt: skip
        self.running = asyncio.create_task(self.worker.run())
        return self

    async def __aexit__(self, *error):
        self.worker.stop(0, "the test is over")
        with contextlib.suppress(Exception):
            await self.running
        for server in (self.controller, *self.rewards):
            server.close()

    async def receive(self, kind):
        """The worker's next message that is not a heartbeat; it must be a `kind`."""
        while True:
            self.peer, message = await self.controller.receive()
            if isinstance(message, Heartbeat):
                self.heartbeats.append(message)
                continue
            assert isinstance(message, kind), message
            return message

    async def heartbeat(self, phase):
        """Waits for a heartbeat that tells of `phase`."""
        while True:
            self.peer, message = await self.controller.receive()
            assert isinstance(message, Heartbeat), message
            self.heartbeats.append(message)
            if message.phase == phase:
                return message

    async def say(self, message):
        assert await self.controller.send(self.peer, message)

    async def welcome(self, version=0):
        """The first words of both sides, up to the first weights."""
        hello = await self.receive(Hello)
        await self.say(Welcome(heartbeat_seconds=0.02))
        if version is not None:
            await self.say(UpdateWeights(manifest=manifest(version)))
            assert (await self.receive(WeightsLoaded)).version == version
        return hello

    async def assign(self, *prompts, group=0, evaluation=False):
        tasks = [
            Task(group=group, sample=i, record={"prompt": p, "answer": "42"}, evaluation=evaluation, attempt=2)
            for i, p in enumerate(prompts)
        ]
        await self.say(Assign(tasks=tasks))

    async def question(self, service=0):
        """The next verification that reached a reward service, and how to answer it."""
        peer, message = await self.rewards[service].receive()
        assert isinstance(message, Verify), message

        async def answer(reply):
            assert await self.rewards[service].send(peer, reply)

        return message, answer

    async def score(self, reward, service=0, **metrics):
        message, answer = await self.question(service)
        await answer(Score(request=message.request, reward=reward, metrics=metrics))
        return message


def play(world, story, timeout=60.0):
    """Runs `story(world)` in a world of its own."""

    async def main():
        async with world:
            return await story(world)

    return asyncio.run(asyncio.wait_for(main(), timeout))
