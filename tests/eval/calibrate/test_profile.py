"""From a model to its profile to a pipeline that meets a budget, end to end on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from native_stores import require_native
from typer.testing import CliRunner

from ov_kvcrush import CacheConfig, CrushError, LLMPipeline, SchedulerConfig
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.eval.calibrate.app import app
from ov_kvcrush.eval.calibrate.baklava import head_changes
from ov_kvcrush.eval.calibrate.frontier import EQUAL, PRECISIONS, FrontierRow, against_uniform, read_texts, tokens_of
from ov_kvcrush.eval.calibrate.measure import keeping, variant_of
from ov_kvcrush.eval.calibrate.meter import CacheMeter, CacheVariant
from ov_kvcrush.eval.calibrate.prompt_reader import Prompt, PromptReader
from ov_kvcrush.eval.cli.app import app as eval_app
from ov_kvcrush.kvcache.planning import find_profile, geometry_of
from ov_kvcrush.policies.plans.planner import BytePlanner
from ov_kvcrush.policies.plans.profile import PROFILE_NAME
from ov_kvcrush.policies.registry import build

Folder = Callable[[str], Path]
LENGTH = 1200
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@pytest.fixture(scope="module")
def profiled(tiny_ir: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a profile of one text."""
    require_native()
    folder = tmp_path_factory.mktemp("profiled") / "model"
    shutil.copytree(tiny_ir("llama"), folder)
    arguments = [str(folder), "--texts", "1", "--tokens", "400", "--answer-tokens", "8", "--policy", "snapkv"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 100, length)


def kv_bytes(pipe: LLMPipeline, length: int) -> tuple[int, float]:
    """Bytes of a prompt's cache in the store, and those of all its tokens in bf16."""
    handle = pipe._loop.prefill(ids(length), CacheParams(prefill_only=True), None)
    assert handle.snapshot is not None
    planner = pipe._backend._input._planner  # type: ignore[attr-defined]
    found = handle.snapshot.nbytes, planner._geometry.full_bytes(length)
    handle.snapshot.release()
    return found


def test_a_profile_has_costs_and_measured_plans(profiled: Path) -> None:
    found = json.loads((profiled / PROFILE_NAME).read_text())
    assert len(found["texts"]) == 1
    assert found["policy"]["name"] == "snapkv"
    assert "ov_kvcrush-profile" in found["made_with"]["command"]
    assert all(len(rung["kl"]) == 1 for rung in found["rungs"])
    assert len(found["baklava"]["changes"]) == sum(found["num_kv_heads"])
    assert not (profiled / f"{PROFILE_NAME}.part").exists()


@pytest.mark.parametrize("budget", ["1/4", 0.125])
def test_a_pipeline_meets_its_budget(profiled: Path, budget: float | str) -> None:
    pipe = LLMPipeline(profiled, "CPU", cache_config=CacheConfig(budget=budget))
    planner = pipe._backend._input._planner  # type: ignore[attr-defined]
    plan = planner.plan(3900)
    used, _ = kv_bytes(pipe, 3900)
    options = tuple(dict.fromkeys(plan.flat))
    sizes = planner._geometry.sizes(options, 3900)
    wanted = sum(sizes[head, options.index(one)] for head, one in enumerate(plan.flat))
    assert used == pytest.approx(wanted, rel=0.03)


def test_a_budget_answers_and_tells_its_plan(profiled: Path) -> None:
    pipe = LLMPipeline(profiled, "CPU", cache_config={"budget": "1/6"}, scheduler_config=SchedulerConfig())
    first = pipe.generate(ov.Tensor(ids(LENGTH)[None, :]), max_new_tokens=40, ignore_eos=True)
    again = pipe.generate(ov.Tensor(ids(LENGTH)[None, :]), max_new_tokens=40, ignore_eos=True)
    assert first.tokens == again.tokens
    assert len(first.tokens[0]) == 40
    assert pipe._backend.cache.usage().used_bytes == 0  # type: ignore[attr-defined]


def test_a_quality_takes_fewer_bytes_when_less_is_asked(profiled: Path, caplog: pytest.LogCaptureFixture) -> None:
    used = [
        kv_bytes(LLMPipeline(profiled, "CPU", cache_config=CacheConfig(quality=quality)), LENGTH)[0]
        for quality in (1e-6, 10.0)
    ]
    assert used[0] > used[1]
    texts = len(json.loads((profiled / PROFILE_NAME).read_text())["texts"])
    assert f"kept by about {texts} of {texts + 1} texts" in caplog.text


