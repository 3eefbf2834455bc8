"""Prompt lookup: several tokens a step, and the answers, the draws and the cache of one token a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from both_libraries import EXACT
from eviction_runs import F32, add, kv_of, line_of, small, tokens
from lookahead_runs import NEW_TOKENS, AllIn, accepted, answers, ids_of

import ov_kvcrush as ours
from ov_kvcrush import CacheConfig, ContinuousBatchingPipeline, GenerationConfig, LLMPipeline, SchedulerConfig
from ov_kvcrush.core.growable import GrowableArray
from ov_kvcrush.core.request import MAX_DRAFT_TOKENS, Request, Sequence
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.engine.draw import softmax
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.engine.lookahead import drafts
from ov_kvcrush.engine.lookahead.draft_pace import DraftPace
from ov_kvcrush.engine.lookahead.guess import Guess, Odds
from ov_kvcrush.engine.lookahead.prompt_lookup import find_repeated
from ov_kvcrush.engine.token_rounds import SampledRows, sample_each, take_tokens
from ov_kvcrush.model.load import LoadedModel, load_model

U8 = {"key_precision": "u8", "value_precision": "u4"}
WHOLE = {"key_precision": "f32", "value_precision": "f32"}
WRONG = 287  # a token that the tiny model never says by itself


class Misled:
    """Guesses the answer, but for one token of it in every guess."""

    def __init__(self, answers: dict[int, list[int]], num_right: int) -> None:
        self._answers = answers
        self._num_right = num_right

    is_free = True

    def guess(self, sequences: Any, most: Any) -> Iterator[Guess | None]:
        for sequence in sequences:
            right = self._answers[sequence.request.request_id][sequence.num_generated :]
            wrong = [*right[: self._num_right], WRONG, *right[self._num_right :]]
            yield Guess(tuple(wrong[:5]), 1)

    def forget(self, sequence: Any) -> None:
        pass

    def taken(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _all_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on how long a step takes, and batches of any size guess."""
    monkeypatch.setattr(drafts, "DraftPace", AllIn)
    monkeypatch.setattr(drafts, "MAX_ROWS", 1000)


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, "CPU", F32, "crush")


def make_engine(model: LoadedModel, cache: dict[str, Any], lookahead: bool, **scheduler: Any) -> Engine:
    settings = SchedulerConfig(**{"max_num_batched_tokens": 128, "max_step_ms": 0, **scheduler})
    defaults = ov_genai.GenerationConfig()
    return Engine(model, settings, defaults, lambda ids: "", CacheConfig(**cache), prompt_lookup=lookahead)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[list[Any], list[Any]]:
    return answers(ContinuousBatchingPipeline(folder, **EXACT), together=False)


@pytest.mark.parametrize("blocks", [0, 14])
def test_a_batch_says_what_one_token_a_step_says(folder: Path, expected: Any, blocks: int) -> None:
    """With a small cache requests lose their memory meanwhile."""
    config = SchedulerConfig(num_kv_blocks=blocks, max_step_ms=0)
    pipe = ContinuousBatchingPipeline(folder, config, prompt_lookup=True, **EXACT)
    said, handles = answers(pipe, together=True)
    assert said == expected[0]
    num_accepted, num_drafted = accepted(handles)
    assert 0 < num_accepted < num_drafted
    assert (pipe.get_metrics().num_preemptions > 0) == bool(blocks)
    assert pipe.get_metrics().num_used_blocks == 0
    for handle, before in zip(handles, expected[1], strict=True):
        for output, other in zip(handle.outputs(), before.outputs(), strict=True):
            np.testing.assert_allclose(output.generated_log_probs, other.generated_log_probs, atol=1e-3)
            assert len(output.generated_log_probs) == len(output.generated_ids)
    tops, before = (done[1].outputs()[0].top_logprobs for done in (handles, expected[1]))
    assert [sorted(top) for top in tops] == [sorted(top) for top in before]


