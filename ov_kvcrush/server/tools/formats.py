"""What a model writes to call tools: the formats of Hermes and Qwen, and of Llama 3."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

_HERMES_BEGIN, _HERMES_END = "<tool_call>", "</tool_call>"
_LLAMA_BEGIN = "<|python_tag|>"


@dataclass(frozen=True)
class ToolCall:
    """A call as the API has it. arguments: JSON of an object."""

    name: str
    arguments: str
    id: str = ""

    def as_message(self) -> dict[str, Any]:
        """As a message has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written. name: "hermes" or "llama". in_template: whether the chat template tells of tools itself.

    key: what the arguments are called.
    """

    name: str
    in_template: bool

    @property
    def key(self) -> str:
        """The name of the arguments."""
        return "arguments" if self.name == "hermes" else "parameters"

    def call_text(self, name: str) -> tuple[str, str]:
        """What stands before and behind the arguments of a call, as the model writes it."""
        head = f'{{"name": {json.dumps(name)}, "{self.key}": '
        return (f"{_HERMES_BEGIN}\n{head}", f"}}\n{_HERMES_END}") if self.name == "hermes" else (head, "}")

    def reader(self) -> CallReader:
        """Takes an answer apart."""
        return HermesReader() if self.name == "hermes" else LlamaReader()


def tool_format(wanted: str, template: str) -> ToolFormat:
    """The format that is wanted; "auto" = the one that a chat template names."""
    in_template = bool(re.search(r"\btools\b", template))
    if wanted == "auto":
        is_llama = _HERMES_BEGIN not in template and in_template and '"parameters"' in template
        wanted = "llama" if is_llama else "hermes"
    return ToolFormat(wanted, in_template)


class CallReader:
    """An answer that grows: what of it is text for the caller, and which calls are complete.

    calls: so far.
    """

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self._held = ""

    def add(self, text: str) -> str:
        """More of the answer; returns what of it is no call."""
        self._held += text
        return self._read()

    def end(self) -> str:
        """The rest, also of a call that is none."""
        rest, self._held = self._held, ""
        return rest

    def _read(self) -> str:
        raise NotImplementedError

    def _note(self, text: str, key: str) -> bool:
        """Take a text for a call; False if it is none."""
        found = parse_calls(text, key)
        self.calls += found
        return bool(found)


class HermesReader(CallReader):
    """Calls between <tool_call> and </tool_call>."""

    def _read(self) -> str:
        shown = ""
        while True:
            begin = self._held.find(_HERMES_BEGIN)
            if begin < 0:
                keep = _open_part(self._held, _HERMES_BEGIN)
                shown, self._held = shown + self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                return shown
            shown, self._held = shown + self._held[:begin], self._held[begin:]
            end = self._held.find(_HERMES_END)
            if end < 0:
                return shown
            inner, whole = self._held[len(_HERMES_BEGIN) : end], self._held[: end + len(_HERMES_END)]
            self._held = self._held[len(whole) :]
            if not self._note(inner, "arguments"):
                shown += whole

    def end(self) -> str:
        """A call whose end the model left out counts if it is whole."""
        if self._held.startswith(_HERMES_BEGIN) and self._note(self._held[len(_HERMES_BEGIN) :], "arguments"):
            self._held = ""
        return super().end()


class LlamaReader(CallReader):
    """An answer that is JSON from its first character is calls, several with ; between them."""

    def __init__(self) -> None:
        super().__init__()
        self._is_text = False

    def _read(self) -> str:
        begun = self._held.lstrip()
        if not self._is_text and begun and not begun.startswith("{") and not _LLAMA_BEGIN.startswith(begun[:14]):
            self._is_text = True
        return super().end() if self._is_text else ""

    def end(self) -> str:
        """Whether it was calls is known now."""
        text = self._held.strip().removeprefix(_LLAMA_BEGIN)
        if not self._is_text and self._note(text, "parameters"):
            self._held = ""
        return super().end()


def parse_calls(text: str, key: str) -> list[ToolCall]:
    """All calls in a text of JSON objects, one behind the other or with ; between; none if anything else is in it."""
    decoder, found, at = json.JSONDecoder(), [], 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        call = _as_call(value, key)
        if call is None:
            return []
        found.append(call)
        while at < len(text) and text[at] in " \t\r\n;,":
            at += 1
    return found


def _as_call(value: Any, key: str) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    other = "parameters" if key == "arguments" else "arguments"
    arguments = value.get(key, value.get(other))
    if isinstance(arguments, str):  # some models write the API's form
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False), f"call_{uuid.uuid4().hex[:24]}")


def _open_part(text: str, mark: str) -> int:
    """Length of the longest beginning of `mark` that `text` ends with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
