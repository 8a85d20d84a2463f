"""Which schedules are proposed, and that the best is found."""

import itertools

from dcnv3_tvm.tuning.search import Search, key_of

SPACE = {"rows": (4, 1, 2, 8), "order": ("a", "b"), "unroll": (1, 2, 4)}


def seconds(decisions):
    return 1.0 + abs(decisions["rows"] - 2) + (decisions["order"] == "a") + decisions["unroll"] / 8


def test_the_default_comes_first_and_nothing_twice():
    search = Search(SPACE)
    seen = []
    while proposals := search.propose(5):
        for decisions in proposals:
            seen.append(key_of(decisions))
            search.tell(decisions, seconds(decisions))
    assert seen[0] == key_of({"rows": 4, "order": "a", "unroll": 1})
    assert len(seen) == len(set(seen)) == 24


def test_what_an_earlier_session_tried_is_not_proposed():
    search = Search(SPACE)
    for values in itertools.product(*SPACE.values()):
        decisions = dict(zip(SPACE, values, strict=True))
        if decisions != {"rows": 8, "order": "b", "unroll": 4}:
            search.tell(decisions, None)
    assert search.propose(3) == [{"rows": 8, "order": "b", "unroll": 4}]
    assert search.propose(3) == []


def test_the_best_is_found_in_a_large_space():
    space = {f"d{index}": tuple(range(8)) for index in range(6)}
    target = {f"d{index}": (5 * index + 3) % 8 for index in range(6)}
    search = Search(space)
    for _ in range(40):
        for decisions in search.propose(10):
            search.tell(decisions, 1 + sum(abs(decisions[n] - target[n]) for n in space))
    best, time = search.best[0]
    assert (best, time) == (target, 1)


def test_what_does_not_work_is_not_among_the_best():
    search = Search(SPACE)
    first, second, *_ = search.propose(4)
    search.tell(first, None)
    search.tell(second, 2.0)
    assert search.best == [(second, 2.0)]
    assert search.seconds(first) is None
    assert search.knows(first)
    assert not search.knows({"rows": 8, "order": "b", "unroll": 4})