@pytest.mark.parametrize(
    ("cache", "policy"),
    [
        (WHOLE, None),
        (U8, None),
        (WHOLE, {"name": "snapkv", "window": 8}),
        (WHOLE, {"name": "h2o"}),
        (WHOLE, {"name": "kvcrush", "split": "ada"}),
    ],
)
def test_equal_with_evictions_and_at_the_borders_of_tiles(model: LoadedModel, cache: Any, policy: Any) -> None:
    chosen = small(policy) if policy else None
    found: list[list[Any]] = []
    for lookahead in (False, True):
        engine = make_engine(model, cache, lookahead)
        if engine.drafts:
            engine.drafts._guesser = Misled(dict(enumerate(found[0])), 3)
        handles = [add(engine, i, ids_of(n, i), chosen, NEW_TOKENS) for i, n in enumerate((2, 30, 32, 33, 95))]
        while engine.has_unfinished():
            engine.step()
        found.append([tokens(handle)[0] for handle in handles])
        num_accepted, num_drafted = accepted(handles)
        assert (num_accepted > 3 * NEW_TOKENS and num_drafted > num_accepted) == lookahead
        choices = [handle.request.sequences[0].final_state.num_choices for handle in handles]
        assert (min(choices) > 1) == bool(policy)
        found[-1].append(choices)
    assert found[0] == found[1]


def test_stop_strings_end_an_answer_inside_a_step(folder: Path) -> None:
    plain, ahead = (LLMPipeline(folder, prompt_lookup=lookahead, **EXACT) for lookahead in (False, True))
    text = "the cat sat on the mat, the cat sat on the mat, the cat "
    whole = plain.generate(text, max_new_tokens=60, ignore_eos=True, apply_chat_template=False)
    assert ahead.generate(text, max_new_tokens=60, ignore_eos=True, apply_chat_template=False) == whole
    for begin in range(5, min(len(whole), 40), 7):
        stop = {"max_new_tokens": 60, "stop_strings": {whole[begin : begin + 3]}, "apply_chat_template": False}
        assert ahead.generate(text, **stop) == plain.generate(text, **stop)


def test_chats_streamers_and_metrics(folder: Path) -> None:
    plain, ahead = (LLMPipeline(folder, prompt_lookup=lookahead, **EXACT) for lookahead in (False, True))
    said = []
    for pipe in (plain, ahead):
        pipe.start_chat()
        parts: list[str] = []
        first = pipe.generate("abababab", max_new_tokens=40, ignore_eos=True, streamer=lambda x: parts.append(x))  # noqa: B023
        assert "".join(parts) == first
        said.append([first, pipe.generate("again", max_new_tokens=40, ignore_eos=True)])
        pipe.finish_chat()
    assert said[0] == said[1]

    class Same:
        """Guesses the answer."""

        def __init__(self, answer: list[int]) -> None:
            self._answer = answer

        is_free = True

        def forget(self, sequence: Any) -> None:
            pass

        def taken(self) -> None:
            pass

        def guess(self, sequences: Any, most: Any) -> list[Guess | None]:
            return [Guess(tuple(self._answer[s.num_generated :][:5]), 1) for s in sequences]

    class Ten(ours.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.ids: list[int] = []

        def write(self, token: Any) -> Any:
            self.ids += token if isinstance(token, list) else [token]
            return ours.StreamingStatus.STOP if len(self.ids) >= 10 else ours.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    prompt = ov.Tensor(ids_of(40)[None])
    drafts_of: Any = ahead._backend
    drafts_of.drafts._guesser = Same(plain.generate(prompt, max_new_tokens=40, ignore_eos=True).tokens[0])
    asked = {"max_new_tokens": 40, "ignore_eos": True}
    streamer = Ten()
    stopped = ahead.generate(prompt, streamer=streamer, **asked)
    whole = ahead.generate(prompt, **asked)
    assert stopped.tokens[0] == streamer.ids == whole.tokens[0][:10]
    metrics = whole.perf_metrics
    assert metrics.get_num_generated_tokens() == 40
    assert sum(metrics.raw_metrics.m_batch_sizes) == 40 > len(metrics.raw_metrics.m_batch_sizes)


# -- draws -------------------------------------------------------------------------------------------------------------


def drawn_pair(rows: np.ndarray, guess: int, seed: int) -> tuple[list[int], int]:
    """Two rows of logits, the second behind the token that is guessed; what was drawn, and of how many rows."""
    params = SamplingParams(max_new_tokens=9, do_sample=True, seed=seed)
    sequence = Sequence(Request(0, np.zeros(3, np.int64), params), 0, GrowableArray(np.int64, [0, 1, 2]))
    due = SampledRows(sequence, rows, (guess,))

    def fail(_: Sequence, error: Exception) -> None:
        raise error

    take_tokens([due], 0.0, sample_each, fail)
    return sequence.ids[3:].tolist(), due.num_taken


def chi_square(counts: Counter[int], probs: np.ndarray) -> float:
    total = sum(counts.values())
    return float(sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probs)))


