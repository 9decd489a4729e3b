"""Markdown tables and the numbers in them."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def aligned(markdown: str) -> str:
    """A Markdown table with its columns aligned, for a terminal.

    >>> print(aligned(table(["a", "b"], [["100", "2"]])))
    a    b
    100  2
    """
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if not line.startswith("|---")]
    cells = [[cell.strip() for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def number(value: float) -> str:
    """Three significant digits, at most five decimals, never in powers of ten.

    >>> number(0.012345), number(1234.5), number(98.76), number(0.000012345)
    ('0.0123', '1234', '98.8', '0.00001')
    """
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    exponent = int(f"{value:e}".split("e")[1])
    return f"{value:.{min(max(0, 2 - exponent), 5)}f}"
