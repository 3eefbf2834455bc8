"""What a plan will cost, by the plans that were measured on the texts of a profile.

Plans are placed by their settled size: bytes of a token that left the recent window, all heads together, over those of
bf16. Unlike the size of a whole cache it does not depend on the length of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ov_kvcrush.policies.plans.profile import KVProfile, Rung

_KEEP = 0.9  # of the texts keep a quality that is asked for
FEWEST_TEXTS = 9  # of a profile, for that to be so: the largest of n bounds n / (n + 1) of the texts to come
_LEAST = 1e-5  # nats


def nearest_rung(profile: KVProfile, settled: float) -> Rung | None:
    """The measured plan closest in size; None if there is none."""
    return min(profile.rungs, key=lambda rung: abs(np.log(rung.of_bf16 / settled)), default=None)


def predicted_kl(profile: KVProfile, settled: float) -> float | None:
    """Median over texts of the KL divergence of a plan of this size, interpolated; None without measured plans."""
    if not profile.rungs:
        return None
    sizes, values = _curve(profile, lambda kl: float(np.median(kl)))
    return float(np.exp(np.interp(np.log(settled), sizes, values)))


def settled_for(profile: KVProfile, quality: float) -> float:
    """The smallest settled size at which nine of ten new texts are predicted to have a KL divergence of `quality`.

    The bound of split conformal prediction (Vovk et al., "Algorithmic Learning in a Random World", 2005): a new text
    is below the k-th smallest of n like it with a probability of k / (n + 1). With fewer than FEWEST_TEXTS that is
    below 0.9 for the largest, which stands then.
    Above all that was measured it is the largest measured size, below all the smallest.
    """
    sizes, values = _curve(profile, _bound)
    return float(np.exp(np.interp(-np.log(max(quality, _LEAST)), -values, sizes)))


def _bound(kl: np.ndarray) -> float:
    return float(np.sort(kl)[min(math.ceil(_KEEP * (len(kl) + 1)), len(kl)) - 1])


def _curve(profile: KVProfile, of_texts: Callable[[np.ndarray], float]) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of sizes, ascending, and of KL divergences, which never rise with size."""
    rungs = sorted(profile.rungs, key=lambda rung: rung.of_bf16)
    sizes = np.log([rung.of_bf16 for rung in rungs])
    values = np.log([max(of_texts(rung.kl), _LEAST) for rung in rungs])
    return sizes, np.minimum.accumulate(values)