def test_draws_have_the_distribution_of_the_model() -> None:
    """Leviathan, Kalman, Matias, arXiv 2211.17192, for a guess that is a point mass: it is accepted with the model's
    probability of it, else what is drawn has that distribution without it; what follows has that of its own row.
    """
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 6)).astype(np.float32)
    first, second = softmax(rows[0].astype(np.float64)), softmax(rows[1].astype(np.float64))
    guess, num_draws = 2, 4000
    drawn = [drawn_pair(rows, guess, seed) for seed in range(num_draws)]
    assert all(len(tokens) == num_taken for tokens, num_taken in drawn)
    assert all((num_taken == 2) == (tokens[0] == guess) for tokens, num_taken in drawn)
    limit = 20.5  # 5 degrees of freedom: exceeded once in 1000
    assert chi_square(Counter(tokens[0] for tokens, _ in drawn), first) < limit
    rejected = Counter(tokens[0] for tokens, num_taken in drawn if num_taken == 1)
    residual = np.where(np.arange(6) == guess, 0, first)
    assert chi_square(rejected, (residual / residual.sum() + 1e-12)) < limit
    assert chi_square(Counter(tokens[1] for tokens, num_taken in drawn if num_taken == 2), second) < limit


# -- what is taken back ------------------------------------------------------------------------------------------------


def cached(engine: Engine, line: Sequence) -> list[Any]:
    """All that the store knows of a sequence."""
    cache: Any = engine.cache
    kv, store = kv_of(engine, line), cache.store
    window = line.request.eviction.window if line.request.eviction else 0
    queries = [store.captured(kv.store_id, layer) for layer in range(len(cache._heads))] if window else []
    heads, tiles = store.dump(kv.store_id)
    last = [(rows[-window:], places[-window:]) for rows, places in queries]
    num_bytes = 0 if window else store.nbytes  # rings of captured queries have grown for rows that went
    return [heads, tiles, *(x for pair in last for x in pair), np.array([kv.free_slots, num_bytes])]


@pytest.mark.parametrize(
    ("cache", "policy"), [(WHOLE, None), (U8, None), (U8, {"name": "snapkv", "window": 8}), (WHOLE, {"name": "h2o"})]
)
@pytest.mark.parametrize("num_right", [0, 2])
def test_what_was_guessed_wrong_leaves_no_trace(model: LoadedModel, cache: Any, policy: Any, num_right: int) -> None:
    """Both caches at each length that both have: the same bytes, but for rounding of what a batch of rows sums."""
    chosen = small(policy) if policy else None
    plain, ahead = (make_engine(model, cache, lookahead) for lookahead in (False, True))
    prompt = ids_of(27)
    handle = add(plain, 0, prompt, chosen, NEW_TOKENS)
    states: dict[int, list[Any]] = {}
    while plain.has_unfinished():
        plain.step()
        line = line_of(handle)
        if not line.is_finished and line.num_generated:
            states[line.num_cached] = cached(plain, line)
    assert ahead.drafts is not None
    ahead.drafts._guesser = Misled({0: tokens(handle)[0]}, num_right)
    other = add(ahead, 0, prompt, chosen, NEW_TOKENS)
    num_compared = 0
    while ahead.has_unfinished():
        ahead.step()
        line = line_of(other)
        if line.is_finished or not line.num_generated:
            continue
        num_compared += 1
        mine, theirs = cached(ahead, line), states[line.num_cached]
        for got, wanted in zip(mine, theirs, strict=True):
            assert got.shape == wanted.shape
            if got.dtype == np.float32:
                np.testing.assert_allclose(got, wanted, atol=1e-3)
            elif got.dtype != np.uint8:
                np.testing.assert_array_equal(got, wanted)
    assert tokens(other) == tokens(handle)
    assert num_compared > NEW_TOKENS // (num_right + 2)
    assert other.request.num_drafted > other.request.num_accepted


