"""What is measured: frozen, checked before anything heavy starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ov_kvcrush.bench.peers import LLAMA_CPP, check_llama_cpp
from ov_kvcrush.cli.parse import Property, check_at_least, check_numbers
from ov_kvcrush.config import ENGINES, PRECISIONS, WEIGHTS, CacheConfig, parse_recall
from ov_kvcrush.errors import CrushError, ModelError
from ov_kvcrush.genai.eviction import closest_genai_eviction
from ov_kvcrush.kvcache.block_pool import blocks_for
from ov_kvcrush.model.converted import folder_of_gguf, tell
from ov_kvcrush.model.default import default_model_path, installed_gguf
from ov_kvcrush.model.folder import IR_NAME, check_model_folder
from ov_kvcrush.model.gguf.convert import sha256_of_file
from ov_kvcrush.model.gguf.reader import read_gguf_header
from ov_kvcrush.model.info import ModelInfo, read_model_info
from ov_kvcrush.policies.base import Policy
from ov_kvcrush.policies.registry import settings_of
from ov_kvcrush.utils import checks

OURS = "crush"
RECALLING = "crush-recall"  # ours with recall_tokens, beside ours without
EVICTING = "genai-policy"  # openvino_genai with what it has of the policy
RIVALS = (*(name for name in ENGINES if name != OURS), EVICTING, LLAMA_CPP)

# Properties of cache precision, which --key-precision and --value-precision stand for.
_PRECISION_PROPERTIES = ("KV_CACHE_PRECISION", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION")


@dataclass(frozen=True)
class Cell:
    """One place of the table: `batch` requests of `context` prompt tokens each, added at once."""

    context: int
    batch: int


@dataclass(frozen=True)
class BenchSettings:
    """Everything that decides a measurement; each engine gets the same.

    model: folder of the model, already checked.
    vocab_size: prompts are random ids below it, the same for every engine and every run.
    context_length: tokens the model was made for, None where nothing on disk says it.
    new_tokens: generated per request; at least 2, because the time per token needs two.
    key_precision, value_precision: of the cache, None = each engine's default. An engine that has not got them keeps
        its default.
    max_kv_mb: limit of our store in MiB, None = by the free memory; other engines get what the cell needs.
    budget: bytes of our cache over those of bf16, as CacheConfig.budget; None = by precisions and policy.
    recall_tokens: what our decode steps read, as CacheConfig.recall_tokens; None = everything.
    recalls_beside: measure our engine twice, without recall_tokens and with.
    warm_up: tokens of each prompt that the warm-up reads, None = all. Reading all takes as long as a run.
    weights: who multiplies with them in our engine, as CacheConfig.weights; None = its default.
    gguf: the file that `model` was converted from, for llama.cpp.
    prompt_lookup: whether each engine guesses tokens by its own prompt lookup. Random prompts repeat nothing, so what
        it finds is in the answers.
    policy: what stays in our cache, None = everything. Of the others "genai-policy" alone evicts: as many tokens.
    Raises CrushError naming the option, its rule and the value.
    """

    model: Path
    vocab_size: int
    context_length: int | None
    contexts: tuple[int, ...] = (1024,)
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 64
    runs: int = 3
    against: str | None = None
    max_num_batched_tokens: int = 512
    properties: Mapping[str, Property] = field(default_factory=dict)
    seed: int = 0
    key_precision: str | None = None
    value_precision: str | None = None
    max_kv_mb: int | None = None
    policy: Policy | None = None
    budget: str | None = None
    recall_tokens: str | None = None
    recalls_beside: bool = False
    weights: str | None = None
    gguf: Path | None = None
    prompt_lookup: bool = False
    warm_up: int | None = None

    def __post_init__(self) -> None:
        for option, values in (("context", self.contexts), ("batch", self.batches)):
            check_numbers(option, values)
        check_at_least("new-tokens", self.new_tokens, 2)
        check_at_least("runs", self.runs, 1)
        check_at_least("warm-up", 1 if self.warm_up is None else self.warm_up, 1)
        check_at_least("max-num-batched-tokens", self.max_num_batched_tokens, 1)
        check_at_least("max-kv-mb", 1 if self.max_kv_mb is None else self.max_kv_mb, 1)
        if max(self.batches) > self.max_num_batched_tokens:
            limit = f"--max-num-batched-tokens={self.max_num_batched_tokens}"
            raise CrushError(f"--batch must be at most {limit}, got {max(self.batches)}")
        check_choice("against", self.against, RIVALS)
        check_choice("weights", self.weights, WEIGHTS)
        self._check_policy()
        self._check_peer()
        if self.budget is not None:
            named = {"key_precision": self.key_precision, "value_precision": self.value_precision}
            given = {name: value for name, value in named.items() if value is not None}
            CacheConfig.from_options({"budget": self.budget, **given})
        if self.recall_tokens is not None:
            parse_recall(self.recall_tokens)
        check_precisions(self.key_precision, self.value_precision, self.properties)
        longest = max(self.contexts)
        if self.context_length is not None and longest + self.new_tokens > self.context_length:
            raise CrushError(
                f"--context plus --new-tokens must be at most the model's context of {self.context_length} tokens, "
                f"got {longest} + {self.new_tokens}"
            )

    def _check_policy(self) -> None:
        if self.against != EVICTING:
            return
        if self.policy is None or not self.policy.evicts:
            raise CrushError(f"--against {EVICTING} must come with a --policy that evicts, got none")
        for context in self.contexts:
            closest_genai_eviction(self.policy, self.policy.budget.tokens(context))

    def _check_peer(self) -> None:
        if self.against != LLAMA_CPP:
            if self.gguf is not None:
                raise CrushError(f"--gguf must be left out without --against {LLAMA_CPP}, got {str(self.gguf)!r}")
            return
        check_llama_cpp()
        if max(self.batches) > 1:
            raise CrushError(f"--batch must be 1 with --against {LLAMA_CPP}, got {max(self.batches)}")

    @classmethod
    def for_model(cls, model: str | Path | None, **options: Any) -> BenchSettings:
        """Build for a model folder or a GGUF file, None = the default model.

        `options` are the fields that follow from no model. Raises ModelError for a folder or file that is missing or
        broken, CrushError for an option that cannot be.
        """
        # First with a made-up model: a wrong option shall not wait for the default model to be converted.
        cls(Path(), 1, None, **options)
        model, gguf = _folder_and_gguf(model, options.pop("gguf", None))
        check_model_folder(model)
        info = read_model_info(model)
        if options.get("against") == LLAMA_CPP:
            options["gguf"] = _checked_gguf(gguf, model, info)
        vocab_size = info.vocab_size if info else _vocab_size_of_graph(Path(model))
        return cls(Path(model), vocab_size, info.context_length if info else None, **options)

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines in the order in which they take turns."""
        ours = (OURS, RECALLING) if self.recalls_beside else (OURS,)
        return ours if self.against is None else (*ours, self.against)

    def recall_of(self, engine: str) -> str | None:
        """What the decode steps of `engine` read; None = everything."""
        return self.recall_tokens if engine == (RECALLING if self.recalls_beside else OURS) else None

    @property
    def cells(self) -> list[Cell]:
        """All combinations of context and batch, small ones first as given."""
        return [Cell(context, batch) for context in self.contexts for batch in self.batches]

    def worker_job(self, engine: str, cell: Cell) -> dict[str, object]:
        """What a worker is told, as JSON values. Apart from `engine` it is the same for every engine."""
        return {
            "engine": engine,
            "model": str(self.model),
            "properties": dict(self.properties),
            "max_num_batched_tokens": self.max_num_batched_tokens,
            # Exactly what the cell needs: nobody preempts or reserves more. A store takes memory as it fills instead.
            "num_kv_blocks": cell.batch * blocks_for(cell.context + self.new_tokens),
            "key_precision": self.key_precision,
            "value_precision": self.value_precision,
            "max_kv_bytes": (self.max_kv_mb or 0) << 20,
            "policy": None if self.policy is None else settings_of(self.policy),
            "budget": self.budget,
            "recall_tokens": self.recall_of(engine),
            "weights": self.weights,
            "gguf": self.gguf and str(self.gguf),
            "prompt_lookup": self.prompt_lookup,
            "max_num_seqs": max(cell.batch, 256),
            "context": cell.context,
            "batch": cell.batch,
            "vocab_size": self.vocab_size,
            "seed": self.seed,
        }


