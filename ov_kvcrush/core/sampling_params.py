"""From openvino_genai's GenerationConfig to what the engine samples by: checked, frozen, the engine's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import openvino_genai as ov_genai

from ov_kvcrush.core.beam_params import UNLIMITED, BeamParams
from ov_kvcrush.errors import RequestError, did_you_mean, reason_of

MAX_LOGPROBS = 20  # for each token, as OpenAI's API has it
MAX_BIAS = 100  # of a logit, as OpenAI's API has it

_FIELDS = tuple(
    n for n in dir(ov_genai.GenerationConfig) if isinstance(vars(ov_genai.GenerationConfig).get(n), property)
)


def make_generation_config(
    base: ov_genai.GenerationConfig | None, options: dict[str, Any]
) -> ov_genai.GenerationConfig:
    """Copy `base` (or a default one) and set `options` on the copy.

    Raises RequestError for an unknown option, naming the nearest, and for a value of the wrong type or sign:
    openvino_genai takes a negative count for "not given".
    """
    config = ov_genai.GenerationConfig()
    if base is not None:
        if not isinstance(base, ov_genai.GenerationConfig):
            raise RequestError(
                f"generation_config must be an openvino_genai.GenerationConfig, got {type(base).__name__}"
            )
        for name in _FIELDS:
            setattr(config, name, getattr(base, name))
    for name, value in options.items():
        if name not in _FIELDS:
            raise RequestError(
                f"generation option must be a field of GenerationConfig, got {name!r}{did_you_mean(name, _FIELDS)}"
            )
        current = getattr(config, name)
        if isinstance(current, int) and isinstance(value, (int, float)) and value < 0 and name != "eos_token_id":
            raise RequestError(f"{name} must be at least 0, got {value!r}")
        try:
            setattr(config, name, value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise RequestError(f"{name} must be of the type of {current!r}, got {value!r}") from None
    return config


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    max_new_tokens counts the tokens of each sequence; stop_token_ids are those of `end_tokens`; top_k = 0 means no
    limit. logprobs: log probabilities for each token, 0 = none, 1 = its own, more = of that many most probable tokens,
    too. logit_bias: (token, what is added to its logit), -inf bans it. beam: None = no beam search.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = 0
    num_return_sequences: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()
    beam: BeamParams | None = None

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"in 0..max_new_tokens={self.max_new_tokens}",
            ),
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "a finite number of at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("repetition_penalty", self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty), "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("logprobs", 0 <= self.logprobs <= MAX_LOGPROBS, f"in 0..{MAX_LOGPROBS}"),
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise RequestError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        if self.beam and self.num_return_sequences > self.beam.num_beams:
            raise RequestError(
                f"num_return_sequences must be at most num_beams={self.beam.num_beams}, got {self.num_return_sequences}"
            )
        if self.num_return_sequences > 1 and self.is_greedy and not self.beam:
            raise RequestError(
                f"num_return_sequences must be 1 for greedy decoding, got {self.num_return_sequences}; "
                "set do_sample=True"
            )
        if any(not s for s in self.stop_strings):
            raise RequestError("stop_strings must be non-empty strings, got ''")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken: no sampling, or a temperature of 0."""
        return not self.do_sample or self.temperature == 0

    @property
    def num_sequences(self) -> int:
        """Sequences that run at the same time: beams, or those that are returned."""
        return self.beam.num_beams if self.beam else self.num_return_sequences

    @property
    def changes_logits(self) -> bool:
        """Whether a bias, a penalty, or a ban on ending, changes the model's logits before a token is chosen."""
        return self.penalises or self.min_new_tokens > 0 or bool(self.logit_bias)

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @classmethod
    def from_config(
        cls,
        config: ov_genai.GenerationConfig,
        defaults: ov_genai.GenerationConfig,
        num_prompt_tokens: int,
        max_tokens: int,
        vocab_size: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
    ) -> SamplingParams:
        """Check `config` and fold in what depends on the model and the prompt.

        defaults: the model's own generation config; see `end_tokens`.
        max_tokens: tokens that prompt and answer together may have; an answer without a length of its own is
            limited by it.
        vocab_size: logits of the model; None = not known. Ids outside it are refused, but for end tokens of the model's
            own config, which the caller cannot help: those are left out.
        logit_bias: {token: number in [-100, 100], or -inf}.
        Raises RequestError naming the field.
        """
        room = max_tokens - num_prompt_tokens
        if config.max_new_tokens != UNLIMITED:
            wanted = config.max_new_tokens
        elif config.max_length != UNLIMITED:
            wanted = config.max_length - num_prompt_tokens
            if wanted < 1:
                raise RequestError(
                    f"max_length must be above the prompt's {num_prompt_tokens} tokens, got {config.max_length}"
                )
        else:
            wanted = room
        min_new = config.min_new_tokens
        beam = BeamParams.from_config(config)
        return cls(
            max_new_tokens=min(wanted, room) if wanted >= 1 else wanted,
            min_new_tokens=min(min_new, room) if min_new <= max(wanted, 0) else min_new,
            stop_token_ids=checked_end_tokens(config, defaults, vocab_size),
            stop_strings=tuple(sorted(config.stop_strings)),
            include_stop_str_in_output=config.include_stop_str_in_output,
            do_sample=config.do_sample,
            temperature=config.temperature,
            top_k=0 if config.top_k == UNLIMITED else config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            seed=config.rng_seed,
            repetition_penalty=config.repetition_penalty,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            logprobs=min(config.logprobs, 1) if beam else config.logprobs,
            num_return_sequences=config.num_return_sequences,
            logit_bias=_checked_bias(logit_bias or {}, vocab_size),
            beam=beam,
        )