def test_a_profile_of_another_model_is_refused(profiled: Path, tiny_ir: Folder) -> None:
    with pytest.raises(CrushError, match="profile must be of this model"):
        LLMPipeline(tiny_ir("qwen2"), "CPU", cache_config=CacheConfig(budget="1/4", profile=profiled / PROFILE_NAME))


def test_without_a_profile_a_ladder_holds_and_quality_is_refused(tiny_ir: Folder) -> None:
    require_native()
    pipe = LLMPipeline(tiny_ir("llama"), "CPU", cache_config=CacheConfig(budget="1/4"))
    used, full = kv_bytes(pipe, 3900)
    assert used <= full / 4
    with pytest.raises(CrushError, match="quality must be asked of a model with a profile"):
        LLMPipeline(tiny_ir("llama"), "CPU", cache_config=CacheConfig(quality=0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, r"budget must be a fraction in \(0, 1\], got 0"),
        ({"budget": "1/0"}, "budget must be a fraction such as 1/8 or 0.125, got '1/0'"),
        ({"budget": "x"}, "budget must be a fraction such as 1/8"),
        ({"budget": 0.1, "quality": 0}, "only one of budget, budget_bytes and quality can be given"),
        ({"budget": 0.1, "quality": 0.1}, "only one of budget, budget_bytes and quality can be given"),
        ({"budget": 0.1, "key_precision": "u4"}, "key_precision and value_precision must be left out with budget"),
        ({"budget": 0.1, "attention": "paged"}, "budget must be left out with attention='paged'"),
        ({"budget_bytes": -1}, "budget_bytes must be an integer of at least 0"),
        ({"quality": -1}, "quality must be a finite number of at least 0"),
    ],
)
def test_what_cannot_be_is_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CrushError, match=message):
        CacheConfig.from_options(settings)


def test_the_full_cache_costs_nothing_and_fewer_bits_cost_more(tiny_ir: Folder) -> None:
    require_native()
    meter = CacheMeter(tiny_ir("llama"), EXACT)
    policy = build("snapkv", kept=0.25)
    with meter.read(ids(600), 8, policy, set()) as read:
        pairs = [("f32", "f32"), ("u8", "u8"), ("u2", "u2")]
        found = read.measure([CacheVariant(meter.uniform(*pair)) for pair in pairs])
        evicted = read.measure([CacheVariant(meter.uniform("f32", "f32"), read.select(policy))])[0]
    assert found[0].kl == pytest.approx(0, abs=1e-6)
    assert found[0].same_top == 1
    assert found[0].kl <= found[1].kl <= found[2].kl
    full = meter.cache.store.bytes_for(600, meter.uniform("f32", "f32"))
    assert found[0].nbytes == full > found[1].nbytes > found[2].nbytes
    assert evicted.kl > found[0].kl
    assert meter.cache.store.nbytes == 0


