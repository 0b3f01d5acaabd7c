"""What a person at a terminal sees: progress bars and remarks, on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["progress_bar", "say"]


def progress_bar(show: bool = True) -> Progress:
    """Make the bar of a long run: what, how far, how many, how long so far, how long still."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not show)


def say(text: str) -> None:
    """Print a line as it is: names in brackets are no markup, long paths stay in one line."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)
