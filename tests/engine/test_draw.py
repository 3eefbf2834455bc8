"""The compiled draw equals its numpy twin on every instruction set, whatever the distribution."""

from __future__ import annotations

import numpy as np
import pytest

from ov_kvcrush import native
from ov_kvcrush.engine.draw import Drawn, DrawParams, draw, draw_rows, noise_key

ISAS = native.info()["isas"] if native.available() else []


def random_case(seed: int) -> tuple[np.ndarray, DrawParams]:
    """Logits from flat to peaked, of sizes around whole blocks, half of them with many ties; any limits."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 3, 63, 64, 65, 128, 1000, 20_000]))
    logits = rng.normal(size=size) * rng.choice([0, 0.1, 1, 3, 8, 50]) + rng.choice([0, -1000, 1000])
    if rng.random() < 0.5:
        logits = np.round(logits * 8) / 8  # as bf16 gives them
    if rng.random() < 0.3:
        logits[rng.random(size) < 0.9] = -np.inf
        logits[rng.integers(size)] = 1000
    params = DrawParams(
        temperature=float(rng.choice([0, 1e-300, 0.01, 0.5, 1, 3, 100])),
        top_k=int(rng.choice([0, 0, 1, 5, 300, 10**9])),
        top_p=float(rng.choice([0.01, 0.5, 0.9, 0.99, 1])),
        min_p=float(rng.choice([0, 0, 0.001, 0.1, 0.9])),
        key=noise_key(seed, 0, 1),
        num_logprobs=int(rng.integers(0, 6)),
    )
    return logits.astype(np.float32), params


@pytest.mark.parametrize("isa", ISAS)
def test_compiled_equals_numpy(isa: str) -> None:
    for seed in range(600):
        logits, params = random_case(seed)
        expected = draw(logits, params)
        got = Drawn(*native.load().draw_rows([logits], [params], isa)[0])
        assert got.token == expected.token, (seed, params)
        assert [token for token, _ in got.top] == [token for token, _ in expected.top], (seed, params)
        # Rounding decides where a nucleus ends if equal tokens reach top_p exactly.
        near = [draw(logits, params._replace(top_p=min(params.top_p * f, 1))).logprob for f in (1, 1 - 1e-6, 1 + 1e-6)]
        assert min(abs(got.logprob - x) for x in near) <= 2e-6, (seed, params)
        np.testing.assert_allclose([x for _, x in got.top], [x for _, x in expected.top], atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_flat_nucleus_of_a_large_vocabulary(isa: str) -> None:
    """More tokens in the nucleus than any sort of a few candidates would see."""
    logits = np.random.default_rng(0).normal(size=(8, 50_001)).astype(np.float32)
    params = [DrawParams(2.0, 0, 0.95, 0.0, noise_key(seed, 0, 0), 0) for seed in range(len(logits))]
    got = [Drawn(*drawn) for drawn in native.load().draw_rows(list(logits), params, isa)]
    expected = [draw(row, p) for row, p in zip(logits, params, strict=True)]
    assert [drawn.token for drawn in got] == [drawn.token for drawn in expected]
    np.testing.assert_allclose([d.logprob for d in got], [d.logprob for d in expected], atol=1e-5)


def test_a_drawn_token_has_the_probability_that_it_was_drawn_with() -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    logits = (2 * np.log(probs)).astype(np.float32)
    limits = {  # what is left of the four: top_k, top_p, min_p
        (0, 1.0, 0.0): 4, (3, 1.0, 0.0): 3, (0, 0.6, 0.0): 2, (0, 1.0, 0.3): 3, (3, 0.5, 0.0): 2, (0, 0.95, 0.6): 2,
    }  # fmt: skip
    for (top_k, top_p, min_p), left in limits.items():
        seen = set()
        for seed in range(40):
            params = DrawParams(2.0, top_k, top_p, min_p, noise_key(seed, 0, 0), 0)
            found = draw(logits, params)
            assert found.logprob == pytest.approx(np.log(probs[found.token] / probs[:left].sum()), abs=1e-6)
            seen.add(found.token)
        assert seen == set(range(left))


@pytest.mark.skipif(not ISAS, reason="no compiled module")
def test_rows_do_not_touch_each_other() -> None:
    cases = [random_case(seed) for seed in range(40)]
    rows, params = [row for row, _ in cases], [p for _, p in cases]
    assert draw_rows(rows, params) == [draw_rows([row], [p])[0] for row, p in cases]


def test_masked_tokens_are_as_if_they_were_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their mass does not count for top-p, they are none of the top-k, and have no log probability."""
    rng = np.random.default_rng(0)
    cases = [random_case(seed) for seed in range(200)]
    masks: list[np.ndarray | None] = []
    for row, _ in cases:
        bits = rng.choice([0, -1, rng.integers(-(2**31), 2**31)], size=-(-len(row) // 32) + rng.integers(2))
        masks.append(bits.astype(np.int32) if rng.random() < 0.8 else None)
    expected = []
    for (row, params), mask in zip(cases, masks, strict=True):
        allowed = np.ones(len(row), bool)
        if mask is not None:
            allowed = np.array([mask[token // 32] >> (token % 32) & 1 for token in range(len(row))], bool)
        expected.append(draw(np.where(allowed, row, np.float32(-np.inf)), params))
    rows, params = [row for row, _ in cases], [p for _, p in cases]
    before = [row.copy() for row in rows]
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "available", lambda: False)
        got = draw_rows(rows, params, masks)
        assert [d.token for d in got] == [d.token for d in expected]
        assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(got, expected, strict=True))
    for row, was in zip(rows, before, strict=True):
        np.testing.assert_array_equal(row, was)


@pytest.mark.skipif(not ISAS, reason="no compiled module")
@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ([np.zeros(1, np.int32)], "masks must be as many as rows"),
        ([np.zeros(1, np.int32)] * 2, "masks must have a bit for each logit"),
        ([np.zeros(2, np.int64)] * 2, "masks must be an array of int32"),
    ],
)
def test_bad_masks_are_refused(masks: list[np.ndarray], words: str) -> None:
    rows, params = [np.zeros(33, np.float32)] * 2, [DrawParams(1, 0, 1, 0, 0, 0)] * 2
    with pytest.raises(ValueError, match=words):
        native.load().draw_rows(rows, params, masks=masks)


@pytest.mark.skipif(not ISAS, reason="no compiled module")
@pytest.mark.parametrize(
    ("rows", "params", "words"),
    [
        ([np.zeros(3)], [DrawParams(1, 0, 1, 0, 0, 0)], "rows must be an array of float32"),
        ([np.zeros((2, 3), np.float32)], [DrawParams(1, 0, 1, 0, 0, 0)], "rows must have shape"),
        ([np.zeros(6, np.float32)[::2]], [DrawParams(1, 0, 1, 0, 0, 0)], "rows must be contiguous"),
        ([np.zeros(3, np.float32)], [], "params must be as many as rows"),
        ([np.zeros(3, np.float32)], [DrawParams(-1, 0, 1, 0, 0, 0)], "temperature must be at least 0"),
        ([np.zeros(3, np.float32)], [DrawParams(1, -1, 1, 0, 0, 0)], "top_k must be at least 0"),
    ],
)
def test_bad_arguments_are_refused(rows: list[np.ndarray], params: list[DrawParams], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        native.load().draw_rows(rows, params)


@pytest.mark.parametrize("bad", [np.full(70, -np.inf), np.full(70, np.nan)], ids=["banned", "nan"])
def test_no_token_where_none_is_possible(bad: np.ndarray) -> None:
    for top_k, temperature in ((0, 0.0), (0, 1.0), (5, 1.0)):
        params = DrawParams(temperature, top_k, 0.9, 0.0, 1, 3)
        logits = bad.astype(np.float32)
        assert draw(logits, params).token == -1
        for isa in ISAS:
            assert native.load().draw_rows([logits], [params], isa)[0][0] == -1
