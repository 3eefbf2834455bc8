"""Sampling without a model: distributions, penalties, limits."""

from __future__ import annotations

import numpy as np
import openvino_genai as ov_genai
import pytest
from covering import covering
from hypothesis import given
from hypothesis import strategies as st

from ov_kvcrush import CrushError, RequestError
from ov_kvcrush.core.request import Request, Sequence
from ov_kvcrush.core.sampling_params import SamplingParams, make_generation_config
from ov_kvcrush.engine.sampler import apply_penalties, exponential_noise, nucleus, sample, softmax

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, -0.5], np.float32)


def sequence(prompt: list[int] | None = None, generated: tuple[int, ...] = (), **params: object) -> Sequence:
    s = Request(0, np.array(prompt or [7]), SamplingParams(**{"max_new_tokens": 10, **params})).sequences[0]  # type: ignore[arg-type]
    for token in generated:
        s.ids.append(token)
    return s


def frequencies(draws: int = 4000, **params: object) -> np.ndarray:
    tokens = [sample(LOGITS, sequence(do_sample=True, seed=seed, **params))[0] for seed in range(draws)]
    counts = np.bincount(tokens, minlength=len(LOGITS))
    return counts / draws


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    assert sample(np.array([0.0, 3.0, 3.0, 1.0], np.float32), sequence())[0] == 1


def test_temperature_zero_is_greedy() -> None:
    assert sample(LOGITS, sequence(do_sample=True, temperature=0.0))[0] == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    expected = softmax(LOGITS.astype(np.float64) / temperature)
    np.testing.assert_allclose(frequencies(temperature=temperature), expected, atol=0.03)


def test_limits_cut_and_renormalise() -> None:
    whole = softmax(LOGITS.astype(np.float64))
    cases = {
        "top_k": (frequencies(top_k=3), [0, 6, 1]),
        "top_p": (frequencies(top_p=float(whole[0] + whole[6] * 0.5)), [0, 6]),
        "min_p": (frequencies(min_p=float(whole[1] / whole[0]) - 1e-6), [0, 6, 1]),
    }
    for name, (got, kept) in cases.items():
        expected = np.zeros_like(whole)
        expected[kept] = whole[kept] / whole[kept].sum()
        np.testing.assert_allclose(got, expected, atol=0.03, err_msg=name)
        assert set(np.flatnonzero(got)) <= set(kept), name


@pytest.mark.parametrize(("spread", "top_p"), covering([0.1, 1.0, 5.0], [0.01, 0.5, 0.9, 0.999, 1.0]))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(spread: float, top_p: float) -> None:
    probs = softmax(np.random.default_rng(0).normal(size=20_000) * spread)
    kept = nucleus(probs, top_p)
    order = np.argsort(-probs)
    expected = order[: int((np.cumsum(probs[order]) < top_p).sum()) + 1]
    assert sorted(kept) == sorted(expected)


@given(st.floats(0.0001, 100), st.integers(0, 8), st.floats(0.001, 1), st.floats(0, 0.99), st.integers(0, 2**32))
def test_any_setting_draws_a_possible_token(t: float, k: int, p: float, min_p: float, seed: int) -> None:
    logits = LOGITS.copy()
    logits[3] = -np.inf
    s = sequence(do_sample=True, temperature=t, top_k=k, top_p=p, min_p=min_p, seed=seed)
    token = sample(logits, s)[0]
    assert 0 <= token < len(logits)
    assert token != 3


def draws_along(s: Sequence, count: int = 30) -> list[int]:
    """Tokens that one sequence draws, step by step, from the same logits."""
    for _ in range(count):
        s.ids.append(sample(LOGITS, s)[0])
    return s.generated.tolist()


def test_draws_depend_on_seed_sequence_and_position_only() -> None:
    one = draws_along(sequence(do_sample=True, seed=5))
    assert draws_along(sequence(do_sample=True, seed=5)) == one
    assert draws_along(sequence(do_sample=True, seed=6)) != one
    assert draws_along(sequence(do_sample=True, seed=5).fork(1)) != one
    assert len(set(one)) > 3


def test_draws_along_a_sequence_follow_the_softmax() -> None:
    tokens = draws_along(sequence(do_sample=True, max_new_tokens=4000), 4000)
    np.testing.assert_allclose(np.bincount(tokens, minlength=8) / 4000, softmax(LOGITS.astype(np.float64)), atol=0.03)


