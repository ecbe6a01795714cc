"""Small plots as inline SVG. Their colours come from the page's style, light or dark."""

import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 340.0, 170.0
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46.0, 10.0, 10.0, 26.0
FOREST_WIDTH, FOREST_HEIGHT, FOREST_MARGIN = 300.0, 24.0, 12.0


def forest(value: float, low: float, high: float) -> Markup:
    """Return one row of a forest plot: a share and its interval, from 0 to 100 %, with a 50 % line.

    Value and interval are shares in [0, 1].
    """
    x, left, right = (_forest_x(share) for share in (value, low, high))
    verdict = "above" if low > 0.5 else "below" if high < 0.5 else "open"
    middle = FOREST_HEIGHT / 2
    lines = "".join(
        f'<line class="grid" x1="{_forest_x(s):.1f}" x2="{_forest_x(s):.1f}" '
        f'y1="0" y2="{FOREST_HEIGHT}"/>'
        for s in (0.0, 0.25, 0.75, 1.0)
    )
    label = f"{100 * value:.1f} %, interval {100 * low:.1f} to {100 * high:.1f} %"
    return Markup(
        f'<svg class="forest {verdict}" viewBox="0 0 {FOREST_WIDTH} {FOREST_HEIGHT}" role="img" '
        f'aria-label="{label}">{lines}'
        f'<line class="half" x1="{_forest_x(0.5):.1f}" x2="{_forest_x(0.5):.1f}" '
        f'y1="0" y2="{FOREST_HEIGHT}"/>'
        f'<line class="interval" x1="{left:.1f}" x2="{right:.1f}" y1="{middle}" y2="{middle}"/>'
        f'<line class="interval" x1="{left:.1f}" x2="{left:.1f}" y1="{middle - 4}" '
        f'y2="{middle + 4}"/>'
        f'<line class="interval" x1="{right:.1f}" x2="{right:.1f}" y1="{middle - 4}" '
        f'y2="{middle + 4}"/>'
        f'<circle class="estimate" cx="{x:.1f}" cy="{middle}" r="4"/></svg>'
    )


def forest_axis() -> Markup:
    """Return the axis above the rows of a forest plot, in %."""
    ticks = "".join(
        f'<text x="{_forest_x(s / 100):.1f}" y="13" text-anchor="middle">{s}</text>'
        for s in (0, 25, 50, 75, 100)
    )
    return Markup(
        f'<svg class="forest axis" viewBox="0 0 {FOREST_WIDTH} 18" aria-hidden="true">{ticks}</svg>'
    )


def line(points: Sequence[tuple[float, float]], name: str) -> Markup:
    """Return a line plot of at least one (step, value) point.

    Labels show the first and the last step, and the ends and the middle of the value axis.
    """
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = _padded(min(values), max(values))
    xs = [_x(s, min(steps), max(steps)) for s in steps]
    ys = [_y(v, low, high) for v in values]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    return _frame(
        Markup('<polyline class="curve" points="{}"/>').format(path),
        x_ticks=[(xs[0], f"{steps[0]:g}"), (xs[-1], f"{steps[-1]:g}")],
        y_ticks=[(_y(v, low, high), f"{v:.3g}") for v in (low, (low + high) / 2, high)],
        x_name="step",
        label=f"{name} by step, from {values[0]:.3g} to {values[-1]:.3g}",
    )


