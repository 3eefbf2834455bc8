"""From tokens to whatever a caller streams to: a callable, a StreamerBase, a TextStreamer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import openvino_genai as ov_genai

from ov_kvcrush.core.stop_strings import StopStringTracker
from ov_kvcrush.errors import RequestError
from ov_kvcrush.pipelines.backend import Handle

StreamingStatus = ov_genai.StreamingStatus
TextCallback = Callable[[str], ov_genai.StreamingStatus | bool | None]
Streamer = Any  # an ov_genai.StreamerBase or a TextCallback


class TokenSink(Protocol):
    """Takes the tokens of one sequence, one by one."""

    def write(self, token: int) -> ov_genai.StreamingStatus: ...

    def end(self, text: str | None) -> None:
        """text: all of the answer, where it is not that of its tokens."""


def make_sink(
    streamer: Streamer | None, tokenizer: ov_genai.Tokenizer, config: ov_genai.GenerationConfig
) -> TokenSink | None:
    """Wrap what the caller gave. Text goes through openvino_genai's TextStreamer, which holds incomplete UTF-8 back;
    with stop strings it goes through a tracker, which also holds back what may become a stop string.

    Raises RequestError if it is neither a callable nor a StreamerBase.
    """
    if streamer is None:
        return None
    stops = tuple(sorted(config.stop_strings))
    if isinstance(streamer, ov_genai.StreamerBase):
        base = _StatusOf(streamer)
        return _TokenHoldBack(base, _tracker(stops, tokenizer), config) if stops else base
    if not callable(streamer):
        raise RequestError(f"streamer must be a callable or a StreamerBase, got {type(streamer).__name__}")
    if stops:
        return _TextHoldBack(streamer, _tracker(stops, tokenizer), config)
    callback = streamer  # TextStreamer wants a status or a bool back, callers may return None
    return _StatusOf(ov_genai.TextStreamer(tokenizer, lambda text: as_status(callback(text))))


def _tracker(stops: tuple[str, ...], tokenizer: ov_genai.Tokenizer) -> StopStringTracker:
    return StopStringTracker(stops, tokenizer.decode)


def as_status(answer: Any) -> ov_genai.StreamingStatus:
    """What a callback's answer means: None and False go on, True stops, a StreamingStatus is itself."""
    if isinstance(answer, StreamingStatus):
        return answer
    return StreamingStatus.STOP if answer else StreamingStatus.RUNNING


class _StatusOf:
    """A StreamerBase whose `write` may answer anything that a callback may."""

    def __init__(self, streamer: ov_genai.StreamerBase) -> None:
        self._streamer = streamer

    def write(self, token: int) -> ov_genai.StreamingStatus:
        if isinstance(self._streamer, ov_genai.TextParserStreamer):  # its `write` is the caller's, of parsed messages
            return as_status(self._streamer._write([token]))
        return as_status(self._streamer.write(token))

    def end(self, text: str | None) -> None:
        self._streamer.end()


class _TextHoldBack:
    """Text for a callable, without the stop string and without its beginnings until they are known to be none."""

    def __init__(self, callback: TextCallback, tracker: StopStringTracker, config: ov_genai.GenerationConfig) -> None:
        self._callback = callback
        self._tracker = tracker
        self._include = config.include_stop_str_in_output
        self._num_shown = 0

    def write(self, token: int) -> ov_genai.StreamingStatus:
        if not self._tracker.match:
            self._tracker.add(token)
        return self._show(self._limit())

    def end(self, text: str | None) -> None:
        if text is not None:  # of the token that a stop string begins in, a part belongs to the answer
            rest = text[self._num_shown :]
            if rest:
                self._callback(rest)
            return
        self._show(self._limit() if self._tracker.match else len(self._tracker.text))

    def _limit(self) -> int:
        match = self._tracker.match
        return match[1] if match and self._include else self._tracker.safe_length

    def _show(self, length: int) -> ov_genai.StreamingStatus:
        text = self._tracker.text[self._num_shown : length]
        self._num_shown = max(length, self._num_shown)
        return as_status(self._callback(text)) if text else StreamingStatus.RUNNING


class _TokenHoldBack:
    """Tokens for a StreamerBase, without those of the stop string."""

    def __init__(self, sink: TokenSink, tracker: StopStringTracker, config: ov_genai.GenerationConfig) -> None:
        self._sink = sink
        self._tracker = tracker
        self._include = config.include_stop_str_in_output
        self._tokens: list[int] = []
        self._num_shown = 0

    def write(self, token: int) -> ov_genai.StreamingStatus:
        if not self._tracker.match:
            self._tokens.append(token)
            self._tracker.add(token)
        match = self._tracker.match
        length = match[self._include] if match else self._tracker.safe_length
        return self._show(self._tracker.num_tokens_within(length))

    def end(self, text: str | None) -> None:
        if not self._tracker.match:
            self._show(len(self._tokens))
        self._sink.end(text)

    def _show(self, num_tokens: int) -> ov_genai.StreamingStatus:
        status = StreamingStatus.RUNNING
        while self._num_shown < num_tokens and status == StreamingStatus.RUNNING:
            status = self._sink.write(self._tokens[self._num_shown])
            self._num_shown += 1
        return status


def pump(handle: Handle, sink: TokenSink) -> None:
    """Write the tokens of `handle` to `sink` as they come, to the end; or stop or cancel it when the sink says so.

    Its answer is then what was written, however far the engine is. An exception of the caller's streamer goes on.
    """
    num_written = 0
    for outputs in handle:
        for token in outputs[0].generated_ids:
            status = sink.write(token)
            num_written += 1
            if status != StreamingStatus.RUNNING:
                handle.end_at(num_written, is_cancelled=status == StreamingStatus.CANCEL)
                sink.end(None)
                return
    sink.end(handle.outputs()[0].text)
