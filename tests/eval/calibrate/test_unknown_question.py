"""Profiles of contexts, whose question is not known when they are compressed: end to end on tiny models, and laws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from eviction_runs import EXACT, F32, READ_TWICE, add, as_lists, held, make_engine, read_prompt
from native_stores import require_native
from typer.testing import CliRunner

from ov_kvcrush import CacheConfig, CrushError, LLMPipeline
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.core.eviction import ReplayPrompt
from ov_kvcrush.eval.calibrate import app as profiler
from ov_kvcrush.eval.calibrate.meter import CacheMeter, CacheVariant
from ov_kvcrush.eval.calibrate.rendering import PromptRenderer
from ov_kvcrush.policies.plans.plan import CachePlan
from ov_kvcrush.policies.plans.profile import PROFILE_NAME, UNKNOWN_PROFILE_NAME, read_profile
from ov_kvcrush.policies.registry import build

Folder = Callable[[str], Path]
ASKS = ReplayPrompt(*(np.arange(3, 3 + n) for n in (6, 9, 4)))
TEXT = "In the harbour of Anstruther lie nine boats. " * 30
QUESTION = "How many boats are there?"


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 100, length)


def run_profiler(folder: Path, *more: str) -> Any:
    arguments = [str(folder), "--texts", "1", "--tokens", "400", "--answer-tokens", "8", *more]
    return CliRunner().invoke(profiler.app, arguments)


@pytest.fixture(scope="module")
def profiled(tiny_ir: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a profile of each use."""
    require_native()
    folder = tmp_path_factory.mktemp("profiled") / "model"
    shutil.copytree(tiny_ir("llama"), folder)
    for more in (("--question", "unknown"), ()):
        result = run_profiler(folder, *more)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def meter(tiny_ir: Folder) -> CacheMeter:
    require_native()
    return CacheMeter(tiny_ir("llama"), F32, CacheConfig(key_precision="f32", value_precision="f32"))


def assert_nothing_left(meter: CacheMeter) -> None:
    memory: Any = meter.cache
    assert memory.store.num_sequences == memory.staging.pool.num_used == len(memory._kv) == 0


# -- the meter ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kvzip", "snapkv"])
def test_the_full_cache_costs_nothing_behind_a_suffix(meter: CacheMeter, name: str) -> None:
    policy = build(name, kept=0.25)
    with meter.read(ids(600), 8, policy, set(), suffix=ids(40, seed=1), head=5, replay_prompt=ASKS) as read:
        full, every = meter.uniform("f32", "f32"), [np.arange(600, dtype=np.int32)] * meter.num_heads
        variants = [CacheVariant(full), CacheVariant(full, every), CacheVariant(meter.uniform("u2", "u2"))]
        whole, chosen, coarse = read.measure(variants)
        evicted = read.measure([CacheVariant(full, read.select(policy))])[0]
        assert len(read.answer.rows) == 1 + 8
    for one in (whole, chosen):
        assert one.kl == pytest.approx(0, abs=1e-6)
        assert one.same_top == 1
    assert min(coarse.kl, evicted.kl) > 1e-5
    assert whole.nbytes == meter.cache.store.bytes_for(600, meter.uniform("f32", "f32")) > evicted.nbytes
    assert_nothing_left(meter)


def test_the_full_cache_answers_a_suffix_as_the_end_of_a_prompt(meter: CacheMeter) -> None:
    policy, text, suffix = build("snapkv"), ids(300), ids(25, seed=1)
    with meter.read(np.concatenate([text, suffix]), 8, policy, set()) as read:
        known = read.answer.rows
    with meter.read(text, 8, policy, set(), suffix=suffix) as read:
        assert read.answer.rows.tolist() == [suffix[-1], *known]
    ends = {int(known[0])}
    with meter.read(text, 8, policy, ends, suffix=suffix) as read:  # it ends at once
        assert read.answer.rows.tolist() == [suffix[-1]]
        assert read.measure([CacheVariant(meter.uniform("f32", "f32"))])[0].kl == pytest.approx(0, abs=1e-6)


