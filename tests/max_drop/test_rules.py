"""The search of `--max-drop` on curves whose answer is known.

Deleting this lets the search stop at a size that is twice what was needed, call a model within the
limit that is not, try a size twice, or go on for ever.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.max_drop.rules import (
    MAX_TRIALS,
    RESOLUTION,
    Trial,
    largest_ratio,
    monotone_drops,
    next_ratio,
    smallest_within_limit,
)

LEAST = 0.01
Curve = Callable[[float], float]


def divergence(ratio: float) -> float:
    """As measured: 0.002 nats at 0.7, and e times as much every seventh of the cost."""
    return 0.002 * math.exp(7 * (0.7 - ratio))


def search(drop: Curve, points: float, least: float = LEAST) -> list[Trial]:
    """All trials of a search."""
    trials: list[Trial] = []
    while (ratio := next_ratio(trials, points, least)) is not None:
        assert ratio not in [trial.ratio for trial in trials]
        assert least <= ratio <= largest_ratio(least) < 1
        trials.append(Trial(ratio, drop(ratio), divergence(ratio)))
        assert len(trials) <= MAX_TRIALS + 1
    return trials


def found(drop: Curve, points: float, least: float = LEAST) -> float | None:
    best = smallest_within_limit(search(drop, points, least), points)
    return None if best is None else best.ratio


CURVES: dict[str, Curve] = {
    "proportional to the divergence": lambda ratio: 23 * divergence(ratio),
    "slowly": lambda ratio: 5 * divergence(ratio),
    "quadratic": lambda ratio: 8 * (1 - ratio) ** 2,
    "linear": lambda ratio: 10 * (1 - ratio),
    "not before 0.45": lambda ratio: max(0.0, 30 * (0.45 - ratio)),
    "better at first": lambda ratio: 23 * divergence(ratio) - 0.4,
}


@pytest.mark.parametrize("points", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", CURVES)
def test_smooth_curves_are_followed_in_a_few_probes(name: str, points: float) -> None:
    curve = CURVES[name]
    trials = search(curve, points)
    best = smallest_within_limit(trials, points)
    assert best is not None
    assert best.drop <= points + 1e-9
    truth = min(r / 1000 for r in range(10, 951) if curve(r / 1000) <= points + 1e-6)
    assert best.ratio - truth <= 3 * RESOLUTION
    assert len(trials) <= MAX_TRIALS


def test_the_usual_case_takes_three_probes() -> None:
    curve = CURVES["proportional to the divergence"]
    assert [len(search(curve, points)) for points in (0.5, 1.0)] == [3, 3]


@pytest.mark.parametrize("edge", [0.15, 0.3, 0.7, 0.9])
def test_a_cliff_is_closed_in_on(edge: float) -> None:
    best = found(lambda ratio: 0.0 if ratio >= edge else 40.0, 1.0)
    assert best is not None
    assert edge <= best <= edge + 0.06


def test_what_loses_nothing_ends_at_the_least_that_is_possible() -> None:
    trials = search(lambda _: 0.0, 1.0)
    assert trials[-1].ratio == LEAST
    assert len(trials) == 3
    assert smallest_within_limit(trials, 1.0) == trials[-1]


def test_what_always_loses_too_much_ends_at_the_largest() -> None:
    for drop in (1.5, 5.0, 50.0):
        trials = search(lambda _, drop=drop: drop, 1.0)  # type: ignore[misc]
        assert trials[-1].ratio == 0.95
        assert len(trials) <= 4
        assert smallest_within_limit(trials, 1.0) is None


def test_where_most_is_never_pruned_there_is_still_something_to_try() -> None:
    assert found(lambda _: 0.0, 1.0, least=0.97) == 0.97
    trials = search(lambda _: 5.0, 1.0, least=0.97)
    assert [trial.ratio for trial in trials] == [0.98, 0.99]


def test_no_point_at_all_may_be_asked_for() -> None:
    best = found(lambda ratio: 0.0 if ratio >= 0.6 else 1.0, 0.0)
    assert best is not None
    assert 0.6 <= best <= 0.65


def test_the_least_is_asked_for_as_it_is_said() -> None:
    """Rounded to two decimals it would be refused."""
    assert found(lambda _: 0.0, 1.0, least=0.0137) == 0.0137


@given(
    st.lists(
        st.tuples(
            st.integers(1, 99).map(lambda n: n / 100),
            st.floats(-3, 30, allow_nan=False),
            st.floats(0, 5, allow_nan=False),
        ),
        unique_by=lambda trial: trial[0],
    )
)
def test_counted_drops_rise_with_the_divergence_and_keep_their_mean(
    numbers: list[tuple[float, float, float]],
) -> None:
    trials = [Trial(*values) for values in numbers]
    counted = monotone_drops(trials)
    by_divergence = sorted(trials, key=lambda trial: (trial.divergence, -trial.ratio))
    values = [counted[trial.ratio] for trial in by_divergence]
    assert values == sorted(values)
    assert sum(values) == pytest.approx(sum(trial.drop for trial in trials), abs=1e-6)
    drops = [trial.drop for trial in by_divergence]
    if drops == sorted(drops):
        assert values == drops


@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(CURVES)),
    st.floats(0, 3),
    st.sampled_from([0.01, 0.0137, 0.3, 0.62, 0.9, 0.99]),
    st.floats(0, 2),
)
def test_noise_never_breaks_the_promise_or_the_search(
    seed: int, name: str, points: float, least: float, noise: float
) -> None:
    """Whatever the scores are, the model that is chosen has been seen to keep the limit."""
    generator = random.Random(seed)

    def noisy(ratio: float) -> float:
        return CURVES[name](ratio) + generator.gauss(0, noise)

    trials = search(noisy, points, least)
    best = smallest_within_limit(trials, points)
    if best is None:
        assert max(trial.ratio for trial in trials) == largest_ratio(least)
    else:
        assert best.drop <= points + 1e-9


def test_a_score_that_is_better_further_from_the_original_is_taken_for_luck() -> None:
    """0.4 looks good enough, but 0.5, nearer to the original, is not: together they lose 1.4."""
    unlucky, lucky = Trial(0.5, 1.9, 0.01), Trial(0.4, 0.9, 0.02)
    near = Trial(0.7, 0.2, 0.002)
    assert monotone_drops([lucky, near, unlucky]) == {0.7: 0.2, 0.5: 1.4, 0.4: 1.4}
    assert smallest_within_limit([near, unlucky, lucky], 1.0) == near
    assert smallest_within_limit([near, lucky], 1.0) == lucky
    assert smallest_within_limit([near, unlucky, lucky], 1.4) == lucky


def test_the_search_is_led_by_counted_drops() -> None:
    """0.36 scores higher than 0.5: the divergence says that neither is as good as it looks."""
    trials = [Trial(0.5, 0.8, divergence(0.5)), Trial(0.36, 0.0, divergence(0.36))]
    honest = [Trial(0.5, 0.4, divergence(0.5)), Trial(0.36, 0.4, divergence(0.36))]
    assert next_ratio(trials, 1.0, LEAST) == next_ratio(honest, 1.0, LEAST)
    alone = [Trial(0.5, 0.0, divergence(0.5)), Trial(0.36, 0.0, divergence(0.36))]
    assert next_ratio(alone, 1.0, LEAST) != next_ratio(honest, 1.0, LEAST)


@pytest.mark.parametrize("kl", [lambda _: 0.0, lambda ratio: ratio], ids=["zero", "falling"])
def test_divergences_that_say_nothing_do_no_harm(kl: Curve) -> None:
    trials: list[Trial] = []
    while (ratio := next_ratio(trials, 1.0, LEAST)) is not None:
        trials.append(Trial(ratio, 0.0 if ratio >= 0.4 else 3.0, kl(ratio)))
        assert len(trials) <= MAX_TRIALS + 1
    best = smallest_within_limit(trials, 1.0)
    assert best is None or best.ratio >= 0.4
    assert kl(1.0) > 0 or best is not None