def histogram(
    edges: Sequence[float], candidates: Sequence[int], accepted: Sequence[int], unit: str
) -> Markup:
    """Return two histograms over the same bins [bins], each as shares of its own total.

    `edges` is [bins + 1], in `unit`, which is named below the axis.
    """
    totals = max(1, sum(candidates)), max(1, sum(accepted))
    shares = [
        [c / total for c in counts]
        for counts, total in zip((candidates, accepted), totals, strict=True)
    ]
    top = max(max(row) for row in shares) or 1.0
    bars = Markup("")
    for kind, row in zip(("candidates", "accepted"), shares, strict=True):
        for start, end, share in zip(edges, edges[1:], row, strict=False):
            left, right = _x(start, edges[0], edges[-1]), _x(end, edges[0], edges[-1])
            y = _y(share, 0.0, top)
            bars += Markup(
                '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
            ).format(kind, left, y, max(0.5, right - left - 1), HEIGHT - MARGIN_BOTTOM - y)
    return _frame(
        bars,
        x_ticks=[(_x(e, edges[0], edges[-1]), f"{e:.2g}") for e in (edges[0], edges[-1])],
        y_ticks=[(_y(v, 0.0, top), f"{100 * v:.0f} %") for v in (0.0, top)],
        x_name=f"reward below the prompt's best, {unit}",
        label="histogram of rewards of candidates and of accepted ones",
    )


def reliability(
    believed: Sequence[float],
    accuracy: Sequence[tuple[float, float, float]],
    counts: Sequence[int],
) -> Markup:
    """Return a reliability curve: one point per bin, observed accuracy over believed probability.

    `believed` [bins] is in [0.5, 1]. `accuracy` [bins] is (value, low, high). A point is larger for
    a larger count, and pointing at it shows its figures. On the dashed diagonal a ranker is exactly
    as sure as it is right.
    """
    left, right = 0.5, max(0.6, math.ceil(10 * max(believed)) / 10)
    content = Markup('<line class="half" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        _x(left, left, right), _x(right, left, right), _y(left, 0.0, 1.0), _y(right, 0.0, 1.0)
    )
    for probability, (value, low, high), count in zip(believed, accuracy, counts, strict=True):
        x = _x(probability, left, right)
        side = "below" if high < probability else "above" if low > probability else "open"
        content += Markup(
            '<g class="{}"><title>{} comparisons: believed {:.1f} %, right {:.1f} %, '
            "interval {:.1f} to {:.1f} %</title>"
            '<line class="interval" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
            '<circle class="estimate" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/></g>'
        ).format(
            side,
            count,
            100 * probability,
            100 * value,
            100 * low,
            100 * high,
            x,
            x,
            _y(low, 0.0, 1.0),
            _y(high, 0.0, 1.0),
            x,
            _y(value, 0.0, 1.0),
            2.5 + 3.5 * math.sqrt(count / max(counts)),
        )
    return _frame(
        content,
        x_ticks=[(_x(p, left, right), f"{100 * p:.0f}") for p in (left, right)],
        y_ticks=[(_y(p, 0.0, 1.0), f"{100 * p:.0f} %") for p in (0.0, 0.5, 1.0)],
        x_name="believed, %",
        label="share of right preferences by the probability that the ranker gave them",
    )


def _frame(
    content: Markup,
    *,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_name: str,
    label: str,
) -> Markup:
    bottom = HEIGHT - MARGIN_BOTTOM
    parts = Markup("")
    for y, text in y_ticks:
        parts += Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(MARGIN_LEFT, WIDTH - MARGIN_RIGHT, y, y, MARGIN_LEFT - 6, y + 4, text)
    for index, (x, text) in enumerate(x_ticks):
        anchor = "start" if index == 0 else "end"
        parts += Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
            x, bottom + 16, anchor, text
        )
    parts += Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
        (MARGIN_LEFT + WIDTH - MARGIN_RIGHT) / 2, bottom + 16, x_name
    )
    return Markup(
        '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>'
    ).format(WIDTH, HEIGHT, label, parts, content)


def _forest_x(share: float) -> float:
    return FOREST_MARGIN + share * (FOREST_WIDTH - 2 * FOREST_MARGIN)


def _x(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return MARGIN_LEFT + share * (WIDTH - MARGIN_LEFT - MARGIN_RIGHT)


def _y(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return HEIGHT - MARGIN_BOTTOM - share * (HEIGHT - MARGIN_TOP - MARGIN_BOTTOM)


def _padded(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)
