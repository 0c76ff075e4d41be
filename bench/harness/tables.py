"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def grid(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in (head, *cells)]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