def model_end_tokens(defaults: ov_genai.GenerationConfig) -> frozenset[int]:
    """The end tokens of a model, by its own generation config: where it lists several, one is in `eos_token_id`."""
    first = {defaults.eos_token_id} if defaults.eos_token_id >= 0 else set()
    return frozenset(first | set(defaults.stop_token_ids))


def end_tokens(config: ov_genai.GenerationConfig, defaults: ov_genai.GenerationConfig) -> frozenset[int]:
    """The tokens that end an answer.

    All end tokens of the model, and `stop_token_ids` beside them. An `eos_token_id` that is none of the model's takes
    the place of the model's. With `ignore_eos` only those `stop_token_ids` that are no end tokens: openvino_genai
    ignores all of them then, and a config that was read from the model's folder has the model's among them.
    """
    own, eos = model_end_tokens(defaults), config.eos_token_id
    stops = frozenset(config.stop_token_ids)
    if config.ignore_eos:
        return stops - own - {eos}
    return stops | (own if eos < 0 or eos in own else {eos})


def outside_vocabulary(ids: Iterable[int], vocab_size: int | None) -> list[int]:
    """Those that are no tokens, ascending; None = a vocabulary of unknown size."""
    return sorted(i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size))


def checked_end_tokens(
    config: ov_genai.GenerationConfig, defaults: ov_genai.GenerationConfig, vocab_size: int | None
) -> frozenset[int]:
    """`end_tokens` within the vocabulary. Raises RequestError for others, but those of the model's own are left out."""
    ends, own = end_tokens(config, defaults), model_end_tokens(defaults)
    outside = outside_vocabulary(ends, vocab_size)
    for token in outside:
        if token not in own:
            field = "eos_token_id" if token == config.eos_token_id else "stop_token_ids"
            raise RequestError(f"{field} must be {_token_rule(vocab_size)}, got {token}")
    return ends - set(outside)


def _checked_bias(biases: Mapping[int, float], vocab_size: int | None) -> tuple[tuple[int, float], ...]:
    for token, bias in biases.items():
        if isinstance(token, bool) or not isinstance(token, int) or outside_vocabulary([token], vocab_size):
            raise RequestError(f"logit_bias must be of tokens {_token_rule(vocab_size)}, got {token!r}")
        is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not is_number or not (abs(bias) <= MAX_BIAS or bias == -math.inf):
            raise RequestError(f"logit_bias must be in [-{MAX_BIAS}, {MAX_BIAS}] or -inf, got {bias!r} for {token}")
    if vocab_size is not None and sum(bias == -math.inf for bias in biases.values()) >= vocab_size:
        raise RequestError(f"logit_bias must leave a token, got a ban of all {vocab_size}")
    return tuple((token, float(bias)) for token, bias in sorted(biases.items()))


def _token_rule(vocab_size: int | None) -> str:
    return f"in 0..{vocab_size - 1}" if vocab_size is not None else "at least 0"


def check_generation_config(config: ov_genai.GenerationConfig) -> None:
    """Raise RequestError for what openvino_genai finds wrong; a temperature of 0, greedy decoding here, is right."""
    checked = make_generation_config(config, {"temperature": 1.0} if config.temperature == 0 else {})
    try:
        checked.validate()
    except RuntimeError as error:
        raise RequestError(f"generation config must be valid, got: {reason_of(error)}") from None
