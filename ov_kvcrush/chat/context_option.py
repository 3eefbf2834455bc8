"""`--context` and `--save-context`: what they are given, a context made of it, and where it is written."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ov_kvcrush.chat.reader import MAX_STDIN_BYTES
from ov_kvcrush.cli.policy_options import PolicyOptions
from ov_kvcrush.config import check_engine
from ov_kvcrush.contexts.context import DEFAULT_CONTEXT_POLICY, Context
from ov_kvcrush.contexts.file import BEGINNING
from ov_kvcrush.errors import RequestError
from ov_kvcrush.pipelines.llm import LLMPipeline
from ov_kvcrush.policies.base import Policy

SUFFIX = ".kvc"
MAX_TEXT_BYTES = MAX_STDIN_BYTES


@dataclass(frozen=True)
class ContextWish:
    """What --context and --save-context ask for, checked before a model is loaded.

    text, policy: what is to be compressed, and by what; None where the file is a saved context. save_to: a file to
    write, or None.
    """

    file: Path
    text: str | None
    policy: Policy | None
    save_to: Path | None = None


@dataclass(frozen=True)
class ContextFigures:
    """What a context took: kept_tokens a head holds on average, nbytes in the store, seconds to compress or load it.

    saved_seconds: what loading took less than compressing had; None where it was compressed, or that is not known.
    """

    file: str
    is_loaded: bool
    num_tokens: int
    kept_tokens: int
    nbytes: int
    seconds: float
    saved_seconds: float | None = None

    def rows(self) -> dict[str, str]:
        """The figures as text, by name."""
        how = "loaded" if self.is_loaded else "compressed"
        saved = "" if self.saved_seconds is None else f" ({self.saved_seconds:.2f} s less than compressing took)"
        return {
            "context": f"{self.file}, {how} in {self.seconds:.2f} s{saved}",
            "tokens": f"{self.num_tokens}, {self.kept_tokens} kept a head",
            "KV": f"{self.nbytes} bytes ({self.nbytes / 2**20:.2f} MiB)",
        }

    def line(self) -> str:
        """The figures in one line."""
        return " | ".join(f"{name} {value}" for name, value in self.rows().items())

    def json(self) -> dict[str, Any]:
        """The figures by their names here."""
        return asdict(self)


# -- arguments ---------------------------------------------------------------------------------------------------------


def context_wish(
    file: str | None,
    save_to: str | None,
    policy: PolicyOptions,
    *,
    has_precisions: bool,
    system: str,
    engine: str | None,
    device: str,
) -> ContextWish | None:
    """What the arguments ask for; None without --context.

    has_precisions: some are given, so that the default budget, which would choose them, does not hold.
    Raises RequestError or CrushError: for arguments that do not go together, a file that is neither a text nor a saved
    context, settings that the policy of a text has not, and a file that cannot be written.
    """
    if file is None:
        if save_to is not None:
            raise RequestError(f"save_context must be given with --context, whose context it is, got {save_to!r} alone")
        return None
    if system:
        raise RequestError(f"system must be left out with --context, which a conversation begins with, got {system!r}")
    if check_engine(engine, device) == "genai":
        raise RequestError(f"context must be left out with engine='genai', which holds no contexts, got {file!r}")
    text = read_context_file(Path(file))
    target = None if save_to is None else check_target("save_context", Path(save_to))
    make = policy.build if has_precisions else policy.build_open
    named = make(policy.name or DEFAULT_CONTEXT_POLICY)
    chosen = None if text is None else named
    return ContextWish(Path(file), text, chosen, target)


def read_context_file(path: Path) -> str | None:
    """The text of a file; None for a saved context, known by its content or its name. Raises RequestError."""
    try:
        with path.open("rb") as file:
            data = file.read(8 + len(BEGINNING))
            if path.suffix.lower() == SUFFIX or _is_saved(data):
                return None
            data += file.read(MAX_TEXT_BYTES + 1 - len(data))
    except OSError as error:
        raise RequestError(f"context must be a file that can be read, got {path}: {error.strerror or error}") from None
    if not data:
        raise RequestError(f"context must have some text, got the empty file {path}")
    if len(data) > MAX_TEXT_BYTES:
        raise RequestError(f"context must be at most {MAX_TEXT_BYTES} bytes of text, got more in {path}")
    if (zero := data.find(b"\0")) >= 0:
        raise RequestError(f"context must be UTF-8 text or a saved context, got a zero byte at {zero} of {path}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"context must be UTF-8 text, got other bytes at {error.start} of {path}") from None
    if not text.strip():
        raise RequestError(f"context must have some text, got white space only in {path}")
    return text


def check_target(name: str, path: Path) -> Path:
    """Return a path that a context can be written to. Raises RequestError for one that cannot, or holds other things.

    A file that is there may be a saved context, which is replaced, but not somebody's text.
    """
    try:
        if path.exists():
            if not path.is_file():
                raise RequestError(f"{name} must be a file, got {path}, which is something else")
            with path.open("rb") as file:
                data = file.read(8 + len(BEGINNING))
            if data and not _is_saved(data):
                raise RequestError(f"{name} must be a new file or a saved context, got {path}, which is another file")
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            return path
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"{name} must be a file that can be written, got {path}: {reason}") from None


def _is_saved(data: bytes) -> bool:
    return data[8:].startswith(BEGINNING)


# -- contexts ----------------------------------------------------------------------------------------------------------


def open_context(wish: ContextWish, pipe: LLMPipeline, console: Console) -> tuple[Context, ContextFigures]:
    """Compress or load what was asked for, showing how far that is. Raises CrushError."""
    start = time.perf_counter()
    if wish.text is None or wish.policy is None:
        with console.status("Loading the context"):
            context = Context.load(wish.file, pipe)
    else:
        with show_progress(wish.policy, console) as progress:
            context = pipe.compress(wish.text, policy=wish.policy, progress=progress)
    seconds = time.perf_counter() - start
    # A saved chat does not tell what it took.
    saved = context.seconds - seconds if wish.text is None and context.seconds > 0 else None
    sizes = context.num_tokens, context.kept_tokens, context.nbytes
    return context, ContextFigures(str(wish.file), wish.text is None, *sizes, seconds, saved)


@contextmanager
def show_progress(policy: Policy, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar for as long as a text is read, on a terminal only. What it gives is called as compress() calls progress."""
    replay = policy.inputs.replay
    readings = 1 if replay is None else 1 + replay.sample
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(separator=" of "),
        TextColumn("tokens,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Reading the context", total=None)

        def tell(done: int, total: int) -> None:
            is_first = done * readings < total or replay is None
            description = "Reading the context" if is_first else "Reading it again, to see what it needs"
            bar.update(task, description=description, completed=done, total=total)

        yield tell
