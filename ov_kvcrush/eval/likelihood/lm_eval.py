"""A model for the package lm-eval: `python -m ov_kvcrush.eval.likelihood.lm_eval --model ov_kvcrush --tasks ...`.

lm-eval finds the models of other packages only if something registers them before its command line runs, which this
module does when it is run; the arguments are those of the command `lm_eval`. In Python `register()` does the same for
`lm_eval.simple_evaluate(model="ov_kvcrush", ...)`. `--model_args` has the names of lm_eval_arguments.py:
`pretrained=FOLDER,policy=kvcrush,kept=0.25,key_precision=u8,value_precision=u4`.
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.eval.likelihood.forcing import Score
from ov_kvcrush.eval.likelihood.lm_eval_arguments import generation_options, sort_arguments
from ov_kvcrush.eval.likelihood.pipeline import ScoringPipeline
from ov_kvcrush.eval.likelihood.scoring import scores_of

LM_EVAL_MODEL_NAME = "ov_kvcrush"
INSTALL = "pip install ov-kvcrush[lm-eval]"
_TOGETHER = 32  # requests that are given to the engine at once, where the user leaves it to us


class Adapter:
    """What lm-eval asks of a model; `model_class` joins it with lm-eval's own base, TemplateLM.

    Keyword arguments are those of `--model_args`. Raises CrushError before anything heavy starts.
    """

    cache_hook: Any  # lm-eval's: told each result, where its command has --use_cache
    backend = "causal"

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        configs = sort_arguments(arguments)
        self._arguments = configs.own
        self._pipeline = ScoringPipeline(
            configs.own.pretrained, configs.own.device, configs.own.engine, configs.cache, configs.scheduler,
            configs.properties,
        )  # fmt: skip
        self.tokenizer = self._pipeline.get_tokenizer()
        # A sequence of max_length tokens and one more that it predicts is the longest that lm-eval asks for.
        limit = self._pipeline.max_tokens - 1
        self.max_length = min(configs.own.max_length or limit, limit)

    # -- what lm-eval asks about the model -----------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.get_eos_token_id())

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        first = int(self.tokenizer.get_bos_token_id())
        return first if first >= 0 else self.eot_token_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer, where a task says nothing."""
        return self._arguments.max_gen_toks

    @property
    def batch_size(self) -> int | str:
        """As it was given."""
        return self._arguments.batch_size

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps prepared requests under."""
        return str(self._pipeline.folder.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, for the record. Raises RequestError if there is none, or one is asked for by name."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise RequestError(f"apply_chat_template must be given without a name, got {chat_template!r}")
        if not self.tokenizer.chat_template:
            raise RequestError("apply_chat_template needs a model with a chat template, got one without")
        return str(self.tokenizer.chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without generation prompt it ends in its last message, which goes on."""
        return self._pipeline.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the beginning of texts, as of a chat template, does not get another."""
        if not string:
            return []
        if add_special_tokens is None:
            begin = self.tokenizer.get_bos_token()
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self._pipeline.encode(string, add_special_tokens).tolist()
        return ids

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes to its results, besides the arguments."""
        return {"engine": self._pipeline.engine, "max_length": self.max_length}

    # -- what lm-eval asks of the model --------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to (context, options) of each request."""
        answers: list[str] = []
        count = self._arguments.num_together or _TOGETHER
        with _progress("generate_until", len(requests), disable_tqdm) as advance:
            for begin in range(0, len(requests), count):
                items = [request.args for request in requests[begin : begin + count]]
                options = [generation_options(given, self.max_gen_toks) for _, given in items]
                rows = [self._fitting(args[0], x["max_new_tokens"]) for args, x in zip(items, options, strict=True)]
                texts = self._pipeline.answer(rows, options)
                for args, text in zip(items, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", args, text)
                answers += texts
                advance(len(items))
        return answers

    def _fitting(self, text: str, max_new_tokens: int) -> np.ndarray:
        """The last tokens of a context that leave room for the answer."""
        room = self.max_length + 1 - max_new_tokens
        if room < 1:
            raise RequestError(f"max_gen_toks must be at most max_length={self.max_length}, got {max_new_tokens}")
        ids = self.tok_encode(text) or [self.prefix_token_id]
        return np.array(ids[-room:], np.int64)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Called by lm-eval's `loglikelihood` with the texts and the tokens of contexts and continuations."""
        pairs = []
        for _texts, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise RequestError(
                    f"continuation must have at most max_length={self.max_length} tokens, got {len(continuation)}"
                )
            pairs.append((context[-room:], continuation))
        scores = self._scores(pairs, "loglikelihood", disable_tqdm)
        results = [(score.logprob, score.is_greedy) for score in scores]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, cut where it is longer than the model's context."""
        utils = import_module("lm_eval.utils")
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            found = utils.get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += map(utils.make_disjoint_window, found)
            owners += [index] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for index, score in zip(owners, self._scores(windows, "loglikelihood_rolling", disable_tqdm), strict=True):
            totals[index] += score.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _scores(self, pairs: list[tuple[list[int], list[int]]], name: str, quiet: bool) -> list[Score]:
        engine = self._pipeline.forced_engine(name)
        with _progress(name, len(pairs), quiet) as advance:
            count = self._arguments.num_together or _TOGETHER
            return scores_of(engine, pairs, self._arguments.tail_tokens, count, advance)


class _progress:
    """A bar on standard error; entered, it is the function that moves it on."""

    def __init__(self, name: str, total: int, quiet: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda done: self._bar.advance(self._task, done)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


@functools.cache
def model_class() -> type[Any]:
    """The class that lm-eval makes its model of. Raises CrushError if lm-eval is not installed."""
    return type("OvKVCrushLM", (Adapter, _lm_eval("api.model").TemplateLM), {"__module__": __name__})


def register() -> None:
    """Make the model known to lm-eval. Raises CrushError if lm-eval is not installed."""
    _lm_eval("models")  # registers lm-eval's own, which it does later only where there are none
    registry = _lm_eval("api.registry")
    if LM_EVAL_MODEL_NAME not in registry.MODEL_REGISTRY:
        registry.register_model(LM_EVAL_MODEL_NAME)(model_class())


def _lm_eval(module: str) -> Any:
    try:
        return import_module(f"lm_eval.{module}")
    except ModuleNotFoundError as error:
        raise CrushError(f"lm-eval must be installed, got: {error}; {INSTALL}") from None


def main() -> None:
    """Run lm-eval's command line, which knows the model `ov_kvcrush` then."""
    try:
        register()
        _lm_eval("__main__").cli_evaluate()
    except CrushError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
