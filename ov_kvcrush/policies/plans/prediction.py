"""What a plan will cost, by the plans that were measured on the texts of a profile.

Plans are placed by their settled size: bytes of a token that left the recent window, all heads together, over those of
bf16. Unlike the size of a whole cache it does not depend on the length of the text.
"""

from __future__ import annotations

import numpy as np

from ov_kvcrush.policies.plans.profile import KVProfile, Rung

_QUANTILE = 0.9  # of the texts keep a quality that is asked for
_LEAST = 1e-5  # nats


def nearest_rung(profile: KVProfile, settled: float) -> Rung | None:
    """The measured plan closest in size; None if there is none."""
    return min(profile.rungs, key=lambda rung: abs(np.log(rung.of_bf16 / settled)), default=None)


def predicted_kl(profile: KVProfile, settled: float, quantile: float = 0.5) -> float | None:
    """Quantile over texts of the KL divergence of a plan of this size, interpolated; None without measured plans."""
    if not profile.rungs:
        return None
    sizes, values = _curve(profile, quantile)
    return float(np.exp(np.interp(np.log(settled), sizes, values)))


def settled_for(profile: KVProfile, quality: float) -> float:
    """The smallest settled size at which nine of ten texts are predicted to have a KL divergence of at most `quality`.

    Above all that was measured it is the largest measured size, below all the smallest.
    """
    sizes, values = _curve(profile, _QUANTILE)
    return float(np.exp(np.interp(-np.log(max(quality, _LEAST)), -values, sizes)))


def _curve(profile: KVProfile, quantile: float) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of sizes, ascending, and of KL divergences, which never rise with size."""
    rungs = sorted(profile.rungs, key=lambda rung: rung.of_bf16)
    sizes = np.log([rung.of_bf16 for rung in rungs])
    values = np.log([max(float(np.quantile(rung.kl, quantile)), _LEAST) for rung in rungs])
    return sizes, np.minimum.accumulate(values)
