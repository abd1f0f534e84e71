"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in GitHub's Markdown, without a newline at its end.

    Args:
        header: titles of the columns; may be empty strings.
        rows: cells of each row, as many as there are columns. A `|` in a cell is escaped.

    Raises:
        ValueError: if a row has more or fewer cells than the header.
    """
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row must have {len(header)} cells, as the header, got {len(row)}: {row}.")
        lines.append(_line([str(cell).replace("|", r"\|") for cell in row]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
