"""Kernels of quantised layers, over random shapes, strides, paddings, dilations, groups and bits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amx import FLAGS, provide_amx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")

from qcompile.backends.tvm.artefact import kernel_artefact  # noqa: E402
from qcompile.backends.tvm.costs import Costs  # noqa: E402
from qcompile.backends.tvm.emulated import Emulated  # noqa: E402
from qcompile.backends.tvm.families import FAMILIES, Family  # noqa: E402
from qcompile.backends.tvm.library import Library  # noqa: E402
from qcompile.backends.tvm.maps import Map, from_memory, to_memory  # noqa: E402
from qcompile.backends.tvm.packing import arrange, multiplier_bytes, pack, parts_of, runs_of  # noqa: E402
from qcompile.backends.tvm.processors import ARM, X86, Architecture, Processor  # noqa: E402
from qcompile.backends.tvm.scaled import in_float32  # noqa: E402
from qcompile.backends.tvm.shifted import in_integers  # noqa: E402
from qcompile.backends.tvm.specs import ACCUMULATOR, Layer, Output, Scaled, Shifted, Steps, Sums  # noqa: E402

#: What runs a family that needs a feature: architecture, LLVM's attributes, flag of /proc/cpuinfo.
PROCESSORS: dict[str, tuple[Architecture, dict[str, Any], str]] = {
    "amx": (X86, {"mcpu": "sapphirerapids"}, "amx_int8"),
    "bitalg": (X86, {"mcpu": "icelake-server"}, "avx512_bitalg"),
    "vnni": (X86, {"mcpu": "cascadelake"}, "avx512_vnni"),
    "avx512": (X86, {"mcpu": "cascadelake"}, "avx512bw"),
    "avx2": (X86, {"mcpu": "haswell"}, "avx2"),
    "dotprod": (ARM, {"mattr": ["+neon", "+dotprod"]}, ""),
    "neon": (ARM, {"mattr": ["+neon"]}, ""),
}


def runnable(family: Family) -> Any:
    """A family as a parameter, skipped where its instructions can be neither executed nor emulated."""
    feature = min(family.needs)
    architecture, _, flag = PROCESSORS[feature]
    if architecture is ARM:
        there = shutil.which(ARM.compiler) is not None and shutil.which(ARM.emulator) is not None
        reason = f"needs {ARM.compiler} and {ARM.emulator}"
    else:
        there = flag in FLAGS or (feature == "amx" and "avx512_vnni" in FLAGS)  # see amx.py
        reason = f"this processor has no {flag}"
    return pytest.param(
        family, marks=pytest.mark.skipif(not there, reason=reason), id=f"{family.name}-{feature}"
    )


def run_kernel(
    kernel: Any,
    arrays: list[NDArray[Any]],
    outputs: int,
    family: Family,
    folder: Path,
    changed: int | None = None,
) -> list[NDArray[Any]]:
    """A kernel as a model of one step, through the driver that devices run; the last arrays are outputs.

    Where it writes its last output over an input, that is returned as the kernel left it.
    """
    architecture, attributes, _ = PROCESSORS[min(family.needs)]
    if family.name == "amx":
        provide_amx()
    count = len(arrays) - outputs
    tensors = [(one.shape, str(one.dtype)) for one in arrays]
    processor = Processor("here", attributes, family.needs, "1")
    artefact = kernel_artefact(kernel, tensors[:count], tensors[count:], architecture, processor, folder)
    library = Library(artefact, 1) if architecture is X86 else Emulated(artefact, 1)
    given = [torch.from_numpy(np.ascontiguousarray(one)).clone() for one in arrays[:count]]  # aligned
    made = [one.numpy() for one in library.run(given)]
    return made if changed is None else [*made[:-1], given[changed].numpy()]


def convolution(
    a: NDArray[np.int64],
    w: NDArray[np.int64],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> NDArray[np.int64]:
    """The sums of a convolution, tap by tap in int64."""
    (rows, columns), (outputs, per_group) = w.shape[2:], w.shape[:2]
    x = np.pad(a, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    h = (x.shape[2] - dilation[0] * (rows - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (columns - 1) - 1) // stride[1] + 1
    total = np.zeros((len(a), outputs, h, width), np.int64)
    for o in range(outputs):
        first = o // (outputs // groups) * per_group
        for i in range(rows):
            for j in range(columns):
                y, z = i * dilation[0], j * dilation[1]
                part = x[:, first : first + per_group, y : y + h * stride[0] : stride[0]]
                part = part[..., z : z + width * stride[1] : stride[1]][:, :, :h, :width]
                total[:, o] += np.einsum("ncyx,c->nyx", part, w[o, :, i, j])
    return total


#: Later cases of each kind.
LATE = frozenset((9, 10, 11, 15, 16, 17, 18, 19, 25, 26, 27, 30, 31, 36, 37))
SEEDS = [pytest.param(seed, marks=pytest.mark.slow if seed in LATE else ()) for seed in range(38)]


def random_case(seed: int) -> dict[str, Any]:
    """A convolution; from seed 12 on a linear layer of few rows, from 20 on 3x3 of few bits, from 28 on an
    image, from 32 on a linear layer with multipliers."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    bits = draw(1, 8)
    groups = draw(1, 3) if seed % 4 == 0 else draw(2, 40) if seed % 4 == 1 else 1
    per_group = (1, 1) if seed % 4 == 1 else (draw(1, 24), draw(1, 40))
    shift, numerator = [(0, 0), (1, 1), (2, -1), (3, 3)][draw(0, 3)] if bits < 8 and groups == 1 else (0, 0)
    if 20 <= seed < 32:
        is_image = seed >= 28
        bits = draw(1, 8) if is_image else 1 + seed % 4
        inputs = draw(1, 4) if is_image else draw(1, 70)
        if not is_image and seed % 8 < 6:  # in memory a multiple of 32 channels, as most layers have
            inputs = -(-inputs // 32) * 32 - draw(0, 15)
        return {
            "rng": rng,
            "n": draw(1, 2),
            "inputs": inputs,
            "multiplied": 0,
            "multiple": 4 if is_image else 16,
            "outputs": draw(1, 70),
            "size": (draw(3, 12), draw(3, 20)),
            "kernel": (draw(1, 7), draw(1, 7)) if is_image else (3, 3),
            "stride": (draw(1, 2), draw(1, 2)) if is_image else (1, 1),
            "dilation": (1, 1),
            "padding": (3, 3) if is_image else (draw(0, 2), draw(0, 2)),
            "groups": 1,
            "bits": bits,
            "signed": bits == 8 or bool(draw(0, 1)),
            "shift": draw(0, 1) if bits < 8 else 0,
            "numerator": draw(-1, 1) if bits < 8 else 0,
            "zero_point": draw(0, 3),
            "highest": 255 if is_image else [3, 15, 63][draw(0, 2)],
        }
    if seed >= 12:
        multiplied = 32 * draw(1, 4) if seed >= 32 else 0
        return {
            "rng": rng,
            "n": 1,
            "multiplied": multiplied,
            "inputs": multiplied * draw(1, 5) if multiplied else draw(1, 300),
            "outputs": draw(1, 50),
            "size": (1, draw(1, 9)),
            "kernel": (1, 1),
            "stride": (1, 1),
            "dilation": (1, 1),
            "padding": (0, 0),
            "groups": 1,
            "bits": 1 + seed % 8,
            "signed": seed % 8 == 7 or bool(draw(0, 1)),
            "shift": draw(0, 1) if seed % 8 < 7 else 0,
            "numerator": draw(-2, 2) if seed % 8 < 7 else 0,
            "zero_point": 8 * draw(0, 1),
            "highest": [255, 15][draw(0, 1)],
        }
    return {
        "rng": rng,
        "n": draw(1, 2),
        "multiplied": 0,
        "inputs": groups * per_group[0],
        "outputs": groups * per_group[1],
        "size": (draw(6, 12), draw(6, 20)),
        "kernel": (draw(1, 3), draw(1, 3)),
        "stride": (draw(1, 2), draw(1, 2)),
        "dilation": (draw(1, 2), draw(1, 2)),
        "padding": (draw(0, 2), draw(0, 2)),
        "groups": groups,
        "bits": bits,
        "signed": bits == 8 or bool(draw(0, 1)),
        "shift": shift,
        "numerator": numerator,
        "zero_point": 8 * draw(0, 1),
        "highest": [255, 15][draw(0, 1)],
    }


@pytest.mark.parametrize("family", [runnable(one) for one in FAMILIES])
@pytest.mark.parametrize("seed", SEEDS)
def test_layers_with_epilogues_are_exact(seed: int, family: Family, tmp_path: Path) -> None:
    case = random_case(seed)
    rng, n, groups, bits, multiplied = (case[key] for key in ("rng", "n", "groups", "bits", "multiplied"))
    if multiplied and not family.multiplies:
        pytest.skip("the family has no such layers")
    (h, w), (top, left) = case["size"], case["padding"]
    edge, multiple = (top, top, left, left), case.get("multiple", 16)
    source = Map(n, h, w, case["inputs"], "uint8", case["zero_point"], edge, multiple)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if case["signed"] else (0, 2**bits - 1)
    shape = (case["outputs"], case["inputs"] // groups, *case["kernel"])
    weight = rng.integers(low, high + 1, shape)
    codes = rng.integers(
        -source.zero_point, case["highest"] - source.zero_point + 1, (n, case["inputs"], h, w)
    )
    multipliers = rng.integers(0, 256, (case["outputs"], case["inputs"] // (multiplied or case["inputs"])))
    multipliers = multipliers if multiplied else np.ones_like(multipliers)
    times = multipliers.repeat(multiplied or case["inputs"], 1).reshape(len(weight), -1, 1, 1)
    times = times if groups == 1 else 1
    effective = (weight * 2 ** case["shift"] + case["numerator"]) * times
    sums = convolution(codes, effective, case["stride"], (top, left), case["dilation"], groups)
    out = Map(n, *sums.shape[2:], case["outputs"], "uint8", 3, (1, 0, 2, 1))
    plain = Map(n, *sums.shape[2:], case["outputs"], "int32")
    levels, low_code = [(1, 0), (3, 2), (15, -8), (40, 0)][seed % 4]
    counted = Map(n, *sums.shape[2:], case["outputs"], "uint8", max(0, -low_code), (0, 1, 1, 0))
    scaled = Map(n, *sums.shape[2:], case["outputs"], "uint8", 2)
    whole = Map(n, *sums.shape[2:], case["outputs"], "uint8", 1)
    runs = runs_of(shape, source.padded, case["dilation"], groups)
    layer = Layer(
        source, runs, case["stride"], case["dilation"], (top, left), *sums.shape[2:], case["highest"],
        bits, case["signed"], case["numerator"], case["shift"], groups == len(weight) == case["inputs"] > 1,
        (), (plain,), multiplied,
    )  # fmt: skip
    stream = rng.integers(-(2**20), 2**20, sums.shape)
    factors = rng.integers(-(2**20), 2**20, (2, case["outputs"]))
    constant = rng.integers(-(2**30), 2**30, case["outputs"])
    per_channel = (slice(None), None, None)
    total = sums * factors[0][per_channel] + stream * factors[1][per_channel] + constant[per_channel]
    vectors = arrange(weight, runs, groups)
    stored = arrange(effective, runs, groups).astype(np.int64) if multiplied else vectors.astype(np.int64)
    stored = stored if multiplied else stored * 2 ** case["shift"] + case["numerator"]
    correction = (source.zero_point - family.bias(layer)) * stored.sum((1, 3)).reshape(-1)[: case["outputs"]]
    epilogue = np.zeros((3, out.padded))
    zero = 0 if seed % 2 else 3 << 20  # the zero point, added after rounding or before
    epilogue[0] = zero
    epilogue[0, : case["outputs"]] += constant - factors[0] * correction
    epilogue[1:, : case["outputs"]] = factors
    epilogue *= 2.0**-20
    sign = rng.choice([-1, 1], (1, case["outputs"]))
    thresholds = np.sort(rng.choice(sums.reshape(-1), (levels, case["outputs"])) * sign, 0)
    steps = np.full((1 + levels, counted.padded), 2**31 - 1)
    steps[0], steps[1 : 1 - low_code] = 1, -(2**31)
    steps[:, : case["outputs"]] = np.concatenate([sign, thresholds + sign * correction])
    reached = (sums * sign[0][per_channel] >= thresholds[:, None, :, None, None]).sum(0)
    summands = np.full(scaled.padded, 2 << 26)  # channels that pad get the zero point
    summands[: case["outputs"]] += constant - factors[0] * correction
    slopes = np.zeros(scaled.padded, np.int64)
    slopes[: case["outputs"]] = factors[0]
    single = in_float32(slopes, summands, 26, 0, 15)
    # products of at most 2^50, so that small sums take multipliers of more than 32 bits; every second channel
    # lies on boundaries between codes
    reach = [int(abs(sums).max() + abs(correction).max(initial=0)), 2**20]
    reals = [50 - one.bit_length() for one in reach]
    steep = np.array([rng.integers(-(2**31) + 1, 2**31, case["outputs"]) for _ in reach])
    steep = np.array(
        [row << e - 31 if e > 31 else row >> 31 - e for row, e in zip(steep, reals, strict=True)]
    )
    steep[:, ::2] = (2 ** (np.array(reals) - 1))[:, None] * rng.choice([-1, 1], steep[:, ::2].shape)
    added = rng.integers(-8, 40, case["outputs"]) << 46
    exact = sums * steep[0][per_channel] + stream * steep[1][per_channel] + added[per_channel]
    large = np.zeros((3, whole.padded), np.int64)
    large[0, : case["outputs"]], large[1:, : case["outputs"]] = added - steep[0] * correction, steep
    wide, safe = (in_integers(large[1:], large[0] + zero, reach) for zero in (0, 1 << 46))
    behind = in_integers(large[1:2], large[0], reach[:1])
    assert wide is not None
    assert safe is not None
    assert behind is not None
    negative = np.zeros((1, plain.padded), np.int32)
    negative[0, : case["outputs"]] = -correction
    is_exact = single is not None  # it is not where a kernel's sums are far from the layer's, as in two cases
    single = np.zeros((2, scaled.padded), np.float32) if single is None else single
    outputs = (
        Output(out, (ACCUMULATOR, 0), *((-3, 15, 3) if seed % 2 else (0, 18, 0, seed % 4 == 0))),
        Shifted(plain, (ACCUMULATOR, 0), -(2**28), 2**27, wide[0], 22),
        Steps(counted, ACCUMULATOR, levels, low_code),
        Scaled(scaled, (ACCUMULATOR,), 0, 15),
        Shifted(whole, (ACCUMULATOR, 0), 0, 30, safe[0], 46),
        Sums(plain),
        Shifted(plain, (ACCUMULATOR,), -(2**25), 2**24, behind[0], 24, 0, 1),
    )
    layer = replace(layer, outputs=outputs)
    if family.time(layer) is None:
        pytest.skip("the family has no such layers")
    results = [
        np.zeros(out.shape, np.uint8),
        np.zeros(plain.shape, np.int32),
        np.zeros(counted.shape, np.uint8),
        np.zeros(scaled.shape, np.uint8),
        np.zeros(whole.shape, np.uint8),
        np.zeros(plain.shape, np.int32),
        np.zeros(plain.shape, np.int32),
    ]
    packed = family.pack(vectors, layer)
    packed = np.concatenate([packed, multiplier_bytes(multipliers)]) if multiplied else packed
    arrays = [to_memory(codes, source), packed]
    arrays += [to_memory(stream, plain), epilogue, wide[1], steps.astype(np.int32), single, safe[1], negative]
    arrays += [behind[1], *results]
    kernel = family.build("layer", layer)
    coded, streamed, stepped, rounded, wholly, summed, joined = run_kernel(
        kernel, arrays, len(results), family, tmp_path
    )
    summand = sums * steep[0][per_channel] + added[per_channel]
    moved = np.clip((summand >> 24) + stream >> 1, -(2**25), 2**24)
    np.testing.assert_array_equal(from_memory(joined, plain), moved)
    if family.writes_once(layer) and PROCESSORS[min(family.needs)][0] is X86:
        kernel = family.build("layer", replace(layer, replaced=0))
        over = run_kernel(kernel, arrays, len(results), family, tmp_path / "over", changed=2)
        for have, want in zip(over, (coded, streamed, stepped, rounded, wholly, summed, joined), strict=True):
            np.testing.assert_array_equal(have, want)
    np.testing.assert_array_equal(from_memory(summed, plain), sums)
    np.testing.assert_array_equal(from_memory(streamed, plain), np.clip(exact >> 22, -(2**28), 2**27))
    np.testing.assert_array_equal(from_memory(wholly, whole), np.clip(exact >> 46, -1, 29))
    assert (wholly[..., case["outputs"] :] == 1).all()
    np.testing.assert_array_equal(from_memory(coded, out), np.clip(total >> 20, -3, 15))
    np.testing.assert_array_equal(from_memory(stepped, counted), low_code + reached)
    alone = (sums * factors[0][per_channel] + constant[per_channel]) >> 26
    if is_exact:
        np.testing.assert_array_equal(from_memory(rounded, scaled), np.clip(alone, -2, 13))
        assert (rounded[..., case["outputs"] :] == 2).all()
    assert (stepped[:, :, 0] == counted.zero_point).all()
    assert (stepped[..., case["outputs"] :] == counted.zero_point).all()  # channels that pad hold code 0
    inside = np.zeros(out.shape, bool)
    inside[:, 1:, 2:-1] = True
    assert (coded[~inside] == 3).all()  # the border holds code 0


@given(st.integers(1, 8), st.booleans(), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_packed_codes_come_back_by_shifts_and_masks(bits: int, signed: bool, count: int, seed: int) -> None:
    signed = signed or bits == 8
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    vectors = np.random.default_rng(seed).integers(low, high + 1, (2, count, 16, 4))
    stored = pack(vectors, bits, signed)
    assert stored.shape == (2, -(-count // 8) * bits, 64)
    for vector in range(count):
        group, place = divmod(vector, 8)
        found, row = np.zeros((2, 64), np.int64), group * bits
        for width, position in parts_of(bits):
            line, slot = divmod(place, 8 // width)
            part = (stored[:, row + line].astype(np.int64) >> (slot * width)) & (2**width - 1)
            found, row = found | part << position, row + width
        expected = vectors[:, vector].reshape(2, 64)
        offset = 2 ** (bits - 1) if signed and bits < 8 else 0
        np.testing.assert_array_equal(found, (expected + offset) % 2**bits)


def chosen(layer: Layer, features: set[str]) -> str:
    """The family with the least estimate, for a processor with these features."""
    return Costs(X86, Processor("any", {}, frozenset(features), "1"), False).choose(layer).family.name


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"amx", "vnni", "avx512", "avx2"}, {1: "amx", 2: "amx", 4: "amx", 8: "amx"}),
        (
            {"bitalg", "vnni", "avx512", "avx2"},
            {1: "bit-serial", 2: "winograd", 4: "winograd", 8: "vnni"},
        ),
        ({"vnni", "avx512", "avx2"}, {1: "winograd", 2: "winograd", 4: "winograd", 8: "vnni"}),
        ({"avx2"}, {1: "bit-serial", 2: "avx2", 4: "avx2", 8: "avx2"}),
        ({"dotprod", "neon"}, {1: "bit-serial", 2: "sdot", 4: "sdot", 8: "sdot"}),
        ({"neon"}, {1: "bit-serial", 2: "bit-serial", 4: "smlal", 8: "smlal"}),
    ],
)
def test_the_registry_picks_by_bits_and_features(features: set[str], expected: dict[int, str]) -> None:
    source = Map(1, 28, 28, 128, "uint8", 0, (1, 1, 1, 1))
    runs = runs_of((128, 128, 3, 3), 128, (1, 1), 1)
    for bits, name in expected.items():
        layer = Layer(
            source, runs, (1, 1), (1, 1), (1, 1), 28, 28, 2**bits - 1, bits, bits > 1, 0, 0, False, (), ()
        )
        assert chosen(layer, features) == name


@pytest.mark.parametrize("features", [{"amx", "vnni", "avx512", "avx2"}, {"vnni", "avx512", "avx2"}])
def test_few_rows_take_weights_as_they_lie_in_memory(features: set[str]) -> None:
    for rows, expected in ((1, True), (4, True), (196, False)):
        source = Map(1, 1, rows, 1024, "uint8")
        runs = runs_of((1024, 1024, 1, 1), 1024, (1, 1), 1)
        layer = Layer(source, runs, (1, 1), (1, 1), (0, 0), 1, rows, 255, 4, True, 0, 0, False, (), ())
        assert (chosen(layer, features) == "gemv") == expected
