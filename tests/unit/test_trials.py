"""Runs that take turns: one at a time, each with its own random numbers."""

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
