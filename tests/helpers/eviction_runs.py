"""Engines with policies for the tests: what every row of a run attended to is noted, to be computed by eager code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as ov_genai
import pytest
from held import hold
from tiny_models import VOCAB_SIZE

from ov_kvcrush import CacheConfig, SchedulerConfig
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.core.eviction import EvictionState
from ov_kvcrush.core.request import Sequence as Line
from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.engine.handle import GenerationHandle
from ov_kvcrush.engine.scheduler import SchedulerOutput
from ov_kvcrush.kvcache.sequence_kv import SequenceKV
from ov_kvcrush.model.load import load_model
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import build, names

F32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
EXACT = {"key_precision": "f32", "value_precision": "f32"}
SMALL = {"sink_tokens": 2, "recent_tokens": 6, "min_tokens": 16, "stride": 8}  # for texts of a hundred tokens
VARIANTS: list[dict[str, Any]] = [
    *({"name": name} for name in names() if name != "none"),
    {"name": "snapkv", "split": "global"},
    {"name": "kvcrush", "split": "ada"},
    {"name": "kvcrush", "page": 8},
    {"name": "kvzip", "split": "heads", "chunk": 32},
    {"name": "kvcrush", "scorer": "kvzip", "split": "global", "chunk": 32, "sees": "all"},
]

READ_ONCE = [variant for variant in VARIANTS if not build(**variant).inputs.replay]
READ_TWICE = [variant for variant in VARIANTS if variant not in READ_ONCE]
TOLERANCE = 1e-3  # of logits whose size is about 10

Positions = list[list[np.ndarray]]  # [layer][KV head], ascending


def make_engine(folder: Path, cache: dict[str, Any] | None = None, **scheduler: Any) -> Engine:
    config = CacheConfig(**(cache or EXACT))
    model = load_model(folder, "CPU", F32, "crush", config.sharing)
    settings = SchedulerConfig(**{"max_num_batched_tokens": 64, **scheduler})
    return Engine(model, settings, ov_genai.GenerationConfig(), lambda ids: "", config)


def small(variant: dict[str, Any], **settings: Any) -> Policy:
    return build(**{**SMALL, "kept_tokens": 24, **variant, **settings})


def prompt(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, n)


def add(
    engine: Engine,
    index: int,
    ids: np.ndarray,
    policy: Policy | None = None,
    new_tokens: int = 12,
    protect: Sequence[tuple[int, int]] = (),
    use: dict[str, Any] | None = None,
    **options: Any,
) -> GenerationHandle:
    """use: what else the CacheParams says."""
    config = ov_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, **options)
    params = CacheParams(policy=policy, protect=tuple(protect), **(use or {}))
    return hold(engine, engine.add(index, ids, config, params))


def run(engine: Engine) -> None:
    while engine.has_unfinished():
        engine.step()


def read_prompt(engine: Engine, handle: GenerationHandle) -> Line:
    """Step until the first token is there."""
    while not tokens(handle)[0]:
        engine.step()
    return line_of(handle)


def tokens(handle: GenerationHandle) -> list[list[int]]:
    return [output.generated_ids for output in handle.outputs()]


def line_of(handle: GenerationHandle, index: int = 0) -> Line:
    return handle.request.sequences[index]


def kv_of(engine: Engine, line: Line) -> SequenceKV:
    """What the cache knows of a sequence that runs."""
    cache: Any = engine.cache
    known: SequenceKV = cache.kv_of(line)
    return known


def state_of(engine: Engine, line: Line) -> EvictionState:
    """What policies left of a sequence, also of one that has ended."""
    return line.final_state or engine.cache.eviction_state(line)


def nbytes(engine: Engine) -> int:
    return engine.metrics().kv_cache_size_in_bytes


def held(engine: Engine, line: Line) -> Positions:
    """What is cached of each head; of a prompt that is still staged everything."""
    memory: Any = engine.cache
    kv = memory.kv_of(line)
    if kv.is_staged:
        return [[np.arange(line.num_cached)] * num_kv_heads for _, num_kv_heads in memory._heads]
    return [
        [np.sort(memory.store.positions(kv.store_id, layer, head)) for head in range(num_kv_heads)]
        for layer, (_, num_kv_heads) in enumerate(memory._heads)
    ]


def counts(positions: Positions) -> np.ndarray:
    """(L, K)"""
    return np.array([[len(head) for head in layer] for layer in positions])


def as_lists(positions: Positions) -> list[list[list[int]]]:
    return [[head.tolist() for head in layer] for layer in positions]


# -- what was attended to ----------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """One sequence. sees: of each layer bool (K, T, T): row, token. end: rows so far. logits: of the rows that gave the
    tokens from `first` on; the others ran before the KV was lost and computed again.
    """

    line: Line
    sees: list[np.ndarray]
    end: int
    first: int = 0
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def rows(self) -> np.ndarray:
        """Rows of `logits`."""
        return self.line.request.num_prompt_tokens - 1 + self.first + np.arange(len(self.logits))


class Tracer:
    """Runs an engine and notes what each row of it sees: what the store holds before the row, and the row's own step.

    Rows of a second reading are no part of any answer, and not noted.
    sizes: of each row the tokens before it, and how many of them each head held, (L, K). max_tokens: of a text.
    """

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        self._engine = engine
        self._memory: Any = engine.cache
        self._max_tokens = max_tokens
        self._traces: dict[Line, Trace] = {}
        self._kept: dict[int, Trace] = {}  # by the store's number of a kept prefix or a context
        self._origins: dict[Line, Trace] = {}  # of sequences that begin on a kept prefix
        self.sizes: list[tuple[int, np.ndarray]] = []

    def run(self) -> None:
        """All requests to their end."""
        with self.noting():
            run(self._engine)

    def of(self, handle: GenerationHandle) -> list[Trace]:
        """Of the sequences of a request. One that never ran has none."""
        return [self._traces[line] for line in handle.request.sequences if line in self._traces]

    @contextmanager
    def noting(self) -> Iterator[None]:
        """While the engine steps inside."""
        with pytest.MonkeyPatch.context() as patch:
            runner, memory, prefixes = self._engine._runner, self._memory, self._memory.prefixes
            plans: list[SchedulerOutput] = []
            matches: list[Any] = []

            def prepare(plan: SchedulerOutput, then: Any = runner.prepare) -> None:
                plans.append(plan)
                for row in plan.rows:
                    if row.sequence.replays is None:
                        self._note(row.sequence, row.num_tokens)
                then(plan)

            def infer(then: Any = runner.infer) -> np.ndarray:
                logits = then()
                for row, values in zip([row for row in plans[-1].rows if row.samples], logits, strict=True):
                    self._traces[row.sequence].logits.append(values.copy())
                return logits

            def match(*args: Any, then: Any = prefixes.match) -> Any:
                matches.append(then(*args))
                return matches[-1]

            def allocate(line: Line, then: Any = memory.allocate) -> bool:
                is_allocated = then(line)
                if is_allocated and line.num_cached:
                    self._origins[line] = self._kept[(line.request.context or matches[-1][0]).store_id]
                return is_allocated

            def _share(line: Line, then: Any = memory._share) -> Any:
                kv = then(line)
                if kv is not None and line in self._traces:
                    self._kept[kv.store_id] = self._traces[line]
                return kv

            for owner, function in (
                (runner, prepare),
                (runner, infer),
                (prefixes, match),
                (memory, allocate),
                (memory, _share),
            ):
                patch.setattr(owner, function.__name__, function)
            yield

    def _note(self, line: Line, num_tokens: int) -> None:
        begin, end = line.num_cached, line.num_cached + num_tokens
        before = held(self._engine, line)
        trace = self._traces.get(line)
        if trace is None or trace.end != begin or line in self._origins:
            trace = self._traces[line] = self._new(line, begin)
        for layer, heads in zip(trace.sees, before, strict=True):
            layer[:, begin:end, begin:end] = np.tri(num_tokens, dtype=bool)
            for head, positions in zip(layer, heads, strict=True):
                head[begin:end, positions] = True
        trace.end = end
        self.sizes.append((begin, counts(before)))

    def _new(self, line: Line, begin: int) -> Trace:
        """Of a sequence that begins with nothing, on the KV of one that ended, or as the twin of another one."""
        shape = (self._max_tokens, self._max_tokens)
        trace = Trace(line, [np.zeros((num_kv_heads, *shape), bool) for _, num_kv_heads in self._memory._heads], begin)
        trace.first = line.num_generated
        if begin:
            is_twin = line not in self._origins
            source = self._traces[line.request.sequences[0]] if is_twin else self._origins.pop(line)
            for mine, theirs in zip(trace.sees, source.sees, strict=True):
                mine[:, :begin] = theirs[:, :begin]
            if is_twin:
                trace.first, trace.logits = 0, source.logits[:1]
        return trace


# -- the same in eager code --------------------------------------------------------------------------------------------

Eager = Callable[[np.ndarray, "list[np.ndarray] | None"], np.ndarray]  # ids (T,), what rows see -> logits (T, V)


def eager_model(folder: Path) -> Eager:
    """Hugging Face's model in float32, with what a row does not see masked per layer and KV head."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    attentions = [m for name, m in model.named_modules() if name.endswith((".self_attn", ".attention"))]
    hidden: list[torch.Tensor] = []  # of each layer (1, H, T, T), added to the causal mask

    def with_mask(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + hidden[layer]}

        return hook

    for layer, attention in enumerate(attentions):
        attention.register_forward_pre_hook(with_mask(layer), with_kwargs=True)

    def logits(ids: np.ndarray, sees: list[np.ndarray] | None) -> np.ndarray:
        size, num_heads = len(ids), model.config.num_attention_heads
        hidden.clear()
        for layer in range(len(attentions)):
            visible = np.ones((1, size, size), bool) if sees is None else sees[layer][:, :size, :size]
            by_query_head = np.repeat(visible, num_heads // len(visible), axis=0)
            hidden.append(torch.from_numpy(np.where(by_query_head, np.float32(0), np.float32(-np.inf)))[None])
        with torch.no_grad():
            return model(torch.from_numpy(ids)[None]).logits[0].numpy()

    return logits


def assert_logits_equal(traces: Sequence[Trace], eager: Eager) -> None:
    """Of every row that gave a token, those of eager attention to what the row sees."""
    assert traces
    for trace in traces:
        expected = eager(trace.line.ids[: trace.end], trace.sees)[trace.rows]
        np.testing.assert_allclose(np.stack(trace.logits), expected, atol=TOLERANCE, rtol=0)
