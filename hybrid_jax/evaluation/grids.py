"""Figures by length and depth as a table of text."""


def lines(cells: list[dict], row: str, column: str, value: str) -> list[str]:
    """`value` of each cell, one line a `row`, one column a `column`; both fields of the cells."""
    columns = sorted({cell[column] for cell in cells})
    found = {(cell[row], cell[column]): cell[value] for cell in cells}
    head = " ".join(f"{each:>8,}" for each in columns)
    table = [f"{value}, {row} by {column}:", f"{'':>8} {head}"]
    for name in sorted({cell[row] for cell in cells}):
        values = " ".join(f"{found[name, each]:8.3f}" for each in columns)
        table.append(f"{name:>8} {values}")
    return table
