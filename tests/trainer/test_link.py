"""What the trainer does about a controller that is not there, does not answer, or cannot write down what it is told."""

import pytest

from areal_jax.trainer.link import WaitedTooLong, ask, settle
from areal_jax.transport import messages as m
from areal_jax.transport.errors import EndpointMissing, RequestTimeout
from areal_jax.transport.silence import take_silence


class Controller:
    """A client whose replies are given; an exception among them is raised."""

    name, server = "trainer-0", "controller"

    def __init__(self, *replies):
        self.replies, self.limits = list(replies), []

    def request(self, message, limit):
        self.limits.append(limit)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


GOOD = m.Published(version=1)


def test_a_controller_that_does_not_answer_is_reported_and_its_successor_asked(tmp_path):
    assert ask(Controller(RequestTimeout("x"), GOOD), tmp_path, m.GetStatus(), 120.0) == GOOD
    silence = take_silence(tmp_path, "controller")
    assert (silence.pid, silence.seconds, silence.by, silence.phase) == (0, 120.0, "trainer-0", "asked for GetStatus")
    with pytest.raises(RequestTimeout):
        ask(Controller(RequestTimeout("x"), RequestTimeout("y")), tmp_path, m.GetStatus(), 120.0)


def test_a_controller_that_is_slow_to_start_is_waited_for_twice_and_not_blamed(tmp_path):
    assert ask(Controller(EndpointMissing("x"), GOOD), tmp_path, m.GetStatus(), 120.0) == GOOD
    assert take_silence(tmp_path, "controller") is None
    with pytest.raises(EndpointMissing):
        ask(Controller(EndpointMissing("x"), EndpointMissing("y")), tmp_path, m.GetStatus(), 120.0)


def test_a_controller_without_room_on_its_disk_is_asked_again_within_a_limit(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr("areal_jax.trainer.link.time.sleep", slept.append)
    full = m.NotReady(waiting_for="room on the disk: /run/controller/ledger cannot be written")
    assert settle(Controller(full, full, GOOD), tmp_path, m.GetStatus(), 120.0, 600.0) == GOOD and len(slept) == 2
    monkeypatch.setattr("areal_jax.trainer.link.time.monotonic", lambda: 601.0 * len(slept))
    with pytest.raises(WaitedTooLong, match="waited 600 s with GetStatus; the controller waits for room on the disk"):
        settle(Controller(*[full] * 9), tmp_path, m.GetStatus(), 120.0, 600.0)
    assert len(slept) == 3
