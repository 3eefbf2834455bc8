"""Where an answer ends, and what counts as the answer."""

from __future__ import annotations

import openvino_genai as ov_genai

from ov_kvcrush.core.request import FinishReason, Sequence


def finish_reason(sequence: Sequence, token: int) -> ov_genai.GenerationFinishReason:
    """Why `sequence` ends with `token`, NONE if it goes on."""
    params = sequence.request.params
    if sequence.stop_tracker and sequence.stop_tracker.add(token):
        return FinishReason.STOP
    if token in params.stop_token_ids and sequence.num_generated >= params.min_new_tokens:
        return FinishReason.STOP
    if sequence.num_generated >= params.max_new_tokens:
        return FinishReason.LENGTH
    return FinishReason.NONE


def settle_answer(sequence: Sequence) -> None:
    """Fix the ids, and for a stop string the text, of an ended sequence."""
    ids = sequence.generated.tolist()
    tracker = sequence.stop_tracker
    if tracker and tracker.match:
        length = tracker.match[sequence.request.params.include_stop_str_in_output]
        sequence.final_text = tracker.text[:length]
        ids = ids[: tracker.num_tokens_within(length)]
    sequence.final_ids = ids
