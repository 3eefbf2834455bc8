"""The interactive chat: read a message or a command, act on it, again."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ov_kvcrush.chat.conversation import Conversation, Turn
from ov_kvcrush.chat.kept_view import show_kept
from ov_kvcrush.chat.output import AnswerWriter, Messages, stats_line, stats_rows
from ov_kvcrush.chat.reader import FENCE, Message, MessageReader
from ov_kvcrush.errors import CrushError, did_you_mean

_COMMAND = re.compile(r"/\w+")


@dataclass(frozen=True)
class Command:
    """Something that begins with a slash. argument: what it takes, the rest of the line; "" = it stands alone."""

    about: str
    act: Callable[..., None]
    argument: str = ""


class Session:
    """A chat at a terminal, until Ctrl-D, /quit, or Ctrl-C twice at an empty line.

    show_stats: say after each answer what it took. show_kept: show after each answer what the cache kept of its prompt.
    """

    def __init__(
        self, conversation: Conversation, messages: Messages, show_stats: bool, show_kept: bool = False
    ) -> None:
        self._conversation = conversation
        self._messages = messages
        self._show_stats = show_stats
        self._show_kept = show_kept
        self._turns: list[Turn] = []
        self._is_over = False
        self._commands = {
            "/help": Command("show this", self._help),
            "/reset": Command("forget the conversation and start a new one", self._reset),
            "/stats": Command("show what the last answer and the conversation took", self._stats),
            "/kept": Command("show what the cache kept of the conversation, in colours", self._kept),
            "/save": Command("write a conversation that began with --context, to go on from it", self._save, "FILE"),
            "/quit": Command("leave; so does Ctrl-D", self._quit),
        }

    def run(self) -> None:
        """Talk until the user leaves."""
        reader = MessageReader()
        leaves_next = False  # at a second Ctrl-C in a row
        while not self._is_over:
            try:
                message = reader.read()
                leaves_next = False
                self.act(message)
            except EOFError:
                self._messages.note("")
                return
            except KeyboardInterrupt:
                self._messages.note("")
                if reader.was_typing():
                    leaves_next = False
                    continue
                if leaves_next:
                    return
                leaves_next = True
                self._messages.note("Press Ctrl-C again, Ctrl-D, or type /quit to leave.")

    def act(self, message: Message) -> None:
        """Run a command or answer a message; errors are told and leave the conversation as it was."""
        words = message.text.split()
        if not words:
            return
        if message.may_be_command and message.text.startswith("/") and _COMMAND.fullmatch(words[0]):
            self._command(words[0], message.text[len(words[0]) :].strip())
            return
        try:
            self._answer(message.text)
        except CrushError as error:
            self._messages.error(error)
            if self._turns:
                self._messages.note("The conversation is as it was before; /reset starts a new one.")

    def _command(self, name: str, rest: str) -> None:
        command = self._commands.get(name)
        if command is None:
            known = ", ".join(self._commands)
            self._messages.error(f"command must be one of {known}, got {name!r}{did_you_mean(name, self._commands)}")
        elif command.argument and not rest:
            self._messages.error(f"{name} must have a {command.argument} behind it, got none")
        elif command.argument:
            command.act(rest)
        elif rest:
            self._messages.error(f"{name} must stand alone, got {rest!r} after it")
        else:
            command.act()

    def _answer(self, question: str) -> None:
        status = self._messages.console.status("Thinking")
        writer = AnswerWriter(sys.stdout, status.stop)
        with status:
            turn = self._conversation.ask(question, writer.write)
        if turn.text:
            writer.end()
            self._turns.append(turn)
        if turn.finish_reason == "interrupted":
            self._messages.note(
                "[stopped]" if turn.text else "[stopped before the answer began; the question is not kept]"
            )
        elif turn.finish_reason == "length":
            self._messages.note(length_note(turn))
        if self._show_kept:
            tell_kept(turn, self._conversation, self._messages)
        if self._show_stats:
            self._messages.note(stats_line(turn))

    # -- commands ----------------------------------------------------------------------------------------------------

    def _help(self) -> None:
        commands = {f"{name} {command.argument}".strip(): command.about for name, command in self._commands.items()}
        self._messages.table("Commands", commands)
        if self._turns and self._turns[-1].metrics.kept_tokens is not None:
            self._messages.table("Cache", {"kept": stats_rows(self._turns[-1])["kept"] + " of the last answer"})
        self._messages.table(
            "Typing",
            {
                "\\ at the end of a line": "the message goes on in the next line",
                FENCE: f"on a line of its own: a message of many lines, up to the next {FENCE}",
                "pasted lines": "one message",
                "a space before /": "a message that begins with / but is no command",
                "Ctrl-C": "stop the answer; what was said so far stays in the conversation",
            },
        )

    def _reset(self) -> None:
        self._conversation.reset()
        self._turns.clear()
        behind = " behind the context" if self._conversation.figures else ""
        self._messages.note(f"A new conversation begins{behind}.")

    def _stats(self) -> None:
        if self._conversation.figures:
            self._messages.table("Context", self._conversation.figures.rows())
        if not self._turns:
            self._messages.note("No answer yet.")
            return
        all_metrics = [turn.metrics for turn in self._turns]
        generated = sum(m.num_generated_tokens for m in all_metrics)
        computed = sum(m.num_input_tokens - m.num_reused_tokens for m in all_metrics)
        self._messages.table("Last answer", stats_rows(self._turns[-1]))
        self._messages.table(
            "Conversation",
            {"answers": str(len(self._turns)), "tokens": f"{computed} input computed, {generated} generated"},
        )

    def _kept(self) -> None:
        if not self._turns:
            self._messages.note("No answer yet.")
            return
        tell_kept(self._turns[-1], self._conversation, self._messages)

    def _save(self, file: str) -> None:
        try:
            path = Path(file).expanduser()
            saved = self._conversation.save(path)
        except (CrushError, RuntimeError) as error:  # RuntimeError: a home folder that is not known
            self._messages.error(error)
            return
        self._messages.note(f"{saved.num_tokens} tokens, {saved.kept_tokens} kept a head, are in {path}.")

    def _quit(self) -> None:
        self._is_over = True


def tell_kept(turn: Turn, conversation: Conversation, messages: Messages) -> None:
    """Print the prompt of a turn in the colours of what the cache keeps of it."""
    if turn.kept is not None:
        show_kept(turn.kept, conversation.tokenizer, messages.console)
    elif turn.metrics.kept_tokens is None:
        messages.note("openvino_genai does not tell what it keeps.")
    else:
        messages.note(f"All {turn.metrics.kept_tokens} tokens are kept.")


def length_note(turn: Turn) -> str:
    """What to say of an answer that was cut."""
    count = turn.metrics.num_generated_tokens
    return f"[cut after {count} tokens: --max-new-tokens, --max-kv-mb or the model's context is used up]"
