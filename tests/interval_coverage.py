"""How often the intervals of tools/ablate.py cover the truth: python -m tests.interval_coverage"""

from __future__ import annotations

import numpy as np

from tools.ablation.statistics import exact_interval, paired_difference


def experiments(noise: str, pairs: int, count: int) -> np.ndarray:
    """Differences [count, pairs] of two runs; noise: of a run, a distribution of NumPy, its scale 0.3."""
    draw = getattr(np.random.default_rng(pairs), noise)
    return draw(0, 0.3, (count, pairs)) - draw(0, 0.3, (count, pairs))


def exact_coverage(errors: np.ndarray, effect: float) -> tuple[float, float]:
    """The shares of experiments whose interval holds a planted effect, and which claim one."""
    low, high = exact_interval(errors + effect)
    return float(((low <= effect) & (effect <= high)).mean()), float(((low > 0) | (high < 0)).mean())


def bca_coverage(errors: np.ndarray, effect: float) -> float:
    intervals = np.array([paired_difference(differences + effect).bca for differences in errors])
    low, high = intervals.T
    return float(((low <= effect) & (effect <= high)).mean())


if __name__ == "__main__":
    print("noise    pairs   exact     BCa  false claims  claims of 0.5   (20,000 experiments, BCa: 500)")
    for noise in ("normal", "laplace"):
        for pairs in (6, 8, 10, 12):
            errors = experiments(noise, pairs, 20_000)
            covered, claims = exact_coverage(errors, 0.5)
            _, false = exact_coverage(errors, 0.0)
            bca = bca_coverage(errors[:500], 0.5)
            print(f"{noise:8} {pairs:5} {covered:7.1%} {bca:7.1%} {false:13.1%} {claims:14.1%}")