def test_a_suffix_is_not_compressed(meter: CacheMeter) -> None:
    """What a cache costs is what its own tokens lack: its bytes are of the context alone."""
    policy, sizes = build("kvzip", kept=0.25), []
    for length in (4, 100):
        with meter.read(ids(600), 8, policy, set(), suffix=ids(length, seed=1), replay_prompt=ASKS) as read:
            kept = read.select(policy)
            sizes.append((read.measure([CacheVariant(meter.uniform("u8", "u8"), kept)])[0].nbytes, as_lists([kept])))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("variant", [*READ_TWICE, {"name": "kvzip", "sample": 0.5, "chunk": 96}], ids=json.dumps)
@pytest.mark.parametrize("head", [0, 40])
def test_the_meter_chooses_as_the_engine_does(
    meter: CacheMeter, tiny_ir: Folder, variant: dict[str, Any], head: int
) -> None:
    text, policy = ids(700), build(**{"kept": 0.25, **variant})
    engine = make_engine(tiny_ir("llama"), max_num_batched_tokens=512)
    use = {"replay_prompt": ASKS, "system": (0, head) if head else None}
    line = read_prompt(engine, add(engine, 0, text, policy, use=use))
    with meter.read(text, 4, policy, set(), suffix=ids(9, seed=1), head=head, replay_prompt=ASKS) as read:
        found = read.select(policy)
    assert [x.tolist() for x in found] == [head for layer in as_lists(held(engine, line)) for head in layer]
    assert sum(map(len, found)) < 700 * meter.num_heads
    assert_nothing_left(meter)


def test_a_text_that_is_too_short_to_be_chosen_from_stays_whole(meter: CacheMeter) -> None:
    policy = build("kvzip", kept=0.25)
    for length in (20, 100):  # below the tokens that always stay, and below `min_tokens`
        with meter.read(ids(length), 4, policy, set(), suffix=ids(9, seed=1)) as read:
            assert all(x.tolist() == list(range(length)) for x in read.select(policy))


