"""What the arguments of `ov_kvcrush-chat` mean, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ov_kvcrush.config import check_engine
from ov_kvcrush.engine.sampling_params import SamplingParams, make_generation_config
from ov_kvcrush.errors import RequestError


@dataclass(frozen=True)
class ChatOptions:
    """Model, engine and sampling of one run of the command.

    model: folder of an exported model; None = the default model.
    temperature: 0 = greedy. top_p: in (0, 1], 1 = no limit; only with a temperature above 0.
    engine, device: as in LLMPipeline.
    Raises RequestError or CrushError naming the first field that cannot be used.
    """

    model: str | None = None
    system: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    engine: str | None = None
    device: str = "CPU"

    def __post_init__(self) -> None:
        SamplingParams(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
        if self.top_p != 1 and self.temperature == 0:
            raise RequestError(f"top_p must be 1 while temperature is 0 (greedy), got {self.top_p}; set --temperature")
        make_generation_config(None, self.generation_options())
        check_engine(self.engine, self.device)
        check_unicode("system", self.system)

    def generation_options(self) -> dict[str, Any]:
        """The options for `LLMPipeline.generate`; what is not among them stays as the model's own config has it."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "rng_seed": self.seed}
            if self.top_p != 1:
                options["top_p"] = self.top_p
        return options


def check_unicode(name: str, text: str) -> str:
    """Return `text`; raise RequestError if it came from bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} must be UTF-8 text, got other bytes after {error.start} characters") from None
    return text
