"""Draw docs/figures/shared-prefix.svg for docs/training.md, from the layout that training uses.

python scripts/training_docs.py
"""

from pathlib import Path

from rso.prefix import PrefixRow, collate

FIGURE = Path(__file__).parent.parent / "docs/figures/shared-prefix.svg"
ROWS = [PrefixRow([1] * 4, [[2] * 2, [2] * 3, [2] * 2]), PrefixRow([1] * 3, [[2] * 2, [2] * 2])]
CELL, LEFT, TOP = 18, 150, 92
OWN, PREFIX, NOTHING = "#1f6f54", "#2f5d8a", "#ecece8"
INK, SOFT, PAPER = "#26282b", "#65686c", "#fdfdfb"


def main() -> None:
    """Write the figure."""
    FIGURE.write_text(figure(), encoding="utf-8")


def figure() -> str:
    """Return an SVG of who attends to whom in two rows packed into one sequence, by position."""
    batch = collate(ROWS)
    layout = batch.layout
    is_seen = layout.is_seen.tolist()
    prompts = {token for span in layout.prefixes for token in range(*span)}
    size = layout.num_tokens
    width, height = LEFT + size * CELL + 40, TOP + size * CELL + 84
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img">',
        "<title>Two shared-prefix rows in one sequence: who attends to whom</title>",
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        text(LEFT, 22, "keys, with their position ids", "start"),
    ]
    for number, (prefix, branches) in enumerate(
        zip(layout.prefixes, layout.branches, strict=True), 1
    ):
        names = [f"prompt {number}", *(f"response {k}" for k in range(1, len(branches) + 1))]
        for order, (name, (start, end)) in enumerate(zip(names, (prefix, *branches), strict=True)):
            colour = PREFIX if order == 0 else OWN
            middle = TOP + (start + end) * CELL / 2 + 4
            parts.append(text(LEFT - 12, middle, name, "end"))
            parts.append(
                f'<rect x="{LEFT + start * CELL + 1}" y="{TOP - 34}" '
                f'width="{(end - start) * CELL - 2}" height="6" fill="{colour}"/>'
            )
    for column, position in enumerate(batch.position_ids[0].tolist()):
        parts.append(text(LEFT + (column + 0.5) * CELL, TOP - 12, str(position), "middle"))
    for query in range(size):
        for key in range(size):
            colour = NOTHING
            if is_seen[query][key]:
                colour = PREFIX if key in prompts else OWN
            parts.append(
                f'<rect x="{LEFT + key * CELL + 1}" y="{TOP + query * CELL + 1}" '
                f'width="{CELL - 2}" height="{CELL - 2}" fill="{colour}"/>'
            )
    legend = TOP + size * CELL + 32
    for place, (colour, words) in enumerate(
        ((PREFIX, "attends to the prompt"), (OWN, "attends to itself"), (NOTHING, "not computed"))
    ):
        x = LEFT + place * 160 - 90
        parts.append(f'<rect x="{x}" y="{legend - 11}" width="13" height="13" fill="{colour}"/>')
        parts.append(text(x + 20, legend, words, "start"))
    return "\n".join([*parts, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str) -> str:
    """Return one line of text as SVG."""
    colour = INK if anchor == "end" else SOFT
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-family="sans-serif" font-size="13">{words}</text>'
    )


if __name__ == "__main__":
    main()
