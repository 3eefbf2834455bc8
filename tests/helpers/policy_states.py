"""Help for the tests of policies: the table of all policies, and caches of sequences at a prompt's end and later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.policies.base import CacheState, HeadState, Inputs, Replay


@dataclass(frozen=True)
class Row:
    """A policy that the tests run over: its name, what it needs to see, and a slow, obvious twin of a head's scores.

    slow: None if a test of its own compares it, as its scores depend on settings or on the other heads of the layer.
    """

    name: str
    inputs: Inputs
    slow: Callable[[HeadState], list[float]] | None = None


def slow_keydiff(head: HeadState) -> list[float]:
    def unit(v: list[float]) -> list[float]:
        norm = math.sqrt(sum(x * x for x in v))
        return [x / norm if norm else 0.0 for x in v]

    assert head.keys is not None
    units = [unit([float(x) for x in key]) for key in head.keys]
    mean = unit([sum(u[d] for u in units) for d in range(head.keys.shape[1])])
    return [-sum(a * b for a, b in zip(u, mean, strict=True)) for u in units]


POLICIES = [
    Row("none", Inputs()),
    Row("kvcrush", Inputs(window=16)),
    Row("snapkv", Inputs(window=16)),
    Row("pyramidkv", Inputs(window=16)),
    Row("adakv", Inputs(window=16)),
    Row("kv_compress", Inputs(window=16, reduce="sum_squares")),
    Row("leankv", Inputs(window=16)),
    Row("h2o", Inputs(window=128, state=True)),
    Row("tova", Inputs(window=1)),
    Row("streaming_llm", Inputs(), slow=lambda head: [float(p) for p in head.positions]),
    Row("knorm", Inputs(keys=True), slow=lambda head: [-math.sqrt(sum(float(x) ** 2 for x in k)) for k in head.keys]),
    Row("keydiff", Inputs(keys=True), slow_keydiff),
    Row("expected_attention", Inputs(window=64, keys=True, values=True, queries=True)),
    Row("random", Inputs()),
    Row("rkv", Inputs(window=8, keys=True)),
    Row("kvzip", Inputs(replay=Replay()), slow=lambda head: [max(map(float, column)) for column in head.replayed.T]),
]

D, GROUPS = 8, 3
KINDS = ("random", "ties", "constant", "one head dominates", "one token dominates", "zero attention")


def frozen(array: np.ndarray) -> np.ndarray:
    """The array, which can no longer be written to."""
    array.flags.writeable = False
    return array


def places(rng: np.random.Generator, protected: np.ndarray, size: int | None) -> np.ndarray:
    """int32, ascending: all protected places, and as many more as `size` allows; None = all there are."""
    stays = protected.copy()
    free = np.flatnonzero(~protected)
    stays[free if size is None else rng.choice(free, min(size, len(free)), replace=False)] = True
    return np.flatnonzero(stays).astype(np.int32)


def numbers(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """float32; "ties" and "constant" repeat themselves along the first axis."""
    drawn = rng.normal(size=shape)
    if kind == "ties":
        drawn = np.round(drawn)
    elif kind == "constant" and shape[0]:
        drawn[:] = drawn[:1]
    return frozen(drawn.astype(np.float32))


def attention(rng: np.random.Generator, kind: str, size: int, head: int) -> np.ndarray:
    """float32 (GROUPS, size): softmax over at least these tokens, mean over rows: a query head has 1 or less."""
    logits = 2 * numbers(rng, kind, size, GROUPS).T
    weights = np.exp(logits if kind != "constant" else np.zeros_like(logits))
    if kind == "one token dominates" and size:
        weights[:, size // 3] *= 1e6
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    if kind == "one head dominates":
        weights *= 1e-3**head
    return frozen((weights * (0.0 if kind == "zero attention" else 0.99)).astype(np.float32))


def head_state(rng: np.random.Generator, inputs: Inputs, kind: str, positions: np.ndarray, head: int) -> HeadState:
    """A head with exactly what a policy needs."""
    size = len(positions)
    rows = min(inputs.window, size)
    seen = rng.random(size).astype(np.float32)
    seen[size // 2 :] = 0
    return HeadState(
        positions=frozen(positions),
        attention=attention(rng, kind, size, head) if inputs.window else None,
        keys=numbers(rng, kind, size, D) if inputs.keys else None,
        values=numbers(rng, kind, size, D) if inputs.values else None,
        queries=numbers(rng, kind, rows, GROUPS, D) if inputs.queries else None,
        state=frozen(seen) if inputs.state else None,
        replayed=attention(rng, kind, size, head) if inputs.replay else None,
    )


def cache_state(
    seed: int, inputs: Inputs, kind: str, protected: np.ndarray, heads: Sequence[int], *, answering: bool
) -> CacheState:
    """The cache after a text of len(protected) tokens, the same for the same arguments. heads: KV heads of each layer.

    answering: an earlier choice left heads of different sizes with gaps; else every head holds the whole text.
    """
    rng = np.random.default_rng(seed)
    length = len(protected)
    layers = [
        tuple(
            head_state(
                rng,
                inputs,
                kind,
                places(rng, protected, int(rng.integers(0, length)) if answering else None),
                head,
            )
            for head in range(count)
        )
        for count in heads
    ]
    return CacheState(tuple(layers), length, frozen(protected.copy()))
