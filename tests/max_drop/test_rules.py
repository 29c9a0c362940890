"""The rules of `--max-drop` on curves whose answer is known.

Without these tests, the search could stop at a size twice as large as needed, accept a model that
exceeds the limit, try a size twice, or never end.
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

MIN_RATIO = 0.01
Curve = Callable[[float], float]


def divergence(ratio: float) -> float:
    """As measured: 0.002 nats at 0.7, and e times as much for every seventh of the cost."""
    return 0.002 * math.exp(7 * (0.7 - ratio))


def search(
    drop: Curve, max_drop: float, min_ratio: float = MIN_RATIO, kl: Curve = divergence
) -> list[Trial]:
    """All trials of a search."""
    trials: list[Trial] = []
    while (ratio := next_ratio(trials, max_drop, min_ratio)) is not None:
        assert ratio not in [trial.ratio for trial in trials]
        assert min_ratio <= ratio <= largest_ratio(min_ratio) < 1
        trials.append(Trial(ratio, drop(ratio), kl(ratio)))
        assert len(trials) <= MAX_TRIALS + 1
    return trials


def answer(drop: Curve, max_drop: float, min_ratio: float = MIN_RATIO) -> float:
    best = smallest_within_limit(search(drop, max_drop, min_ratio), max_drop)
    assert best is not None
    assert best.drop <= max_drop + 1e-9
    return best.ratio


CURVES: dict[str, Curve] = {
    "proportional to the divergence": lambda ratio: 23 * divergence(ratio),
    "slowly": lambda ratio: 5 * divergence(ratio),
    "quadratic": lambda ratio: 8 * (1 - ratio) ** 2,
    "linear": lambda ratio: 10 * (1 - ratio),
    "not before 0.45": lambda ratio: max(0.0, 30 * (0.45 - ratio)),
    "better at first": lambda ratio: 23 * divergence(ratio) - 0.4,
}


@pytest.mark.parametrize("max_drop", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", CURVES)
def test_smooth_curves_take_a_few_trials(name: str, max_drop: float) -> None:
    curve = CURVES[name]
    truth = min(r / 1000 for r in range(10, 951) if curve(r / 1000) <= max_drop + 1e-6)
    assert answer(curve, max_drop) - truth <= 3 * RESOLUTION
    usual = name == "proportional to the divergence" and max_drop < 2
    assert len(search(curve, max_drop)) <= (3 if usual else MAX_TRIALS)


@pytest.mark.parametrize("max_drop", [0.0, 1.0])
@pytest.mark.parametrize("edge", [0.15, 0.3, 0.6, 0.7, 0.9])
def test_a_step_is_found(edge: float, max_drop: float) -> None:
    assert edge <= answer(lambda ratio: 0.0 if ratio >= edge else 40.0, max_drop) <= edge + 0.06


@pytest.mark.parametrize("min_ratio", [MIN_RATIO, 0.0137, 0.97])
def test_if_nothing_is_lost_the_smallest_ratio_is_tried_exactly(min_ratio: float) -> None:
    """Rounded down to two decimals it could not be met."""
    assert answer(lambda _: 0.0, 1.0, min_ratio) == min_ratio
    assert len(search(lambda _: 0.0, 1.0, min_ratio)) <= 3


def test_if_too_much_is_always_lost_the_largest_ratio_is_tried() -> None:
    for drop in (1.5, 5.0, 50.0):
        trials = search(lambda _, drop=drop: drop, 1.0)  # type: ignore[misc]
        assert trials[-1].ratio == 0.95
        assert len(trials) <= 4
        assert smallest_within_limit(trials, 1.0) is None
    trials = search(lambda _: 5.0, 1.0, min_ratio=0.97)
    assert [trial.ratio for trial in trials] == [0.98, 0.99]


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
def test_monotone_drops_rise_with_the_divergence_and_keep_their_mean(
    numbers: list[tuple[float, float, float]],
) -> None:
    trials = [Trial(*values) for values in numbers]
    fitted = monotone_drops(trials)
    by_divergence = sorted(trials, key=lambda trial: (trial.divergence, -trial.ratio))
    values = [fitted[trial.ratio] for trial in by_divergence]
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
def test_with_noise_the_answer_was_measured_within_the_limit(
    seed: int, name: str, max_drop: float, min_ratio: float, noise: float
) -> None:
    generator = random.Random(seed)

    def noisy(ratio: float) -> float:
        return CURVES[name](ratio) + generator.gauss(0, noise)

    trials = search(noisy, max_drop, min_ratio)
    best = smallest_within_limit(trials, max_drop)
    if best is None:
        assert max(trial.ratio for trial in trials) == largest_ratio(min_ratio)
    else:
        assert best.drop <= max_drop + 1e-9


@pytest.mark.parametrize("layers", [6, 12, 30])
@pytest.mark.parametrize("max_drop", [0.5, 2.0])
@pytest.mark.parametrize("name", CURVES)
def test_no_set_of_whole_layers_is_tried_twice(name: str, max_drop: float, layers: int) -> None:
    """A ratio between two sizes gives the smaller one again."""
    sizes = [n / layers for n in range(1, layers)]
    trials: list[Trial] = []
    step, min_ratio = 1 / layers, math.ceil(1e4 / layers) / 1e4
    while (ratio := next_ratio(trials, max_drop, min_ratio, step)) is not None:
        size = max(one for one in sizes if one <= ratio + 1e-12)
        trials.append(Trial(ratio, CURVES[name](size), divergence(size), 0.0, size))
    tried = [trial.size for trial in trials]
    assert len(set(tried)) == len(tried) <= MAX_TRIALS
    tried_at_most = [size for size in sizes if size <= largest_ratio(min_ratio)]
    within = [size for size in tried_at_most if CURVES[name](size) <= max_drop]
    best = smallest_within_limit(trials, max_drop)
    if best is None:
        assert not within
    else:
        assert best.size - min(within) <= 3 * RESOLUTION


def test_a_better_score_at_a_larger_divergence_is_noise() -> None:
    """0.4 alone is within the limit, but 0.5, nearer to the original, is not: the mean is 1.4."""
    unlucky, lucky = Trial(0.5, 1.9, 0.01), Trial(0.4, 0.9, 0.02)
    near = Trial(0.7, 0.2, 0.002)
    assert monotone_drops([lucky, near, unlucky]) == {0.7: 0.2, 0.5: 1.4, 0.4: 1.4}
    assert smallest_within_limit([near, unlucky, lucky], 1.0) == near
    assert smallest_within_limit([near, lucky], 1.0) == lucky
    assert smallest_within_limit([near, unlucky, lucky], 1.4) == lucky


def test_monotone_drops_decide_the_next_ratio() -> None:
    """0.36 scores higher than 0.5, so both count with the mean of their drops."""

    def after(*drops: float) -> float | None:
        ratios = (0.5, 0.36)
        trials = [Trial(r, drop, divergence(r)) for r, drop in zip(ratios, drops, strict=True)]
        return next_ratio(trials, 1.0, MIN_RATIO)

    assert after(0.8, 0.0) == after(0.4, 0.4) != after(0.0, 0.0)


@pytest.mark.parametrize("kl", [lambda _: 0.0, lambda ratio: ratio], ids=["zero", "falling"])
def test_divergences_without_information_do_no_harm(kl: Curve) -> None:
    trials = search(lambda ratio: 0.0 if ratio >= 0.4 else 3.0, 1.0, kl=kl)
    best = smallest_within_limit(trials, 1.0)
    assert best is None or best.ratio >= 0.4
    assert kl(1.0) > 0 or best is not None
