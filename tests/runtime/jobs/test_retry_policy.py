"""How often, and how soon, a job is tried again."""

from runtime.jobs.retry_policy import RetryPolicy


def test_backoff_doubles_up_to_its_maximum_until_the_retries_are_used() -> None:
    policy = RetryPolicy(retries=4, initial_backoff_s=1, backoff_max_s=5)
    assert [policy.backoff_s(failures) for failures in range(6)] == [1, 2, 4, 5, None, None]


def test_retries_come_on_top_of_the_starts_that_are_allowed() -> None:
    policy = RetryPolicy(retries=2, starts_max=3)
    assert [policy.allows_start(starts) for starts in (1, 5, 6)] == [True, True, False]
