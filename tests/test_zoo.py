"""Every architecture of the zoo goes all the way, but for those that docs/limitations.md names."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from zoo import ZOO, Outcome, examine_apart

PAGE = Path(__file__).resolve().parents[1] / "docs" / "limitations.md"


def _known() -> dict[str, str]:
    """The error of each architecture that is known to fail: the last table of the page."""
    rows = PAGE.read_text().rpartition("| --- |")[2].splitlines()
    cells = [row.strip("|").split(" | ") for row in rows if row.startswith("| ")]
    return {name.strip(): error.strip().strip("`") for name, error, _ in cells}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """Of the selected architectures, two at a time: a file of tests is one worker's."""
    calls = [getattr(one, "callspec", None) for one in request.session.items if one.path == request.path]
    names = [call.params["name"] for call in calls if call is not None]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(examine_apart, name) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_an_architecture_passes(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    error = outcomes[name].result().error
    wanted = _known().get(name, "")
    assert wanted in error if wanted else not error, error


def test_few_are_known_to_fail() -> None:
    known = _known()
    assert set(known) <= set(ZOO)
    assert len(known) <= 0.05 * len(ZOO)
    assert len(ZOO) >= 55


def test_the_table_has_every_architecture() -> None:
    rows = [line.split(" | ") for line in (PAGE.parent / "zoo.md").read_text().splitlines()]
    assert [cells[0].removeprefix("| ") for cells in rows if len(cells) == 6][2:] == list(ZOO)