def test_a_replay_that_breaks_leaves_nothing(meter: CacheMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(meter.cache, "take_scores", broken)
    with pytest.raises(RuntimeError, match="broken"), meter.read(ids(300), 4, build("kvzip"), set()):
        pass
    assert_nothing_left(meter)


@pytest.mark.parametrize("name", ["kvzip", "snapkv"])
def test_what_is_measured_is_what_a_context_answers(meter: CacheMeter, tiny_ir: Folder, name: str) -> None:
    """As long as a compressed context answers as the full cache does, its next token is the variant's most likely."""
    text, policy = ids(600), build(name, kept=0.2)
    pipe = LLMPipeline(
        tiny_ir("llama"), "CPU", F32, cache_config=EXACT, scheduler_config={"max_num_batched_tokens": 512}
    )
    asks = PromptRenderer(tiny_ir("llama")).replay_prompt()
    [context] = pipe.compress_ids(text, [policy], head=7)
    options = pipe._options(None, {"max_new_tokens": 8, "ignore_eos": True})
    with context:
        for seed in range(4):
            suffix = ids(20, seed=seed)
            params = CacheParams(build("none"), context=context.snapshot_for(pipe.context_owner))
            handle = pipe._backend.add(seed, np.concatenate([text, suffix]), options, params)
            handle.drive()
            handle.wait()
            answer = handle.outputs()[0].generated_ids
            with meter.read(text, 8, policy, set(), suffix=suffix, head=7, replay_prompt=asks) as read:
                made = read._commit(CacheVariant(meter.uniform("f32", "f32"), read.select(policy)))
                likely = read._logits([made], read.answer.rows)[0].argmax(axis=1)
                meter.cache.store.release(made)
            alike = np.append(np.flatnonzero(read.answer.rows[1:] != answer), 7)[0]
            assert likely[: alike + 1].tolist() == answer[: alike + 1]


# -- the texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_template", [True, False])
def test_contexts_are_rendered_as_compress_does(tiny_ir: Folder, tmp_path: Path, has_template: bool) -> None:
    require_native()
    folder = shutil.copytree(tiny_ir("llama"), tmp_path / "model")
    if not has_template:
        for path in folder.glob("*chat_template*"):
            path.unlink()
        config = folder / "openvino_tokenizer.xml"
        assert "chat_template" in config.read_text("utf-8")
        config.write_text(config.read_text("utf-8").replace("chat_template", "no_template"), "utf-8")
        config = folder / "tokenizer_config.json"
        found = json.loads(config.read_text("utf-8"))
        found.pop("chat_template", None)
        config.write_text(json.dumps(found), "utf-8")
    pipe, renderer = LLMPipeline(folder, "CPU"), PromptRenderer(folder)
    assert bool(pipe.get_tokenizer().chat_template) == has_template
    text, suffix, head = renderer.render_context(TEXT, QUESTION, 10**6)
    with pipe.compress(TEXT, policy="none") as context:
        assert context.ids.tolist() == text.tolist()
    whole = renderer.render(f"{TEXT.strip() if has_template else TEXT}\n\n{QUESTION}", 10**6)
    assert np.concatenate([text, suffix]).tolist() == whole.tolist()
    short, same, _ = renderer.render_context(TEXT, QUESTION, 300)
    assert len(short) + len(same) == 300
    assert same.tolist() == suffix.tolist()
    assert short[: head + 50].tolist() == text[: head + 50].tolist()
    assert short[-50:].tolist() == text[-50:].tolist()
    with pytest.raises(CrushError, match="tokens must leave room"):
        renderer.render_context(TEXT, QUESTION, len(suffix) + head)


# -- the profile -------------------------------------------------------------------------------------------------------


def test_a_profile_says_which_use_it_is_of(profiled: Path) -> None:
    known, unknown = (json.loads((profiled / name).read_text()) for name in (PROFILE_NAME, UNKNOWN_PROFILE_NAME))
    assert (known["use"], known["policy"]["name"]) == ("known", "kvcrush")
    assert (unknown["use"], unknown["policy"]["name"]) == ("unknown", "kvzip")
    assert unknown["texts"][0]["num_tokens"] < known["texts"][0]["num_tokens"] == 400
    assert not list(profiled.glob("*.part"))


def test_a_use_is_checked_and_old_profiles_are_of_known_questions(profiled: Path, tmp_path: Path) -> None:
    found = json.loads((profiled / UNKNOWN_PROFILE_NAME).read_text())
    told, path = (found["model"], tuple(found["num_kv_heads"])), tmp_path / "profile.json"
    assert read_profile(profiled / UNKNOWN_PROFILE_NAME, *told).use == "unknown"
    path.write_text(json.dumps({key: value for key, value in found.items() if key != "use"}))
    assert read_profile(path, *told).use == "known"
    path.write_text(json.dumps({**found, "use": "perhaps"}))
    with pytest.raises(CrushError, match="use must be one of known, unknown, got 'perhaps'"):
        read_profile(path, *told)
    result = run_profiler(profiled, "--question", "perhaps")
    assert result.exit_code == 2
    assert "question must be" in result.output


def test_an_interrupted_run_goes_on_with_its_own_use(
    profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    costs = {"unknown": UNKNOWN_PROFILE_NAME, "known": PROFILE_NAME}
    begun = json.loads((profiled / UNKNOWN_PROFILE_NAME).read_text())
    done = read_profile(profiled / UNKNOWN_PROFILE_NAME, begun["model"], tuple(begun["num_kv_heads"]))

    def noted(_: Any, prompt: Any, *__: Any) -> Any:
        measured.append(prompt.name)
        return replace(done.texts[0], name=prompt.name, num_tokens=len(prompt.ids))

    monkeypatch.setattr(profiler, "measure_text", noted)
    monkeypatch.setattr(profiler, "measure_plans", lambda _, profile, *__: profile)
    out = tmp_path / "out.json"
    for left, expected in (("unknown", 1), ("known", 2)):
        measured.clear()
        shutil.copy(profiled / costs[left], f"{out}.part")
        more = ("--texts", "2", "--policy", begun["policy"]["name"], "--question", "unknown", "--out", str(out))
        result = run_profiler(profiled, *more)
        assert result.exit_code == 0, result.output
        assert len(measured) == expected
        assert len(json.loads(out.read_text())["texts"]) == 2


# -- the plans ---------------------------------------------------------------------------------------------------------


def plan_of(pipe: LLMPipeline, params: CacheParams, length: int = 1200) -> CachePlan | None:
    """Of a request with a prompt of random tokens."""
    handle = pipe._backend.add(0, ids(length), pipe._options(None, {"max_new_tokens": 2}), params)
    handle.drive()
    handle.wait()
    plan = handle.get_stats().plan
    if handle.snapshot is not None:
        handle.snapshot.release()
    return plan


@pytest.fixture(scope="module")
def opposed(profiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with profiles whose costs rise from head to head, and fall."""
    folder = shutil.copytree(profiled, tmp_path_factory.mktemp("opposed") / "model")
    for name, order in ((PROFILE_NAME, 1), (UNKNOWN_PROFILE_NAME, -1)):
        found = json.loads((folder / name).read_text())
        for costs in found["texts"][0]["heads"].values():
            costs[:] = [10.0**i for i in range(len(costs))][::order]
        (folder / name).write_text(json.dumps(found))
    return folder


def planners(pipe: LLMPipeline) -> tuple[Any, Any]:
    processor: Any = pipe._backend._input  # type: ignore[attr-defined]
    return processor._planner, processor._context_planner


def test_what_is_read_before_its_question_is_planned_by_its_own_profile(opposed: Path) -> None:
    pipe = LLMPipeline(opposed, "CPU", cache_config={"budget": "1/5"})
    known, unknown = (planner.plan(1200) for planner in planners(pipe))
    assert known.flat != unknown.flat
    kvzip = build("kvzip")
    for params, expected in (
        (CacheParams(), known),
        (CacheParams(build("snapkv")), known),
        (CacheParams(kvzip), unknown),
        (CacheParams(prefill_only=True), unknown),
        (CacheParams(kvzip, prefill_only=True), unknown),
        (CacheParams(build("none"), prefill_only=True), None),
    ):
        assert plan_of(pipe, params) == expected


@pytest.mark.parametrize("name", ["kvzip", "snapkv"])
def test_contexts_keep_what_their_profile_says(opposed: Path, name: str) -> None:
    """Heads that are cheap for contexts, and dear for prompts, lose most."""
    pipe = LLMPipeline(opposed, "CPU", cache_config={"budget": "1/5"})
    policy = build(name)
    of_prompts, of_contexts = (planner.plan(1200).tokens(1200, 36).tolist() for planner in planners(pipe))
    assert of_contexts != of_prompts
    [context] = pipe.compress_ids(ids(1200), [policy])
    with context:
        kept = [len(head) for layer in context.kept_map().positions for head in layer]
    assert kept == of_contexts


def test_a_context_is_asked_under_a_budget(profiled: Path) -> None:
    pipe = LLMPipeline(profiled, "CPU", cache_config={"budget": "1/8"})
    with pipe.compress(TEXT * 2) as context:
        assert context.kept_tokens < context.num_tokens
        answers = [pipe.generate(QUESTION, context=context, max_new_tokens=6, ignore_eos=True) for _ in range(2)]
    assert str(answers[0]) == str(answers[1])


def test_without_it_the_known_profile_holds_and_a_named_one_overrides_both(profiled: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(profiled, tmp_path / "model", ignore=shutil.ignore_patterns(UNKNOWN_PROFILE_NAME))
    for folder, config in ((alone, {}), (profiled, {"profile": profiled / PROFILE_NAME})):
        pipe = LLMPipeline(folder, "CPU", cache_config={"budget": "1/8", **config})
        known, of_contexts = planners(pipe)
        assert known is of_contexts
        assert plan_of(pipe, CacheParams(prefill_only=True)) == known.plan(1200)
    assert known._profile.use == "known"
    assert planners(LLMPipeline(profiled, "CPU")) == (None, None)


def test_prompts_answer_as_they_did(profiled: Path) -> None:
    """A profile of contexts beside the model changes nothing for prompts that end with their question."""
    answers = []
    for config in ({}, {"profile": profiled / PROFILE_NAME}):
        pipe = LLMPipeline(profiled, "CPU", cache_config={"budget": "1/8", **config})
        answers.append(pipe.generate(ov.Tensor(ids(1200)[None, :]), max_new_tokens=20, ignore_eos=True).tokens)
    assert answers[0] == answers[1]
