"""Which branches a mode of MBQuant runs (Sec. 3.4)."""

from __future__ import annotations

import itertools

import pytest
from reference import multibranch as reference

from qcompile.errors import InvalidArgument
from qcompile.passes.schemes.multibranch import select_branches


@pytest.mark.parametrize(
    ("bits", "rows"),
    [
        ((2, 4, 6, 8), ["1", "2 3", "2 3 4", "1 2 3 4"]),
        ((2, 3, 4), ["1", "1 half 2", "1 2"]),
        ((2, 3, 4, 5, 6, 7, 8), [None, "1 half 2", None, "2 3 half 4", None, "1 2 3 half 4", None]),
    ],
)
def test_the_tables_of_the_paper(bits, rows):
    for selection, row in zip(select_branches(bits, amortised=True), rows, strict=True):
        text = " ".join(map(str, selection.full)) + (f" half {selection.half}" if selection.half else "")
        assert row in (None, text)


@pytest.mark.parametrize("amortised", [True, False])
def test_the_rule_on_every_list_of_modes(amortised):
    for count in range(1, 8):
        for bits in itertools.combinations(range(2, 9), count):
            expected = reference.selection(bits, amortised)
            found = select_branches(bits, amortised)
            assert [(one.full, one.half) for one in found] == [expected[b] for b in bits]


def test_branches_may_have_other_widths():
    chosen = [(one.full, one.half) for one in select_branches((1, 2, 3), True, branch_bits=1)]
    assert chosen == [((1,), None), ((2, 3), None), ((1, 2, 3), None)]
    chosen = [(one.full, one.half) for one in select_branches((4, 6, 8), False, branch_bits=4)]
    assert chosen == [((1,), None), ((1,), 2), ((1, 2), None)]
    with pytest.raises(InvalidArgument, match="no mode of 7 bits: a branch has 4"):
        select_branches((4, 7), True, branch_bits=4)
