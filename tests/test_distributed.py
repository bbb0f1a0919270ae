"""Two ranks (processes with gloo) against one with the doubled batch."""

from __future__ import annotations

from typing import Any

import pytest
import rank_jobs
import torch

import qcompile

RECIPES = ("model", "per mode", "joint")

#: Recipes, and how many micro-batches a step has; the others are left to the slow suite.
FAST = (("model", 2), ("per mode", 1), ("joint", 1))
SLOW = tuple((recipe, micro) for recipe in RECIPES for micro in (1, 2) if (recipe, micro) not in FAST)
DOUBLE = {"dtype": torch.float64}


def _steps(kinds: tuple[tuple[str, int], ...]) -> dict[str, tuple[Any, dict[str, Any]]]:
    return {
        f"{recipe}, {micro}": (rank_jobs.train, {"recipe": recipe, "micro": micro, **DOUBLE})
        for recipe, micro in kinds
    }


_JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    **_steps(FAST),
    **{
        f"{recipe}, float32": (rank_jobs.train, {"recipe": recipe, "dtype": torch.float32, "steps": 1})
        for recipe in RECIPES
    },
    "mgd": (rank_jobs.train, {"recipe": "model", "moo": "mgd", **DOUBLE}),
    "calibrated": (rank_jobs.train, {"recipe": "model", "calibrated": True, "micro": 2, **DOUBLE}),
    "sharded": (rank_jobs.train, {"recipe": "sharded", "calibrated": True, "micro": 2, **DOUBLE}),
    "refusals": (rank_jobs.refusals, {}),
    "first steps": (rank_jobs.first_steps, {}),
    "searched": (rank_jobs.searched, {}),
    "checkpoints": (rank_jobs.search_with_own_checkpoints, {}),
    "view": (rank_jobs.view_of_a_wrapped_model, {}),
    "nan": (rank_jobs.one_bad_batch, {"value": torch.nan}),
    "infinity": (rank_jobs.one_bad_batch, {"value": torch.inf}),
    "unset and sharded": (rank_jobs.unset_and_sharded, {}),
    "batch norm, 0.1": (rank_jobs.batch_norm, {"momentum": 0.1}),
    "batch norm, None": (rank_jobs.batch_norm, {"momentum": None}),
}


_JOBS_OF_SCHEMES: dict[str, tuple[Any, dict[str, Any]]] = {
    scheme: (rank_jobs.train, {"recipe": "model", "micro": 2, "scheme": scheme, **DOUBLE})
    for scheme in qcompile.schemes()
}


def _run(jobs: dict[str, tuple[Any, dict[str, Any]]]) -> dict[str, list[Any]]:
    """Results of jobs by name and rank, from one start of two processes."""
    found = rank_jobs.on_ranks(2, rank_jobs.all_of, list(jobs.values()))
    return {name: [results[place] for results in found] for place, name in enumerate(jobs)}


@pytest.fixture(scope="module")
def on_two() -> dict[str, list[Any]]:
    return _run(_JOBS)


@pytest.fixture(scope="module")
def others_on_two() -> dict[str, list[Any]]:
    return _run(_steps(SLOW))


@pytest.fixture(scope="module")
def schemes_on_two() -> dict[str, list[Any]]:
    return _run(_JOBS_OF_SCHEMES)


@pytest.mark.parametrize(("recipe", "micro"), FAST)
def test_twenty_steps_give_the_losses_of_one_rank(on_two, recipe, micro):
    _check_steps(on_two, recipe, micro)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "micro"), SLOW)
def test_twenty_steps_of_the_others_do(others_on_two, recipe, micro):
    _check_steps(others_on_two, recipe, micro)


