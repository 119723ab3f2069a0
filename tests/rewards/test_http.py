"""A reward model behind HTTP is one more verifier; what goes wrong there is named, never a score."""

import asyncio
import contextlib
import http.server
import json
import threading

import pytest

from areal_jax.rewards import Failure, VerifierError, VerifierPool, VerifierTimeout
from areal_jax.rewards.http import reward_model


class _Model(http.server.BaseHTTPRequestHandler):
    """Rewards the number of words; the path says how to misbehave."""

    requests: list = []  # noqa: RUF012
    release = threading.Event()

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, sent, self.headers.get("Authorization")))
        code, reply = 200, {"reward": len(sent.get("completion", "").split())}
        if self.path == "/nested":
            reply = {"data": [{"probs": [0.25, 0.75]}]}
        elif self.path == "/text":
            reply = {"reward": "good"}
        elif self.path == "/missing":
            code, reply = 404, {"error": "no such model"}
        elif self.path == "/flaky" and len(self.requests) < 3:
            code, reply = 503, {"error": "loading"}
        elif self.path == "/slow":
            self.release.wait(20)
        with contextlib.suppress(BrokenPipeError):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def model():
    _Model.requests, _Model.release = [], threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Model)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    _Model.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def ask(url, **options):
    return asyncio.run(reward_model("why?", "because of {prompt} that", url=url, pause=0.001, **options))


def test_prompt_and_completion_are_sent_and_the_number_comes_back(model, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "xyz")
    assert ask(f"{model}/", token_variable="REWARD_TOKEN") == 4.0
    assert _Model.requests == [("/", {"prompt": "why?", "completion": "because of {prompt} that"}, "Bearer xyz")]


def test_body_and_place_of_the_number_are_settings(model):
    body = {"model": "rm", "input": ["{prompt}\n{completion}"], "n": 1}
    assert ask(f"{model}/nested", body=body, number="data.0.probs.1") == 0.75
    assert _Model.requests[0][1] == {"model": "rm", "input": ["why?\nbecause of {prompt} that"], "n": 1}


def test_a_server_that_is_not_ready_is_asked_again(model):
    assert ask(f"{model}/flaky") == 4.0
    assert len(_Model.requests) == 3


@pytest.mark.parametrize(
    ("path", "text", "asked"),
    [("/missing", "404.*no such model", 1), ("/text", "no number at 'reward'", 1), ("/flaky", "503.*loading", 2)],
)
def test_what_it_cannot_answer_is_an_error(model, path, text, asked):
    with pytest.raises(VerifierError, match=text):
        ask(model + path, retries=1)
    assert len(_Model.requests) == asked


def test_silence_and_absence_are_named(model):
    with pytest.raises(VerifierTimeout, match=r"did not answer within 0\.3 s"):
        ask(f"{model}/slow", timeout=0.3)
    with pytest.raises(VerifierError, match="cannot be reached"):
        ask("http://127.0.0.1:9/", retries=1)


def test_it_runs_in_the_pool(model):
    async def main():
        async with VerifierPool(1, 20.0) as pool:
            fields = {"prompt": "p", "completion": "a b c", "retries": 0}
            paths = ("", "/missing", "/slow")
            calls = [
                pool.submit("areal_jax.rewards.http.reward_model", {**fields, "url": model + path, "timeout": 2.0})
                for path in paths
            ]
            return await asyncio.gather(*calls)

    good, missing, slow = asyncio.run(main())
    assert good.reward == 3.0
    assert isinstance(missing, Failure) and missing.kind == "exception" and "404" in missing.text
    assert isinstance(slow, Failure) and slow.kind == "timeout"
