"""Contexts in files: what is loaded goes on as what was saved, and what does not fit is refused by name."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from context_files import signed
from eviction_runs import EXACT, F32, SMALL, as_lists

from ov_kvcrush import Context, ContextFileError, LLMPipeline, OutOfMemory, RequestError
from ov_kvcrush.policies.registry import build

TEXT = "In the harbour of Anstruther lie nine boats. " * 6 + "The red one is called Reaper."
ASK = {"max_new_tokens": 16, "ignore_eos": True}
TIGHT = {**SMALL, "kept_tokens": 60}
ZIP = {"name": "kvzip", **TIGHT, "chunk": 64}
POLICIES: list[dict[str, Any]] = [
    {"name": "none"},
    ZIP,
    {**ZIP, "sample": 0.5},
    {**ZIP, "name": "kvcrush", "scorer": "kvzip"},
    {"name": "h2o", **TIGHT},
]
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=json.dumps)

ASKING = """
import sys
from ov_kvcrush import Context, LLMPipeline
folder, path, question = sys.argv[1:]
pipe = LLMPipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32", DYNAMIC_QUANTIZATION_GROUP_SIZE="0")
context = Context.load(path, pipe)
print(context.num_tokens, context.kept_tokens, context.nbytes)
print(repr(pipe.generate(question, context=context, max_new_tokens=16, ignore_eos=True)))
"""


def make_pipe(folder: Path, **cache: Any) -> LLMPipeline:
    return LLMPipeline(folder, "CPU", F32, cache_config=cache)


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> LLMPipeline:
    return make_pipe(folder)


def assert_nothing_left(pipe: LLMPipeline) -> None:
    gc.collect()
    assert pipe.get_metrics().kv_cache_size_in_bytes == 0


@EVERY_POLICY
def test_loaded_context_is_the_saved_one(policy: dict[str, Any], pipe: LLMPipeline, tmp_path: Path) -> None:
    path = tmp_path / "text.kvc"
    with pipe.compress(TEXT, policy=policy) as context:
        context.save(path)
        with Context.load(path, pipe) as loaded:
            for name in ("num_tokens", "kept_tokens", "nbytes", "policy", "text", "seconds"):
                assert getattr(loaded, name) == getattr(context, name), name
            mine, others = loaded.kept_map(), context.kept_map()
            assert as_lists(mine.positions) == as_lists(others.positions)
            assert (mine.representatives is None) == (others.representatives is None)
            if others.representatives is not None and mine.representatives is not None:
                assert as_lists(mine.representatives) == as_lists(others.representatives)
            for question in ("What is it called?", "Where?"):
                answers = [pipe.generate(question, context=c, **ASK) for c in (loaded, context)]
                assert answers[0] == answers[1]
            more = [c.extend(" A green one came.", policy="none") for c in (loaded, context)]
            assert more[0].nbytes == more[1].nbytes
            assert pipe.generate("Who?", context=more[0], **ASK) == pipe.generate("Who?", context=more[1], **ASK)
            loaded.save(tmp_path / "again.kvc")
    assert (tmp_path / "again.kvc").read_bytes() == path.read_bytes()
    del more
    assert_nothing_left(pipe)


def test_another_process_answers_the_same_from_the_file(pipe: LLMPipeline, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.kvc"
    with pipe.compress(TEXT, policy=ZIP) as context:
        context.save(path)
        expected = [
            f"{context.num_tokens} {context.kept_tokens} {context.nbytes}",
            repr(pipe.generate("Where?", context=context, **ASK)),
        ]
        assert path.stat().st_size <= 1.02 * context.nbytes + 4096  # the header
    command = [sys.executable, "-c", ASKING, str(folder), str(path), "Where?"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected


def test_chat_is_saved_and_goes_on(pipe: LLMPipeline, tmp_path: Path) -> None:
    path = tmp_path / "chat.kvc"
    growth = {"name": "h2o", **SMALL, "kept_tokens": 24}
    pipe.start_chat(context=pipe.compress(TEXT, policy=ZIP))
    first = pipe.generate("What is it called?", policy=growth, **ASK)
    pipe.chat_context().save(path)
    second = pipe.generate("Where does it lie?", policy=growth, **ASK)
    pipe.start_chat(context=Context.load(path, pipe))
    assert first
    assert pipe.generate("Where does it lie?", policy=growth, **ASK) == second
    pipe.finish_chat()
    assert_nothing_left(pipe)


@pytest.mark.parametrize(
    ("field", "cache"),
    {
        "key_precision": {"key_precision": "u4"},
        "value_precision": {"value_precision": "f32"},
        "recent_tokens": {"recent_tokens": 64},
        "group_size": {"group_size": 16},
    }.items(),
)
def test_other_storage_is_refused_by_name(
    field: str, cache: dict[str, Any], pipe: LLMPipeline, folder: Path, tmp_path: Path
) -> None:
    with pipe.compress(TEXT, policy=ZIP) as context:
        context.save(tmp_path / "text.kvc")
    other = make_pipe(folder, **cache)
    with pytest.raises(ContextFileError, match=f"{field} must be {next(iter(cache.values()))}, got"):
        Context.load(tmp_path / "text.kvc", other)
    assert_nothing_left(other)


@pytest.mark.parametrize(("saved", "loaded"), [({}, {1: 0}), ({1: 0}, {})], ids=["none", "shared"])
def test_another_map_of_shared_layers_is_refused(
    saved: dict[int, int], loaded: dict[int, int], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.kvc"
    pipe, other = (make_pipe(folder, shared_layers=shared) for shared in (saved, loaded))
    twin = make_pipe(folder, shared_layers=saved)
    with pipe.compress(TEXT, policy=ZIP) as context:
        context.save(path)
        with Context.load(path, twin) as again:
            assert twin.generate("Where?", context=again, **ASK) == pipe.generate("Where?", context=context, **ASK)
    names = ["1: 0" if shared else "none" for shared in (loaded, saved)]
    with pytest.raises(ContextFileError, match=f"shared_layers must be {names[0]}, got {names[1]}"):
        Context.load(path, other)
    for one in (pipe, twin, other):
        assert_nothing_left(one)


def test_another_models_context_is_refused_by_name(
    pipe: LLMPipeline, folder: Path, tiny_ir: Callable[[str], Path], tmp_path: Path
) -> None:
    with pipe.compress(TEXT, policy=ZIP) as context:
        context.save(tmp_path / "text.kvc")
    with pytest.raises(ContextFileError, match="model must be"):
        Context.load(tmp_path / "text.kvc", make_pipe(tiny_ir("qwen2")))
    twin = shutil.copytree(folder, tmp_path / "twin")
    with (twin / "openvino_tokenizer.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ContextFileError, match="tokenizer must be"):
        Context.load(tmp_path / "text.kvc", make_pipe(twin))


def test_bad_files_and_moments(pipe: LLMPipeline, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.kvc"
    with pytest.raises(ContextFileError, match="path must be a file that can be read"):
        Context.load(path, pipe)
    context = pipe.compress(TEXT, policy=ZIP)
    context.save(path)
    with pytest.raises(ContextFileError):
        context.save(tmp_path / "nowhere" / "text.kvc")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.with_suffix(".bad").write_bytes(data)
    with pytest.raises(ContextFileError):
        Context.load(path.with_suffix(".bad"), pipe)
    too_few = context.nbytes - 1
    context.close()
    with pytest.raises(RequestError, match="context must be open"):
        context.save(path)
    small = make_pipe(folder, max_bytes=too_few)
    with pytest.raises(OutOfMemory):
        Context.load(path, small)
    genai = LLMPipeline(folder, engine="genai")
    with pytest.raises(ContextFileError, match="engine='crush', got 'genai'"):
        Context.load(path, genai)
    assert_nothing_left(pipe)


WRONG = (None, True, -1, 1 << 70, 1.5, float("inf"), "x", "", [], ["x"], [[]], {}, {"x": 1})


def fields_of(values: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to all values of a header, those inside others too."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [*([way] if way else []), *(x for key, value in inner for x in fields_of(value, (*way, key)))]


def test_a_field_of_another_type_is_refused_or_harmless(pipe: LLMPipeline, tmp_path: Path) -> None:
    """Every field of the header with every kind of value, rightly signed: the file's own error, or a whole context."""
    path = tmp_path / "text.kvc"
    with pipe.compress(TEXT, policy=ZIP) as context:
        context.save(path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    texts = header["__metadata__"]
    names = [name for name in texts if name not in ("format", "layout_version", "sha256")]
    refused = set()
    for name in names:
        for way in fields_of(json.loads(texts[name])):
            for wrong in WRONG:
                values = json.loads(texts[name])
                place = values
                for key in way[:-1]:
                    place = place[key]
                place[way[-1]] = wrong
                changed = {**header, "__metadata__": {**texts, name: json.dumps(values)}}
                path.write_bytes(signed(json.dumps(changed, separators=(",", ":")).encode(), data[end:]))
                try:
                    Context.load(path, pipe).close()
                except ContextFileError:
                    refused.add((name, *way))
    assert {("extra", name) for name in ("rendered", "messages", "is_open", "base", "base_kept", "seconds")} <= refused
    assert_nothing_left(pipe)


# -- one reading, many policies ----------------------------------------------------------------------------------------


def test_one_reading_serves_every_policy_as_its_own_would(folder: Path) -> None:
    pipe = make_pipe(folder, **EXACT)
    policies = [build(**{**policy, "chunk": 64} if policy["name"] == "kvzip" else policy) for policy in POLICIES]
    policies = [policy for policy in policies if getattr(policy.inputs.replay, "sample", 1) == 1]
    with pipe.compress(TEXT, policy="none") as whole:
        ids = whole.ids
    together = pipe.compress_ids(ids, policies)
    questions = pipe.get_tokenizer().encode("\nWhere?", add_special_tokens=False).input_ids.data[0].astype(np.int64)
    config = pipe._options(None, ASK)
    answers = pipe.answer_each([(context, questions) for context in together], config)
    for policy, context, answer in zip(policies, together, answers, strict=True):
        alone = pipe.compress_ids(ids, [policy])[0]
        assert as_lists(context.kept_map().positions) == as_lists(alone.kept_map().positions)
        assert context.nbytes == alone.nbytes
        assert pipe.answer_each([(alone, questions)], config) == [answer]
    del context, alone, together, whole
    assert_nothing_left(pipe)


def test_policies_of_one_reading_must_agree_on_the_second(pipe: LLMPipeline) -> None:
    ids = np.arange(5, 205, dtype=np.int64)
    with pytest.raises(RequestError, match="policies must agree on how a text is read again"):
        pipe.compress_ids(ids, [build(**ZIP), build(**{**ZIP, "sample": 0.5})])
    with pytest.raises(RequestError, match="policies must have at least one, got none"):
        pipe.compress_ids(ids, [])
    assert_nothing_left(pipe)
