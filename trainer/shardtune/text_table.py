"""Small tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """The header, a rule and the rows, in aligned columns, without a newline at the end.

    A column of numbers (empty cells and "-" allowed) is aligned to the right, any other to the left.
    Raises ValueError where a row has more or fewer cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells under a header of {len(header)}: {list(row)}")
    columns = [[row[index] for row in rows] for index in range(len(header))]
    widths = [max(map(len, [title, *cells])) for title, cells in zip(header, columns, strict=True)]
    to_right = [bool(cells) and all(map(_is_number, cells)) for cells in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, to_right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _is_number(cell: str) -> bool:
    text = cell.strip().rstrip("%").replace(",", "")
    if text in ("", "-"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