def _check_steps(on_two, recipe, micro):
    expected, gradients, state = rank_jobs.train(0, 1, "alone", torch.float64, micro=micro)
    assert abs(float(expected[0]) - float(expected[-1])) > 1e-2  # it trains
    for losses, found, end in on_two[f"{recipe}, {micro}"]:
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(found, gradients, rtol=0, atol=1e-9)
        torch.testing.assert_close(end, state, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", qcompile.schemes())
def test_every_scheme_gives_the_losses_of_one_rank(schemes_on_two, scheme):
    expected, gradients, _ = rank_jobs.train(0, 1, "alone", torch.float64, micro=2, scheme=scheme)
    assert abs(float(expected[0]) - float(expected[-1])) > 1e-3  # it trains
    # layers at 2 bits that change from step to step let differences in the last bit grow tenfold a step
    steps = 5 if scheme == "coupled" else len(expected)
    for losses, found, _ in schemes_on_two[scheme]:
        torch.testing.assert_close(losses[:steps], expected[:steps], rtol=0, atol=1e-9)
        torch.testing.assert_close(found, gradients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("recipe", RECIPES)
def test_first_gradients_agree_in_single_precision(on_two, recipe):
    _, expected, _ = rank_jobs.train(0, 1, "alone", torch.float32, steps=1)
    for _, found, _ in on_two[f"{recipe}, float32"]:
        for name, value in expected.items():
            difference = float((found[name] - value).abs().max())
            assert difference <= 1e-4 * max(1.0, float(value.abs().max())), name


def test_min_norm_weights_follow_from_the_gradients_of_all_ranks(on_two):
    expected, _, _ = rank_jobs.train(0, 1, "alone", torch.float64, moo="mgd")
    for losses, _, _ in on_two["mgd"]:
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)


def test_sharded_parameters_train_as_replicated_ones(on_two):
    for (losses, gradients, state), (other, found, end) in zip(
        on_two["calibrated"], on_two["sharded"], strict=True
    ):
        torch.testing.assert_close(other, losses, rtol=0, atol=1e-9)
        torch.testing.assert_close(found, gradients, rtol=0, atol=1e-9)
        torch.testing.assert_close(end, state, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("no wrapper, backward", "nothing reduces the gradients of 2 ranks"),
        ("no wrapper, call", "nothing reduces the gradients of 2 ranks"),
        ("no wrapper, per mode", "nothing reduces the gradients of 2 ranks"),
        ("find_unused_parameters", "pass find_unused_parameters=True"),
        ("static_graph", "no static_graph=True"),
        ("called with a wrapped model", "use joint.backward"),
        ("backward of the inner joint loss", "nothing reduces the gradients of 2 ranks"),
    ],
)
def test_wrong_settings_are_told_the_way_out_in_one_line(on_two, setting, words):
    for said in on_two["refusals"]:
        assert words in said[setting]
        assert "\n" not in said[setting]


def test_a_loop_that_reduces_by_itself_is_let_through(on_two):
    assert [said["loop reduces itself"] for said in on_two["refusals"]] == ["", ""]


def test_the_first_batch_sets_the_same_steps_on_all_ranks(on_two):
    one, other = on_two["first steps"]
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_two_ranks_find_the_policies_of_one(on_two):
    expected = rank_jobs.searched(0, 1)
    assert on_two["searched"] == [expected, expected]


def test_ranks_do_not_go_on_from_different_checkpoints(on_two):
    assert all("folder that all of them share" in said for said in on_two["checkpoints"])


def test_views_of_a_wrapped_model_reduce(on_two):
    expected = rank_jobs.view_of_a_wrapped_model(0, 1)
    one, other = on_two["view"]
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", ["nan", "infinity"])
def test_every_rank_stops_at_a_first_batch_with(on_two, value):
    assert all("NaN or infinity" in said for said in on_two[value])


def test_steps_come_before_sharding(on_two):
    assert all("before fully_shard" in said for said in on_two["unset and sharded"])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronised_batch_norm_is_batch_norm_of_all_batches(on_two, momentum):
    expected = rank_jobs.batch_norm(0, 1, momentum)
    found = on_two[f"batch norm, {momentum}"]
    for place in (0, 1):  # output and input gradient lie split over the ranks
        joined = torch.cat([results[place] for results in found])
        torch.testing.assert_close(joined, expected[place], rtol=1e-12, atol=1e-12)
    for results in found:
        for one, other in zip(results[2:], expected[2:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
