"""Where tensors lie at run time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tvm")

from qcompile.backends.tvm.plan import ALIGNMENT, Call, Place, arranged


def number(index: int, size: int) -> Place:
    """A tensor that has no place yet."""
    return Place("arena", index, (size,), "uint8")


@st.composite
def programs(draw: st.DrawFn) -> list[Call]:
    """Calls that each write one or two tensors and read some of those before."""
    made: list[Place] = []
    calls = []
    for step in range(draw(st.integers(1, 12))):
        read = draw(st.lists(st.sampled_from(made), max_size=3, unique=True)) if made else []
        sizes = draw(st.lists(st.sampled_from([1, 64, 100, 4096, 9000]), min_size=1, max_size=2))
        written = [number(len(made) + i, size) for i, size in enumerate(sizes)]
        calls.append(Call(f"kernel_{step}", (*read, *written)))
        made += written
    return calls


@given(programs(), st.booleans())
def test_tensors_that_live_together_lie_apart(calls: list[Call], over: bool) -> None:
    in_place = {one.kernel: (0, len(one.arguments) - 1) for one in calls if len(one.arguments) > 1}
    places, arena, shared = arranged(calls, in_place if over else {})
    lives: dict[Place, tuple[int, int]] = {}
    for step, call in enumerate(calls):
        for one in call.arguments:
            lives[one] = (lives.get(one, (step, step))[0], step)
    for one, place in places.items():
        assert place.position % ALIGNMENT == 0
        assert place.position + place.bytes <= arena
        assert (place.shape, place.dtype) == (one.shape, one.dtype)
        for other, beside in places.items():
            meet = max(lives[one][0], lives[other][0]), min(lives[one][1], lives[other][1])
            apart = place.position + place.bytes <= beside.position
            apart = apart or beside.position + beside.bytes <= place.position
            if one is other or apart or meet[0] > meet[1]:
                continue
            # only a tensor that dies where the other begins may share its memory
            assert meet[0] == meet[1]
            (call,) = (calls[meet[0]],)
            source, target = (call.arguments[index] for index in in_place[call.kernel])
            assert call.kernel in shared
            assert {one, other} == {source, target}
            assert place.position == beside.position
            assert lives[source][1] == lives[target][0] == meet[0]
    if not over:
        assert not shared


def test_a_dying_tensor_is_written_over() -> None:
    a, b, c = number(0, 4096), number(1, 4096), number(2, 4096)
    calls = [Call("first", (a,)), Call("second", (a, b)), Call("third", (a, b, c)), Call("last", (c,))]
    places, arena, shared = arranged(calls, {"second": (0, 1), "third": (1, 2)})
    assert shared == {"third"}  # the second kernel's input is read later
    assert places[b].position == places[c].position != places[a].position
    assert arena < 3 * 4096


def test_memory_is_used_again() -> None:
    tensors = [number(index, 6400) for index in range(9)]
    calls = [Call("begin", (tensors[0],))]
    calls += [Call(f"step_{i}", (tensors[i], tensors[i + 1])) for i in range(8)]
    assert arranged(calls, {})[1] < 4 * 6400