def _folder_and_gguf(model: str | Path | None, gguf: Path | None) -> tuple[Path, Path | None]:
    """The model's folder, and the file that it was made of where that is known."""
    if model is None:
        return default_model_path(), gguf or installed_gguf(tell)
    if Path(model).suffix != ".gguf" or Path(model).is_dir():
        return Path(model), gguf
    if gguf is not None:
        raise CrushError(f"--gguf must be left out with a GGUF file as MODEL, got {str(gguf)!r}")
    return folder_of_gguf(Path(model)), Path(model)


def _checked_gguf(gguf: Path | None, model: Path, info: ModelInfo | None) -> Path:
    """Raise CrushError unless `model` was converted from this file, ModelError for a file that is none."""
    if gguf is None:
        raise CrushError(
            f"--against {LLAMA_CPP} must have a GGUF file, as MODEL or by --gguf beside the folder that was converted "
            f"from it, got {str(model)!r}"
        )
    read_gguf_header(gguf)
    if info is None or info.source_sha256 != sha256_of_file(gguf):
        raise CrushError(f"--gguf must be the file that {str(model)!r} was converted from, got {str(gguf)!r}")
    return gguf


def _vocab_size_of_graph(model: Path) -> int:
    import openvino as ov

    try:
        output = ov.Core().read_model(model / f"{IR_NAME}.xml").output("logits")
        return int(output.partial_shape[-1].get_length())
    except RuntimeError:
        raise ModelError(f"model must be an LLM with an output 'logits' of known size, got {str(model)!r}") from None


def check_choice(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Raise CrushError naming the option unless its value is None or one of `choices`."""
    if value is not None:
        checks.check_choice(f"--{option}", value, choices)


def check_precisions(key: str | None, value: str | None, properties: Mapping[str, Property]) -> None:
    """Raise CrushError for a type that there is not, and for one that is given as a property too."""
    for option, name in (("key-precision", key), ("value-precision", value)):
        check_choice(option, name, PRECISIONS)
        for twin in _PRECISION_PROPERTIES:
            if name is not None and twin in properties:
                raise CrushError(f"--property {twin} must be left out with --{option}, got {properties[twin]!r}")
