"""How every benchmark measures.

Ours, its peers and the ceiling of the machine take turns, one call after the other, round after round: what slows the
machine for a while slows all of them, and a ratio of one round means something even where times drift. Quoted are the
medians and quartiles of those ratios over at least 10 rounds after two that warm up (3 where a round takes over 4 s).

A benchmark is a test that calls the fixture `race`. `report.py` turns what pytest-benchmark saves into the tables and
plots of results/.
"""

import statistics
from collections.abc import Callable

import pytest
import torch
from measure import Ceiling, seconds, turn

SECONDS_PER_CASE = 3.0  # rounds are added up to 30 as long as they fit
WARM_UP_ROUNDS = 2


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="smallest cases, two rounds: checks that benchmarks run")


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def race(benchmark, quick):
    """race(case, ours, peers): time `ours` against each of `peers` and save it as this benchmark's result.

    case: what is varied, such as {"batch": 64, "dim": 128, "dtype": "float32"}; the first is the x axis of the plot.
    ours, peers: callables without arguments, {name: callable} for the peers.
    floor: (amount, ceiling), the least work that the problem needs and the ceiling that limits it.
    headline: whether the README's table shows this case.
    memory: {name: bytes}, see measure.peak_memory.
    items: (number, name) of what a call makes, such as (64, "views"): the table tells how many a second.
    """

    def race(
        case: dict,
        ours: Callable[[], object],
        peers: dict[str, Callable[[], object]],
        floor: tuple[float, Ceiling] | None = None,
        headline: bool = False,
        memory: dict[str, int] | None = None,
        items: tuple[int, str] | None = None,
    ) -> None:
        runs = dict(peers)
        if floor:
            runs["floor"] = floor[1].run
        lengths = {name: turn(run) for name, run in runs.items()}
        own_calls, own_length = turn(ours)
        round_length = own_length + sum(length for _, length in lengths.values())
        rounds = 2 if quick else min(30, max(3 if round_length > 4 else 10, int(SECONDS_PER_CASE / round_length)))
        turns = {name: [] for name in runs}

        def others():
            for name, run in runs.items():
                turns[name].append(seconds(run, lengths[name][0]))

        benchmark.pedantic(seconds, (ours, own_calls), setup=others, rounds=rounds, warmup_rounds=WARM_UP_ROUNDS)
        if benchmark.disabled:
            return

        times = {name: times[-rounds:] for name, times in turns.items()}
        if floor:
            amount, ceiling = floor
            benchmark.extra_info["ceiling"] = {ceiling.name: ceiling.amount / statistics.median(times["floor"])}
            times["floor"] = [t * amount / ceiling.amount for t in times["floor"]]
        benchmark.extra_info |= {
            "case": case,
            "calls": own_calls,
            "others": times,
            "memory": memory or {},
            "items": items,
            "headline": headline,
            "threads": torch.get_num_threads(),
        }

    return race
