"""Search strategy: proposals and convergence."""

import itertools

from dcnv3_tvm.tuning.search import Search, decisions_key

SPACE = {"rows": (4, 1, 2, 8), "order": ("a", "b"), "unroll": (1, 2, 4)}


def seconds(decisions):
    return 1.0 + abs(decisions["rows"] - 2) + (decisions["order"] == "a") + decisions["unroll"] / 8


def test_default_is_first_and_none_is_proposed_twice():
    search = Search(SPACE)
    seen = []
    while proposals := search.propose(5):
        for decisions in proposals:
            seen.append(decisions_key(decisions))
            search.tell(decisions, seconds(decisions))
    assert seen[0] == decisions_key({"rows": 4, "order": "a", "unroll": 1})
    assert len(seen) == len(set(seen)) == 24


def test_known_schedules_are_not_proposed():
    search = Search(SPACE)
    for values in itertools.product(*SPACE.values()):
        decisions = dict(zip(SPACE, values, strict=True))
        if decisions != {"rows": 8, "order": "b", "unroll": 4}:
            search.tell(decisions, None)
    assert search.propose(3) == [{"rows": 8, "order": "b", "unroll": 4}]
    assert search.propose(3) == []


def test_best_schedule_of_large_space_is_found():
    space = {f"d{index}": tuple(range(8)) for index in range(6)}
    optimum = {f"d{index}": (5 * index + 3) % 8 for index in range(6)}
    search = Search(space)
    for _ in range(40):
        for decisions in search.propose(10):
            search.tell(decisions, 1 + sum(abs(decisions[n] - optimum[n]) for n in space))
    assert search.best[0] == (optimum, 1)


def test_failed_schedules_are_not_among_best():
    search = Search(SPACE)
    first, second, *_ = search.propose(4)
    search.tell(first, None)
    search.tell(second, 2.0)
    assert search.best == [(second, 2.0)]
    assert search.seconds(first) is None
    assert search.is_known(first)
    assert not search.is_known({"rows": 8, "order": "b", "unroll": 4})