def test_noise_is_exponential_and_uncorrelated() -> None:
    noise = np.stack([exponential_noise(1, 0, position, np.arange(20_000)) for position in range(3)])
    np.testing.assert_allclose(noise.mean(axis=1), 1, atol=0.03)
    np.testing.assert_allclose(noise.std(axis=1), 1, atol=0.03)
    assert np.abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 0.03
    assert abs(np.corrcoef(noise[0, 1:], noise[0, :-1])[0, 1]) < 0.03


def test_rounding_rarely_changes_a_draw() -> None:
    """Noise of 1e-5 in the logits, as between two batches, on a flat distribution over many tokens."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=5000).astype(np.float32)
    changed = 0
    for seed in range(1000):
        s = sequence(do_sample=True, seed=seed)
        other = logits + rng.uniform(-1e-5, 1e-5, len(logits)).astype(np.float32)
        changed += sample(logits, s)[0] != sample(other, s)[0]
    assert changed <= 2


def test_penalties_by_hand() -> None:
    s = sequence([0, 4], (1, 1, 5), repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    expected = LOGITS.copy()
    for token in (0, 1, 4, 5):
        expected[token] = LOGITS[token] / 2 if LOGITS[token] > 0 else LOGITS[token] * 2
    expected[1] -= 0.5 + 2 * 0.25
    expected[5] -= 0.5 + 0.25
    before = LOGITS.copy()
    np.testing.assert_allclose(apply_penalties(LOGITS, s), expected, rtol=1e-6)
    np.testing.assert_array_equal(LOGITS, before)


def test_no_end_before_min_new_tokens() -> None:
    ends = frozenset({0, 6})
    assert sample(LOGITS, sequence(stop_token_ids=ends, min_new_tokens=2))[0] == 1
    assert sample(LOGITS, sequence(generated=(1, 1), stop_token_ids=ends, min_new_tokens=2))[0] == 0
    # All logits below zero: openvino_genai, which sets the end's logit to 0, would choose it.
    assert sample(LOGITS - 100, sequence(stop_token_ids=ends, min_new_tokens=2))[0] == 1


def test_logprob_is_that_of_the_log_softmax() -> None:
    token, logprob = sample(LOGITS, sequence(logprobs=True))
    assert logprob == pytest.approx(np.log(softmax(LOGITS.astype(np.float64)))[token], abs=1e-6)
    assert sample(LOGITS, sequence())[1] == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("min_new_tokens", 11),
        ("num_return_sequences", 2),
        ("stop_strings", ("",)),
    ],
)
def test_bad_params_name_the_field(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{"max_new_tokens": 10, name: value})  # type: ignore[arg-type]


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(CrushError, match="max_new_tokens"):
        make_generation_config(None, {"max_new_token": 3})


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": -1}, {"top_k": -5}, {"temperature": "hot"}, {"max_new_tokens": 1.5}]
)
def test_bad_option_values_name_the_option(options: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        make_generation_config(None, options)


def test_options_leave_the_given_config_alone() -> None:
    base = ov_genai.GenerationConfig(max_new_tokens=5)
    config = make_generation_config(base, {"temperature": 0.5, "do_sample": True})
    assert (base.max_new_tokens, base.do_sample, base.temperature) == (5, False, 1.0)
    assert (config.max_new_tokens, config.do_sample) == (5, True)


def test_lengths_fit_the_room() -> None:
    none = ov_genai.GenerationConfig()
    assert SamplingParams.from_config(none, none, 10, 100).max_new_tokens == 90
    assert SamplingParams.from_config(ov_genai.GenerationConfig(max_new_tokens=500), none, 10, 100).max_new_tokens == 90
    assert SamplingParams.from_config(ov_genai.GenerationConfig(max_length=30), none, 10, 100).max_new_tokens == 20
    with pytest.raises(RequestError, match="max_length"):
        SamplingParams.from_config(ov_genai.GenerationConfig(max_length=10), none, 10, 100)


def test_end_tokens_of_request_and_model() -> None:
    model = ov_genai.GenerationConfig(eos_token_id=2)
    model.stop_token_ids = {2, 9}

    def ends(**options: object) -> frozenset[int]:
        return SamplingParams.from_config(make_generation_config(None, options), model, 1, 100).stop_token_ids

    assert ends() == {2, 9}
    assert ends(eos_token_id=5) == {5}
    assert ends(ignore_eos=True) == set()
    assert ends(ignore_eos=True, stop_token_ids={7}) == {7}
