"""The command `ov_kvcrush-chat`: its arguments, and what happens with them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape

from ov_kvcrush.chat.context_option import ContextWish, context_wish, open_context
from ov_kvcrush.chat.conversation import ChatPipeline, ContextConversation, Conversation
from ov_kvcrush.chat.help import EXAMPLES, HELP
from ov_kvcrush.chat.options import DEFAULT_CHAT_POLICY, DEFAULT_MIN_TOKENS, ChatOptions
from ov_kvcrush.chat.output import AnswerWriter, Messages, json_line, stats_line
from ov_kvcrush.chat.reader import is_interactive, one_prompt
from ov_kvcrush.chat.session import Session, length_note, tell_kept
from ov_kvcrush.cli.policy_options import (
    BUDGET_HELP,
    NAME_OR_LIST,
    KeptOption,
    KeptTokensOption,
    LookupOption,
    OtherOptions,
    PolicyOptions,
    RecallOption,
    WeightsOption,
    explain_if_asked,
    list_policies,
)
from ov_kvcrush.config import DEFAULT_BUDGET, PRECISIONS, check_engine
from ov_kvcrush.contexts.context import DEFAULT_CONTEXT_POLICY
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.model.default import DEFAULT_MODEL_NAME

FAILED, BAD_INPUT = 1, 2
INTERRUPTED, PIPE_CLOSED = 130, 141  # what a shell says of SIGINT and SIGPIPE


@dataclass(frozen=True)
class Task:
    """What one run of the command has to do."""

    options: ChatOptions
    prompt: str | None
    stats: bool
    json: bool
    show_kept: bool = False
    context: ContextWish | None = None

    def __post_init__(self) -> None:
        if self.show_kept and check_engine(self.options.engine, self.options.device) == "genai":
            raise CrushError(
                "show_kept must be left out with engine='genai', which does not tell what it keeps, got it"
            )


def main() -> None:
    """Run the command with the arguments of the process; never returns."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command. Returns its exit status: 0, FAILED, BAD_INPUT, INTERRUPTED or PIPE_CLOSED."""
    messages = Messages()
    try:
        if sys.stdout is None:
            raise RequestError("standard output must be open, got a closed one")
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding has not
        task = _parser()(args=arguments, prog_name="ov_kvcrush-chat", standalone_mode=False)
        status = _carry_out(task, messages) if isinstance(task, Task) else int(task or 0)
        sys.stdout.flush()
        return status
    except CrushError as error:
        messages.error(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    except OSError as error:
        _drop_output()
        messages.error(error)
        return FAILED
    except Exception as error:
        # Usage errors have no base class that all versions of typer export; this method is theirs alone.
        if not hasattr(error, "format_message"):
            raise
        messages.error(f"{error.format_message().rstrip('.')}; see ov_kvcrush-chat --help")
        return BAD_INPUT


def _drop_output() -> None:
    """Let what is still buffered go nowhere at exit, instead of failing again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> Callable[..., Any]:
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    epilog = EXAMPLES + "\n\n".join(escape(line) for line in list_policies())
    app.command(help=HELP, epilog=epilog, context_settings={"help_option_names": ["-h", "--help"]})(parse)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        from ov_kvcrush import __version__

        print(f"ov_kvcrush {__version__} (openvino {version('openvino')}, openvino-genai {version('openvino-genai')})")
        raise typer.Exit


def parse(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder of an exported model; the default model if omitted.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Answer this text and leave. Text piped to standard input is put below it, or stands alone."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Go on from this text, compressed as --policy, --kept, --kept-tokens, --min-tokens and "
            f"--policy-option say, by default with {DEFAULT_CONTEXT_POLICY} to the default of --budget; the chat "
            "behind it has the chat's defaults. Or go on from a .kvc file that --save-context wrote; those options are "
            "for the chat behind it then.",
        ),
    ] = None,
    save_context: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="With --context: write it, compressed, before the first question."),
    ] = None,
    system: Annotated[str, typer.Option(help="System message: how the model is to behave.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = ChatOptions.max_new_tokens,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; higher values vary more.")
    ] = ChatOptions.temperature,
    top_p: Annotated[
        float, typer.Option(help="With a temperature: draw from the likeliest tokens that have this share, in (0, 1].")
    ] = ChatOptions.top_p,
    seed: Annotated[int, typer.Option(help="With a temperature: same seed, same draws.")] = ChatOptions.seed,
    engine: Annotated[
        str | None,
        typer.Option(metavar="crush|genai", help="Engine that runs the model: crush on CPU, genai on other devices."),
    ] = None,
    device: Annotated[str, typer.Option(help="OpenVINO device, for example CPU or GPU.")] = ChatOptions.device,
    key_precision: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help=f"How cached keys are stored: {', '.join(PRECISIONS)}. The default u8 changes next to nothing; u4 "
            "takes about half of its memory, u2 a quarter. The newest tokens stay as they were computed.",
        ),
    ] = None,
    value_precision: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="The same for values; they lose less by few bits: u2 here with u4 for keys."),
    ] = None,
    max_kv_mb: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most MiB of cached keys and values; a message that does not fit is refused. Default: half of the "
            "free memory. With engine genai whole GiB: a multiple of 1024.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="F",
            help=f"{BUDGET_HELP} Default, where neither --kept, --kept-tokens nor precisions are given: "
            f"{DEFAULT_BUDGET}, which costs less than a quarter of the tokens in u8; without a profile one setting "
            "holds for all heads, which costs more. With engine genai none.",
        ),
    ] = None,
    recall_tokens: RecallOption = None,
    weights: WeightsOption = None,
    prompt_lookup: LookupOption = False,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar=NAME_OR_LIST,
            callback=explain_if_asked,
            is_eager=True,
            help="Which tokens stay in the KV cache of a long text; none keeps everything. Default: "
            f"{DEFAULT_CHAT_POLICY}; of a --context {DEFAULT_CONTEXT_POLICY}; with engine genai none. How many: as "
            "--budget, --kept or --kept-tokens says.",
        ),
    ] = None,
    kept: KeptOption = None,
    kept_tokens: KeptTokensOption = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"A text of as many tokens is kept whole, and a fraction never gets smaller. Default: "
            f"{DEFAULT_MIN_TOKENS}; with --kept-tokens as many as these.",
        ),
    ] = None,
    policy_options: OtherOptions = None,
    show_kept: Annotated[
        bool, typer.Option("--show-kept", help="Show after each answer what the cache kept of its prompt, in colours.")
    ] = False,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            help="Say what each answer took: TTFT, TPOT, tokens, KV bytes in all and per kept token, tokens kept.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the answer's text.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> Task:
    """What the arguments ask for. Raises CrushError naming the first that cannot be used."""
    cache = (key_precision, value_precision, max_kv_mb)
    wanted = PolicyOptions(policy, kept, kept_tokens, min_tokens, tuple(policy_options or ()))
    given = key_precision is not None or value_precision is not None
    wish = context_wish(
        context, save_context, wanted, has_precisions=given, system=system, engine=engine, device=device
    )
    of_chat = PolicyOptions() if wish and wish.text is not None else wanted
    options = ChatOptions(
        model,
        system,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        engine,
        device,
        *cache,
        of_chat,
        budget,
        recall_tokens,
        weights,
        prompt_lookup,
    )
    return Task(options, prompt, stats, json, show_kept, wish)


def _carry_out(task: Task, messages: Messages) -> int:
    if not is_interactive(task.prompt):
        return _answer_once(task, one_prompt(task.prompt), messages)
    if task.json:
        raise RequestError("prompt must be given with --json: there is no conversation in JSON")
    return _converse(task, messages)


def _load(options: ChatOptions, messages: Messages) -> ChatPipeline:
    configs: dict[str, Any] = {"cache_config": options.cache_config(), "scheduler_config": options.scheduler_config()}
    if options.prompt_lookup:
        configs["prompt_lookup"] = True
    with messages.console.status("Loading the model"), _warnings_as_notes(messages):
        return ChatPipeline(options.model, options.device, engine=options.engine, **configs)


def _begin(task: Task, pipe: ChatPipeline, messages: Messages, *, at_terminal: bool) -> Conversation:
    """A conversation that is ready for its first question."""
    options = task.options.generation_options()
    if task.context is None:
        return Conversation(pipe, task.options.system, options)
    context, figures = open_context(task.context, pipe, messages.console)
    if task.stats or at_terminal:
        messages.note(figures.line())
    try:
        if task.context.save_to:
            context.save(task.context.save_to)
    except CrushError as error:
        if not at_terminal:
            raise
        messages.error(error)  # what took so long is there all the same
        messages.note("/save FILE writes it elsewhere.")
    return ContextConversation(pipe, context, figures, options)


@contextmanager
def _warnings_as_notes(messages: Messages) -> Iterator[None]:
    """Say what Python would print with a file name, a line number and a line of code as one line without them."""
    with warnings.catch_warnings():  # puts showwarning back as well
        warnings.showwarning = lambda message, *_: messages.note(f"note: {message}")
        yield


def _converse(task: Task, messages: Messages) -> int:
    options = task.options
    pipe = _load(options, messages)
    if not pipe.get_tokenizer().chat_template:
        raise RequestError(f"model must have a chat template to chat, got {options.model!r} without one; use --prompt")
    conversation = _begin(task, pipe, messages, at_terminal=True)
    name = options.model or DEFAULT_MODEL_NAME
    messages.note(f"{name}, engine {pipe.engine}, {options.device}. /help for commands, Ctrl-D to leave.")
    Session(conversation, messages, task.stats, task.show_kept).run()
    return 0


def _answer_once(task: Task, prompt: str, messages: Messages) -> int:
    pipe = _load(task.options, messages)
    conversation = _begin(task, pipe, messages, at_terminal=False)
    status = messages.console.status("Thinking")
    writer = AnswerWriter(sys.stdout, status.stop)
    with status:
        turn = conversation.ask(prompt, None if task.json else writer.write)
    if task.json:
        context = conversation.figures.json() if conversation.figures else None
        print(json_line(turn, pipe.engine, task.options.model or DEFAULT_MODEL_NAME, context))
    else:
        writer.end()
        if turn.finish_reason == "length":
            messages.note(length_note(turn))
    if task.show_kept:
        tell_kept(turn, conversation, messages)
    if task.stats:
        messages.note(stats_line(turn))
    return INTERRUPTED if turn.finish_reason == "interrupted" else 0


if __name__ == "__main__":
    main()
