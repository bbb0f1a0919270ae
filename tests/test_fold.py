"""Epilogues: integers that stand for real affine maps."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import trained
from reference import vertical as reference

from qcompile.errors import FoldError
from qcompile.passes import integer_ops
from qcompile.passes.fold import Affine, Term, integer_epilogue, wide_epilogue


def _affine(seed: int, terms: int, channels: int) -> tuple[Affine, list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    made, values = [], []
    for _ in range(terms):
        reach = int(2 ** generator.integers(4, 24))
        coefficient = generator.normal(0, 1, channels) * 10.0 ** generator.integers(-4, 1)
        made.append(Term(None, coefficient, np.float64(-reach), np.float64(reach)))
        values.append(generator.integers(-reach, reach + 1, (3, channels)))
    return Affine(tuple(made), generator.normal(0, 5, channels), 2, 1), values


def _exact(affine: Affine, values: list[np.ndarray], row: int, channel: int) -> Fraction:
    total = Fraction(float(affine.constant[channel]))
    for term, value in zip(affine.terms, values, strict=True):
        total += Fraction(float(term.coefficient[channel])) * int(value[row, channel])
    return total


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(1e-2, 10.0))
@settings(max_examples=60, deadline=None)
def test_codes_are_the_nearest_except_at_ties(seed, terms, unit):
    affine, values = _affine(seed, terms, 4)
    epilogue = integer_epilogue(affine, unit, -(2**30), 2**30)
    codes = reference.requantise(
        values,
        [m.astype(np.int64) for m in epilogue.multipliers],
        epilogue.constant,
        epilogue.shift,
        epilogue.low,
        epilogue.high,
    )
    slack = 2.0 ** -(epilogue.shift + 1) + 1e-9
    for multiplier, term in zip(epilogue.multipliers, affine.terms, strict=True):
        last_place = max(1.0, float(np.abs(multiplier).max()) * 2.0**-29)
        slack += float(term.high) * last_place * 2.0 ** -(epilogue.shift + 1)
    for row in range(3):
        for channel in range(4):
            real = _exact(affine, values, row, channel) / Fraction(unit)
            assert abs(float(real - int(codes[row, channel]))) <= 0.5 + slack


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_sums_stay_below_53_bits_and_float64_equals_int64(seed, terms):
    affine, values = _affine(seed, terms, 4)
    epilogue = integer_epilogue(affine, 0.37, 0, 255)
    bound = np.abs(epilogue.constant).astype(object)
    for multiplier, term in zip(epilogue.multipliers, affine.terms, strict=True):
        bound = bound + np.abs(multiplier.astype(object)) * int(term.high)
    assert max(bound) < 2**53
    found = integer_ops.requantize(
        [torch.from_numpy(v) for v in values],
        [torch.from_numpy(m) for m in epilogue.multipliers],
        torch.from_numpy(epilogue.constant),
        epilogue.shift,
        epilogue.low,
        epilogue.high,
    )
    expected = reference.requantise(
        values, [m.astype(np.int64) for m in epilogue.multipliers], epilogue.constant, epilogue.shift, 0, 255
    )
    np.testing.assert_array_equal(found.numpy(), expected)


def test_multipliers_use_their_bits():
    affine = Affine(
        (Term(None, np.array([0.01, 1.0]), np.float64(-1000), np.float64(1000)),), np.zeros(2), 2, 1
    )
    epilogue = integer_epilogue(affine, 0.5, 0, 15)
    assert 2**29 <= int(np.abs(epilogue.multipliers[0]).max()) <= 2**30


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_multipliers_are_int32_values_times_a_power_of_two(seed, terms):
    affine, _ = _affine(seed, terms, 4)
    for multiplier in integer_epilogue(affine, 0.37, 0, 255).multipliers:
        assert multiplier.dtype == np.int64
        zeros = max(0, int(np.abs(multiplier).max()).bit_length() - 31)
        assert not (multiplier % 2**zeros).any()
        assert (np.abs(multiplier) >> zeros < 2**31).all()


def test_a_stream_keeps_its_precision_beside_a_coarse_accumulator():
    accumulator = Term(None, np.array([0.3, 0.2]), np.float64(-5000), np.float64(5000))
    stream = Term(None, np.float64(1e-6), np.float64(-(2**28)), np.float64(2**28))
    epilogue = integer_epilogue(Affine((accumulator, stream), np.zeros(2), 4, 1), 0.25, 0, 15)
    errors = [
        float(np.abs(np.ldexp(m.astype(np.float64), -epilogue.shift) * 0.25 / term.coefficient - 1.0).max())
        for m, term in zip(epilogue.multipliers, (accumulator, stream), strict=True)
    ]
    assert errors[0] < 2.0**-29
    assert errors[1] < 2.0**-20


def test_a_residual_stream_goes_through_its_sums_unrounded():
    stream = Term(None, np.float64(3e-7), np.float64(0), np.float64(2**28))
    accumulator = Term(None, np.array([0.013, 0.017]), np.float64(-5000), np.float64(5000))
    affine = Affine((accumulator, stream), np.zeros(2), 4, 1).clipped(0.0, math.inf)
    epilogue = wide_epilogue(affine)
    assert epilogue.unit == 3e-7 * 2.0 ** round(math.log2(epilogue.unit / 3e-7))
    assert int(epilogue.multipliers[1]) * epilogue.unit == 3e-7 * 2.0**epilogue.shift


def test_a_clip_becomes_a_code_range():
    term = Term(None, np.float64(0.5), np.float64(-100), np.float64(100))
    affine = Affine((term,), np.float64(0.0), 4, 1).clipped(0.0, 6.0)
    epilogue = integer_epilogue(affine, 1.0, 0, 15)
    assert (epilogue.low, epilogue.high) == (0, 6)
    assert integer_epilogue(affine, 1.0, 0, 3).high == 3


def test_a_clip_that_cannot_act_is_left_out():
    term = Term(None, np.float64(0.5), np.float64(0), np.float64(100))
    assert not Affine((term,), np.float64(0.0), 4, 1).clipped(0.0, math.inf).is_clipped


def test_wide_tensors_keep_at_least_28_bits_of_their_range():
    affine, _ = _affine(1, 2, 3)
    epilogue = wide_epilogue(affine)
    low, high = affine.real_range()
    reach = max(abs(low.min()), abs(high.max()))
    assert 2**28 <= reach / epilogue.unit <= 2**29
    assert -(2**29) <= epilogue.low <= epilogue.high <= 2**29


def test_a_clip_that_leaves_a_sliver_still_fits_the_sums():
    wide = Term(None, np.array([1.0, 3.0]), np.float64(-2000), np.float64(2000))
    affine = Affine((wide,), np.array([-1999.999, -5999.999]), 4, 1).clipped(0.0, math.inf)
    epilogue = wide_epilogue(affine)
    found = reference.requantise(
        [np.array([[2000], [2000]])], list(epilogue.multipliers), epilogue.constant, epilogue.shift, 0, 2**29
    )
    # the sum is 6000 and its multiplier has 30 bits
    assert np.abs(found * epilogue.unit - 1e-3).max() < 6000 * 2.0**-30


def test_few_accumulator_steps_in_a_fine_unit():
    few = Term(None, np.array([1.0]), np.float64(-3), np.float64(3))
    epilogue = integer_epilogue(Affine((few,), np.zeros(1), 4, 1), 2.0**-36, -(2**40), 2**40)
    assert int(epilogue.multipliers[0][0]) == 2 ** (36 + epilogue.shift)


@pytest.mark.parametrize("unit", [0.0, -1.0, math.nan, math.inf])
def test_bad_steps_are_named(unit):
    term = Term(None, np.float64(0.5), np.float64(0), np.float64(100))
    with pytest.raises(FoldError, match="conv7"):
        integer_epilogue(Affine((term,), np.float64(0.0), 4, 1, layers=("conv7",)), unit, 0, 15)


def test_a_hopelessly_small_step_is_an_error():
    term = Term(None, np.float64(1e12), np.float64(0), np.float64(2.0**30))
    with pytest.raises(FoldError, match="calibrate"):
        integer_epilogue(Affine((term,), np.float64(0.0), 4, 1, layers=("conv7",)), 1e-3, 0, 15)


def test_nan_parameters_are_an_error():
    term = Term(None, np.float64(math.nan), np.float64(0), np.float64(100))
    with pytest.raises(FoldError, match="NaN"):
        integer_epilogue(Affine((term,), np.float64(0.0), 4, 1, layers=("conv7",)), 1.0, 0, 15)


def test_joined_streams_keep_the_bits_of_their_multipliers():
    model, _ = trained("dense", 2, scheme="multibranch", bits=(2, 4))
    for mode in model.prepared_modes:
        graph = model.integer_model(mode)
        readers = [node for node in graph.graph.nodes if graph.operator_name(node) == "requantize"]
        found = 0
        for node in readers:
            for one, multiplier in zip(node.args[0], node.args[1], strict=True):
                if graph.operator_name(one) == "aten.cat":
                    found += 1
                    assert int(graph.constant(multiplier).abs().min()) >= 2**16
        assert found
