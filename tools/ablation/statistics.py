"""Is a variant better? Differences that are paired by seed, with an exact test and interval.

The sign-flip test: without an effect, each difference could as well have the other sign (the errors
are symmetric; they need not be normal). With n pairs there are 2^n assignments of signs, so no
two-sided p is below 2 / 2^n. The interval holds all effects that this test does not reject. Its ends
are means of subsets of the differences ("Using subsample values as typical values", Hartigan, 1969):
the truth lies between two neighbours of the 2^n - 1 sorted means with probability 1 / 2^n.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEAST_PAIRS = 6  # with fewer no p is below 0.05
LEVEL = 0.95
_MOST_EXACT = 16  # pairs; with more, subsets and signs are drawn at random
_DRAWS = 2**_MOST_EXACT


@dataclass(frozen=True)
class Difference:
    """What n paired differences say of their mean.

    interval: of LEVEL, exact; None with fewer than LEAST_PAIRS. bca: the BCa bootstrap interval,
    which is too short for few pairs; None where it is not defined. p: two-sided; None without pairs.
    """

    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None
    bca: tuple[float, float] | None
    p: float | None

    @property
    def is_claim(self) -> bool:
        """Whether a difference from 0 may be claimed."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(values: Sequence[float]) -> Difference:
    """The statistics of n paired differences; n must be at least 1."""
    differences = np.asarray(values, dtype=np.float64)
    interval = bca = p = None
    if len(values) >= LEAST_PAIRS:
        low, high = exact_interval(differences)
        interval = (float(low), float(high))
    if len(values) > 1:
        p = sign_flip_p(differences)
        bca = _bca_interval(differences)
    return Difference(tuple(differences.tolist()), float(differences.mean()), interval, bca, p)


def sign_flip_p(differences: NDArray[np.float64]) -> float:
    """The two-sided p of the sign-flip test of the mean; exact up to 16 pairs."""
    result = stats.permutation_test(
        (differences,),
        lambda values, axis: values.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_DRAWS,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def exact_interval(differences: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ends, [...] each, of the effects that the sign-flip test of differences [..., n] does not
    reject; n must be at least LEAST_PAIRS.
    """
    means = np.sort(_subset_means(differences))
    # the largest k with 2 k / (number of means + 1) <= 1 - LEVEL
    k = int((1 - LEVEL) / 2 * (means.shape[-1] + 1) + 1e-9)
    return means[..., k - 1], means[..., -k]


def _subset_means(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """The means of all subsets of [..., n] but the empty one."""
    n = differences.shape[-1]
    if n <= _MOST_EXACT:
        chosen = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
    else:
        chosen = np.random.default_rng(0).integers(0, 2, (_DRAWS - 1, n))
        chosen = chosen[chosen.any(1)]
    return differences @ chosen.T / chosen.sum(1)


def _bca_interval(differences: NDArray[np.float64]) -> tuple[float, float] | None:
    if np.ptp(differences) == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (differences,),
            np.mean,
            confidence_level=LEVEL,
            method="BCa",
            n_resamples=9999,
            rng=np.random.default_rng(0),
        )
    low, high = result.confidence_interval
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None
