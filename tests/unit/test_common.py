"""Helpers of the other tests."""

import itertools

import pytest
from common import pairwise, product_of


@pytest.mark.parametrize("sizes", [(8, 8, 7), (8, 8, 2), (2, 2, 2, 2), (3, 5), (4,) * 5, (1, 1, 6)])
def test_every_two_values_of_two_factors_meet(sizes):
    factors = [[f"{name}{value}" for value in range(size)] for name, size in zip("abcde", sizes, strict=False)]
    cases = pairwise(*factors)
    met = {pair for case in cases for pair in itertools.combinations(case, 2)}
    assert met == {pair for two in itertools.combinations(factors, 2) for pair in itertools.product(*two)}
    assert len(set(cases)) == len(cases) and set(cases) <= set(itertools.product(*factors))
    largest, second = sorted(sizes, reverse=True)[:2]
    assert largest * second <= len(cases) <= 1.5 * largest * second


def test_the_rest_of_a_product_has_the_mark_full():
    factors = (range(3), "ab", (None, True))
    params = product_of(*factors)
    assert [param.values for param in params] == list(itertools.product(*factors))
    few = [param.values for param in params if not param.marks]
    assert set(few) == set(pairwise(*map(list, factors))) and len(few) < len(params)
    assert {mark.name for param in params for mark in param.marks} == {"full"}


def test_the_mark_full_is_left_out_unless_it_is_asked_for(pytestconfig):
    assert "not full" in pytestconfig.getini("addopts")
    assert any(line.startswith("full:") for line in pytestconfig.getini("markers"))
