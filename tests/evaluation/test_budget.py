"""A budget is never passed, whoever asks at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from viscpm_hf.evaluation.budget import Budget, BudgetSpentError, Limits, Usage


MOST = Usage(1, 100, 20)


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        (Limits(), 10),
        (Limits(max_requests=3), 3),
        (Limits(max_tokens=360), 3),
        (Limits(max_tokens=359), 2),
        (Limits(max_cost=0.0003, prompt_price=1.0, completion_price=2.5), 2),
    ],
)
def test_what_fits(limits, count):
    budget = Budget(limits)
    done = 0
    for _ in range(10):
        try:
            granted = budget.reserve(MOST)
        except BudgetSpentError:
            break
        budget.settle(granted, MOST)
        done += 1
    assert done == count
    assert budget.spent == Usage(count, 100 * count, 20 * count)


def test_earlier_runs_count():
    with pytest.raises(BudgetSpentError, match="2 requests"):
        Budget(Limits(max_requests=2), Usage(2)).reserve(MOST)


def test_fewer_retries_where_not_all_are_left():
    budget = Budget(Limits(max_requests=5))
    assert budget.reserve(Usage(4)).requests == 4
    assert budget.reserve(Usage(4)).requests == 1


def test_waits_for_what_running_requests_leave():
    """What was set aside for a request and not used is for the next one."""
    budget = Budget(Limits(max_tokens=150))
    granted = budget.reserve(MOST)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(budget.reserve, MOST)
        budget.settle(granted, Usage(1, 20, 5))
        assert waiting.result(timeout=10) == MOST


def test_closing_wakes_who_waits():
    budget = Budget(Limits(max_requests=1))
    budget.reserve(MOST)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(budget.reserve, MOST)
        budget.close()
        with pytest.raises(BudgetSpentError):
            waiting.result(timeout=10)


def test_never_passed_by_many_threads():
    budget = Budget(Limits(max_requests=40, max_tokens=3000))
    spent = []

    def work():
        while True:
            try:
                granted = budget.reserve(MOST)
            except BudgetSpentError:
                return
            used = Usage(1, 60, 10)
            spent.append(used)
            budget.settle(granted, used)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(spent, Usage()) == budget.spent
    assert budget.spent.requests <= 40 and budget.spent.tokens <= 3000
    assert budget.spent.requests == 40 or budget.spent.tokens > 3000 - MOST.tokens


def test_cost_needs_prices():
    with pytest.raises(ValueError, match="both prices"):
        Limits(max_cost=1.0)
    assert Limits(prompt_price=2.0, completion_price=10.0).cost(Usage(1, 1_000_000, 100_000)) == 3.0
    assert Limits().cost(Usage(1, 5, 5)) is None
