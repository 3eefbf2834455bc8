"""Where a command prints: tables to standard output, progress to standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

Report = Callable[[str], None]  # told what begins now


def out() -> Console:
    """The console of the tables."""
    console = Console()
    # A pipe has no width, and 80 columns would cut the numbers.
    return console if console.is_terminal else Console(width=150)


@contextmanager
def progress(num_stages: int, console: Console) -> Iterator[Report]:
    """Yield a function that shows what begins now: on a terminal as a bar, else line by line."""
    if not console.is_terminal:
        yield lambda stage: console.print(Text(stage))
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Drawn once a second: a livelier bar would take time from what is measured.
    with Progress(*columns, console=console, refresh_per_second=1, transient=True) as bars:
        task = bars.add_task("", total=num_stages)
        first = True

        def report(stage: str) -> None:
            nonlocal first
            bars.update(task, description=stage, advance=0 if first else 1)
            first = False

        yield report
