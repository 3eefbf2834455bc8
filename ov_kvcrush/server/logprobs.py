"""Log probabilities of tokens, as the API has them."""

from __future__ import annotations

from typing import Any

from ov_kvcrush.core.outputs import GenerationOutput
from ov_kvcrush.server.detokenizer import TokenTexts

_LEAST = -9999.0  # for JSON, which has no infinity


def of_chat(texts: TokenTexts, output: GenerationOutput, num_top: int) -> dict[str, Any]:
    """{"content": a row for each token}. num_top: of the most probable tokens beside it."""
    rows = []
    for place, (token, logprob) in enumerate(zip(output.generated_ids, output.generated_log_probs, strict=False)):
        row = _row(texts, token, logprob)
        row["top_logprobs"] = [_row(texts, other, value) for other, value in _tops(output, place, num_top)]
        rows.append(row)
    return {"content": rows, "refusal": None}


def of_completion(texts: TokenTexts, output: GenerationOutput, num_top: int, offset: int) -> dict[str, Any]:
    """Lists with an entry for each token. offset: characters before the first."""
    tokens = [texts.text(token) for token in output.generated_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    tops = [
        {texts.text(other): _number(value) for other, value in _tops(output, place, num_top)}
        for place in range(len(tokens))
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [_number(x) for x in output.generated_log_probs],
        "top_logprobs": tops if num_top else None,
        "text_offset": offsets,
    }


def _row(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": _number(logprob), "bytes": list(texts.raw(token))}


def _tops(output: GenerationOutput, place: int, num_top: int) -> list[tuple[int, float]]:
    if not num_top or output.top_logprobs is None:
        return []
    return sorted(output.top_logprobs[place].items(), key=lambda pair: -pair[1])[:num_top]


def _number(logprob: float) -> float:
    return max(float(logprob), _LEAST)