def test_the_frontier_compares_plans_and_uniform_settings(profiled: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": "once upon a time " * 100}) + "\n")
    out = tmp_path / "frontier.json"
    arguments = ["frontier", str(profiled), "--data", str(tmp_path), "--tokens", "400", "--json", str(out)]
    arguments += ["--shared-layers", "1"]
    result = CliRunner().invoke(eval_app, arguments)
    assert result.exit_code == 0, result.output
    if json.loads(out.read_text())["rows"]:  # a random model may end its answer at once
        names = {row["setting"] for row in json.loads(out.read_text())["rows"]}
        assert {
            "plan 1/8.0",
            "1/8.0 u4/u2",
            "quality 0.05",
            "0.5 u4/u4",
            "baklava 0.5 u4/u4",
            "kvsharer 1 u4/u2",
        } <= names
        few = [*arguments[:-2], "--methods", "plan, uniform", "--fractions", "0.5"]
        assert CliRunner().invoke(eval_app, few).exit_code == 0
        uniform = {f"0.5 {key}/{value}" for key, value in PRECISIONS}
        assert {row["setting"] for row in json.loads(out.read_text())["rows"]} == uniform | {
            name for name in names if name.startswith("plan")
        }
    for wrong in (["--methods", "plan,x"], ["--methods", ""], ["--fractions", "0"], ["--fractions", "x"]):
        result = CliRunner().invoke(eval_app, [*arguments, *wrong])
        assert result.exit_code == 2
        assert wrong[0][2:] in result.output


def test_the_bytes_of_a_cache_are_its_plan_s(profiled: Path) -> None:
    meter, policy = CacheMeter(profiled, EXACT), build("snapkv")
    profile = find_profile(meter.model, meter.config)
    assert profile is not None
    geometry = geometry_of(meter.model, meter.config)
    for length in (700, 1500):
        with meter.read(ids(length), 8, policy, set()) as read:
            for budget in (1 / 4, 1 / 8):
                planner = BytePlanner(geometry, profile.num_kv_heads, profile, budget)
                plan = planner.plan(length)
                found = read.measure([variant_of(read, plan, policy)])[0]
                assert found.nbytes == planner.nbytes(plan, length)


@pytest.mark.parametrize(("key", "value"), EQUAL)
def test_a_uniform_setting_takes_what_a_plan_may(profiled: Path, key: str, value: str) -> None:
    meter, policy = CacheMeter(profiled, EXACT), build("snapkv")
    geometry, length = geometry_of(meter.model, meter.config), 1500
    with meter.read(ids(length), 8, policy, set()) as read:
        for budget in (1 / 5.5, 1 / 8):
            limit = budget * geometry.full_bytes(length)
            tokens = tokens_of(geometry, key, value, limit, length)
            assert tokens is not None
            fewer, enough = (
                read.measure([CacheVariant(meter.uniform(key, value), read.select(keeping(policy, n / length)))])[0]
                for n in (tokens - 32, tokens)
            )
            assert fewer.nbytes < limit <= enough.nbytes
    assert tokens_of(geometry, key, value, geometry.full_bytes(length), length) is None


def test_the_first_rows_can_be_compared_alone(tiny_ir: Folder) -> None:
    meter, policy = CacheMeter(tiny_ir("llama"), EXACT), build("snapkv")
    with meter.read(ids(600), 12, policy, set()) as read:
        coarse = CacheVariant(meter.uniform("u2", "u2"))
        each = [read.measure([coarse], rows)[0].kl * rows for rows in range(1, 13)]
        assert each == sorted(each)
        assert read.measure([coarse] * 3)[2].kl * 12 == pytest.approx(each[-1], rel=1e-5)
        assert read.measure([coarse], 99)[0].kl * 12 == pytest.approx(each[-1], rel=1e-5)


def test_prompts_stay_read_while_there_is_room(tiny_ir: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = CacheMeter(tiny_ir("llama"), EXACT)
    pool = meter.cache.staging.pool
    prompts = [Prompt(str(seed), ids(600, seed)) for seed in range(3)]
    blocks = -(-600 // 32)
    spare = [pool.allocate() for _ in range(pool.num_free - 2 * blocks - 1)]  # room for two
    read: list[int] = []
    own = CacheMeter._prefill

    def counted(self: CacheMeter, sequence: Any) -> int:
        read.append(len(sequence.ids))
        return own(self, sequence)

    monkeypatch.setattr(CacheMeter, "_prefill", counted)
    with closing(PromptReader(meter, build("snapkv"), 8, set())) as reader:
        assert reader.read(prompts[0]) is reader.read(prompts[0])
        reader.read(prompts[1])
        assert len(read) == 2
        third = reader.read(prompts[2])  # takes the place of both
        assert len(third.answer.rows) == 8
        reader.read(prompts[2])
        reader.read(prompts[0])
        assert len(read) == 4
    assert pool.num_free == 2 * blocks + 1
    with closing(PromptReader(meter, build("snapkv"), 8, set())) as reader:
        reader.read(prompts[0])
        with pytest.raises(CrushError, match="prompt must fit into the staging blocks, got 3000 tokens"):
            reader.read(Prompt("long", ids(3000)))
    pool.release(np.array(spare))
    assert meter.cache.store.nbytes == 0


def test_an_interrupted_frontier_goes_on(profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [json.dumps({"prompt": word * 100}) for word in ("once upon a time ", "there was a king ")]
    data, out = tmp_path / "texts.jsonl", tmp_path / "frontier.json"
    arguments = ["frontier", str(profiled), "--data", str(tmp_path), "--tokens", "400", "--json", str(out)]
    data.write_text("\n".join(texts))
    assert CliRunner().invoke(eval_app, [*arguments, "--per-file", "1"]).exit_code == 0
    first = json.loads(out.read_text())
    read: list[np.ndarray] = []
    own = CacheMeter.read

    def counted(self: CacheMeter, ids: np.ndarray, *others: Any, **more: Any) -> Any:
        read.append(ids)
        return own(self, ids, *others, **more)

    monkeypatch.setattr(CacheMeter, "read", counted)
    assert CliRunner().invoke(eval_app, [*arguments, "--per-file", "2"]).exit_code == 0
    both = json.loads(out.read_text())
    assert len(read) == 1
    assert both["texts"] == ["texts:0", "texts:1"]
    assert both["rows"][: len(first["rows"])] == first["rows"]


def test_settings_stand_beside_uniform_ones_of_no_fewer_bytes() -> None:
    kl = {"1 u8/u8": 0.01, "0.5 u8/u8": 0.2, "0.7 u4/u4": 0.1, "1 u2/u2": 0.3, "plan 1/8.0": 0.05, "leankv x": 0.4}
    size = {"1 u8/u8": 0.5, "0.5 u8/u8": 0.3, "0.7 u4/u4": 0.25, "1 u2/u2": 0.1, "plan 1/8.0": 0.2, "leankv x": 0.6}
    rows = [FrontierRow(name, text, kl[name] * (1 + n), 1, size[name]) for name in kl for n, text in enumerate("abc")]
    (found,) = against_uniform(rows)
    assert (found["setting"], found["uniform"]) == ("plan 1/8.0", "0.7 u4/u4")  # u8/u8 has more bytes and costs more
    for name in ("ratio", "low", "high"):
        assert found[name] == pytest.approx(0.5)


def test_contexts_are_read_with_their_first_question(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n{"other": 1}\n')
    task = tmp_path / "task"
    task.mkdir()
    rows = [{"context_id": x, "context": f"text {x}"} for x in "pqr"]
    (task / "contexts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [{"context_id": x, "question": f"{x}{n}?"} for n in (1, 2) for x in "pr"]
    (task / "items.jsonl").write_text("\n".join(map(json.dumps, asked)))
    found = list(read_texts(tmp_path, 3))
    expected = [("a:0", "one"), ("task:0", "text p\n\np1?"), ("a:1", "two"), ("task:1", "text r\n\nr1?")]
    assert found == expected
    (tmp_path / "b.jsonl").write_text("[1]")
    with pytest.raises(CrushError, match=r"\.jsonl:1: line must be a JSON object, got"):
        list(read_texts(tmp_path, 1))
    with pytest.raises(CrushError, match="data must be a folder with jsonl files"):
        list(read_texts(tmp_path / "none", 1))


def test_layers_that_share_cost_their_bytes_less(tiny_ir: Folder) -> None:
    require_native()
    policy = build("snapkv", kept=0.25)
    config = CacheConfig(shared_layers={1: 0})
    meter, shared = CacheMeter(tiny_ir("llama"), EXACT), CacheMeter(tiny_ir("llama"), EXACT, config)
    with meter.read(ids(600), 8, policy, set()) as read:
        answer = read.answer
        own = read.measure([CacheVariant(meter.uniform("f32", "f32"))])[0]
    with shared.read(ids(600), 8, policy, set(), answer) as read:
        found = read.measure([CacheVariant(shared.uniform("f32", "f32"))])[0]
    assert own.kl < 1e-6 < found.kl
    assert found.nbytes * len(meter.model.layers) == own.nbytes * (len(meter.model.layers) - 1)


def test_a_head_that_copies_its_input_does_not_change_it(tiny_ir: Folder) -> None:
    first = head_changes(tiny_ir("llama"), ids(1)[None, :])  # the only token attends to itself
    np.testing.assert_allclose(first, 0, atol=1e-5)
    later = head_changes(tiny_ir("llama"), ids(64)[None, :])
    assert len(later) == len(first)
    assert (later > 0.01).all()
    assert (later <= 2).all()


def test_a_profile_beside_the_model_is_found(profiled: Path) -> None:
    meter = CacheMeter(profiled)
    found = find_profile(meter.model, meter.config)
    assert found is not None
    assert found.num_heads == meter.num_heads


def test_a_conversation_goes_on_under_the_plan_of_its_new_length(profiled: Path) -> None:
    pipe = LLMPipeline(
        profiled, "CPU", cache_config={"budget": "1/6"}, scheduler_config={"enable_prefix_caching": True}
    )
    begun = ids(LENGTH)
    answer = pipe.generate(ov.Tensor(begun[None, :]), max_new_tokens=20, ignore_eos=True).tokens[0]
    more = np.concatenate([begun, answer[:-1], ids(60, seed=1)])
    handle = pipe._backend.add(1, more, pipe._options(None, {"max_new_tokens": 4}), CacheParams())
    handle.drive()
    handle.wait()
    assert handle.get_stats().num_reused_tokens >= LENGTH
    plan = handle.get_stats().plan
    assert plan is not None
    assert plan.predicted_kl is not None


def test_a_system_prompt_stays_under_a_budget(profiled: Path) -> None:
    pipe = LLMPipeline(profiled, "CPU", cache_config={"budget": "1/8"})
    system = "you answer in one word and never in two words "
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "once upon " * 250}]
    history = ov_genai.ChatHistory(messages)
    kept = pipe.generate(history, max_new_tokens=4, ignore_eos=True).kept[0]
    assert kept is not None
    start = pipe.get_tokenizer().encode(system, add_special_tokens=False).input_ids.shape[1]
    for layer in kept.positions:
        for head in layer:
            assert head[:start].tolist() == list(range(start))