# -- guesses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "max_ngram", "expected"),
    [
        ([1, 2, 3], 3, None),
        ([1, 2, 3, 4, 2, 3], 3, Guess((4, 2, 3, 4), 2)),
        ([1, 2, 9, 1, 2, 7, 8, 1, 2], 3, Guess((7, 8, 1, 2), 2)),  # the newest place
        ([5, 1, 2, 9, 6, 1, 2, 7, 5, 1, 2], 3, Guess((9, 6, 1, 2), 3)),  # a longer end before a newer place
        ([5, 1, 2, 9, 6, 1, 2, 7, 5, 1, 2], 2, Guess((7, 5, 1, 2), 2)),
        ([4, 4], 3, Guess((4, 4, 4, 4), 1)),
        ([3, 1, 2, 1, 2], 3, Guess((1, 2, 1, 2), 2)),  # what has a period goes on
    ],
)
def test_what_followed_before(ids: list[int], max_ngram: int, expected: Guess | None) -> None:
    assert find_repeated(np.array(ids), max_ngram, 4) == expected


def test_odds_follow_what_came() -> None:
    odds = Odds()
    assert odds.of(1) < odds.of(2) < odds.of(3)
    text = [1, 2, 3]
    for _ in range(30):
        odds.note(len(text), Guess((7, 8), 2))
        text += [7]  # the first is right, of the second nothing is known
        odds.learn(text, 0)
    assert odds.of(2) > 0.9
    for _ in range(30):
        odds.note(len(text), Guess((7, 8), 2))
        text += [5]
        odds.learn(text, 0)
    assert odds.of(2) < 0.25
    assert odds.of(3) == 0.6
    odds.note(3, Guess((7,), 3))
    odds.learn(text[-8:], len(text) - 8)  # what came is not there any more
    assert odds.of(3) == 0.6


def test_as_many_as_pay() -> None:
    pace = DraftPace()
    assert pace.choose([0.9], [5], 7)[0] > 1
    assert pace.choose([0.05], [5], 7) == [0]
    assert sum(pace.choose([0.9, 0.9], [5, 5], 3)) == 3
    assert pace.choose([0.3, 0.95], [5, 5], 2) == [0, 2]
    for row, fewest in ((0.02, 4), (0.9, 0)):
        pace = DraftPace()
        for num in (0, 1, 5, 3, 0, 4, 2) * 10:
            pace.note(num, 0.04 * (1 + row * num))
        assert abs(pace.row_cost - row) < 0.12  # what is believed beforehand still counts
        assert (pace.choose([0.7], [5], 7)[0] >= fewest) if fewest else (pace.choose([0.7], [5], 7) == [0])


def test_no_more_than_eight_rows(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    engine = make_engine(model, WHOLE, True)
    assert engine.drafts is not None
    engine.drafts.pace = AllIn()
    handles = [add(engine, i, ids_of(40, i), None, 8 + i) for i in range(10)]
    sizes = []
    while engine.has_unfinished():
        before = [len(tokens(handle)[0]) for handle in handles]
        engine.step()
        sizes.append(sum(len(tokens(h)[0]) - n for h, n in zip(handles, before, strict=True)))
    assert max(sizes) <= max(MAX_DRAFT_TOKENS + 1, len(handles))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.4}, "num_assistant_tokens must be 0"),
        ({"max_ngram_size": 65}, r"max_ngram_size must be in 1\.\.64, got 65"),
        ({"assistant_confidence_threshold": 1.0}, "assistant_confidence_threshold must be in"),
    ],
)
def test_bad_settings_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    pipe = LLMPipeline(folder, prompt_lookup=True, **EXACT)
    with pytest.raises(ours.RequestError, match=message):
        pipe.generate(ov.Tensor(ids_of(8)[None]), max_new_tokens=2, **options)
    with pytest.raises(ours.CrushError, match="prompt_lookup must be True or False, got 3"):
        LLMPipeline(folder, prompt_lookup=3, **EXACT)


def test_the_same_with_paged_attention(folder: Path) -> None:
    found = []
    for lookahead in (False, True):
        pipe = ContinuousBatchingPipeline(folder, cache_config={"attention": "paged"}, prompt_lookup=lookahead, **EXACT)
        config = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        results = pipe.generate([ov.Tensor(ids_of(n)[None]) for n in (3, 31, 60)], [config] * 3)
        found.append([result.m_generation_ids for result in results])
    assert found[0] == found[1]
