"""Runs that take turns: one at a time, each with its own random numbers."""

from unittest.mock import MagicMock

import pytest
import torch

from helper.errors import Diverged, Interrupted
from helper.trials import Turns
from inputs import UserError

CPU = torch.device("cpu")


def test_runs_take_turns_in_a_fixed_order_and_draw_what_they_would_draw_alone():
    order, drawn = [], {}

    def work(number, turns):
        def run(pass_turn):
            torch.manual_seed(number)
            for _ in range(turns):
                order.append(number)
                drawn.setdefault(number, []).append(torch.rand(1).item())
                pass_turn()

        return run

    torch.manual_seed(9)
    before = torch.get_rng_state()
    Turns(CPU, 3).run([work(0, 2), work(1, 3), work(2, 1)])
    assert order == [0, 1, 2, 0, 1, 1]
    assert torch.equal(torch.get_rng_state(), before)
    for number, values in drawn.items():
        torch.manual_seed(number)
        assert values == torch.rand(len(values)).tolist()


class Default:
    """A stand-in for a GPU's default generator: it hands out and takes up the state itself, not a copy."""

    def __init__(self):
        self.state = object()

    def graphsafe_get_state(self):
        return self.state

    def graphsafe_set_state(self, state):
        self.state = state


def test_each_run_records_and_replays_with_its_own_random_state_of_a_gpu(monkeypatch):
    """A recording stays bound to the state that was the default's; so that one must be back in each turn of the run."""
    default, seen = Default(), {}
    for name in ("Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "default_generators", [default])
    monkeypatch.setattr(torch, "Generator", lambda _: object())
    outside = default.state

    def work(number):
        def run(pass_turn):
            for _ in range(3):
                seen.setdefault(number, []).append(default.state)
                pass_turn()

        return run

    Turns(torch.device("cuda", 0), 2).run([work(0), work(1)])
    assert default.state is outside
    assert all(len(states) == 3 and len({*map(id, states)}) == 1 for states in seen.values())
    assert len({id(outside), id(seen[0][0]), id(seen[1][0])}) == 3


def failing(error):
    def run(pass_turn):
        pass_turn()
        raise error

    return run


def test_a_run_that_fails_leaves_the_others_to_their_end():
    ended = []
    with pytest.raises(Diverged, match="first"):
        Turns(CPU, 3).run([failing(Diverged("first")), lambda turn: ended.append(turn()), failing(Diverged("third"))])
    assert ended == [None]


def test_an_interruption_goes_before_other_errors():
    with pytest.raises(Interrupted):
        Turns(CPU, 2).run([failing(Diverged("first")), failing(Interrupted("second"))])


@pytest.mark.parametrize("error", [UserError, KeyError])
def test_any_other_error_ends_all_runs(error):
    turns = []

    def endless(pass_turn):
        while True:
            turns.append(1)
            pass_turn()

    with pytest.raises(error, match="wrong"):
        Turns(CPU, 2).run([endless, failing(error("wrong"))])
    assert len(turns) == 2
