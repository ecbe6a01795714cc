"""Measure rejection sampling on toy problems with a known optimal policy.

Prints the tables of docs/rejection-sampling.md and draws docs/figures/rejection-convergence.svg.
Takes about a minute on one core.

python scripts/rejection_docs.py
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import erf, log, log10, pi, sqrt
from pathlib import Path

import numpy as np

from rso.diagnostics import curve, diagnose, sums
from rso.rejection import Candidates, Duplicates, select_many

FIGURE = Path(__file__).parent.parent / "docs/figures/rejection-convergence.svg"
RATIOS = (0.5, 1.0, 2.0, 4.0)
SIZES = tuple(2**power for power in range(1, 13))
SHOWN = (8, 64, 512, 4096)
NUM_PROMPTS = 10_000
COLOURS = ("#2f5d8a", "#1f6f54", "#7a6a2f", "#a8402c")
Distances = dict[tuple[float, int], float]
"""Kolmogorov distances by (σ/β, k)."""


def main() -> None:
    """Print every table and draw the figure."""
    print("\n".join(by_beta()), end="\n\n")
    print("\n".join(by_duplicates()), end="\n\n")
    found = {size: distances(size, (1, 8) if size in SHOWN else (1,)) for size in SIZES}
    print("\n".join(by_size(found)))
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(figure(found), encoding="utf-8")


def gaussian(num_prompts: int, size: int, seed: int) -> Candidates:
    """Return candidates y ~ N(0, 1) with r(y) = y, so that π_r (eq. 4) is N(1 / β, 1)."""
    draw = np.random.default_rng(seed)
    return Candidates(
        np.full(num_prompts, size),
        draw.integers(0, 2**64, num_prompts * size, dtype=np.uint64),
        np.tile(np.arange(size), num_prompts),
        draw.standard_normal(num_prompts * size),
    )


def by_beta(num_prompts: int = 20_000, size: int = 64, num_samples: int = 8) -> Iterator[str]:
    """Yield the lines of the table over σ/β."""
    candidates = gaussian(num_prompts, size, seed=0)
    ratios = (0.0, 0.125, 0.25, *RATIOS, 8.0, 16.0, np.inf)
    totals = {}
    for ratio in ratios:
        beta = 1 / ratio if ratio else np.inf
        selections = select_many(candidates, beta=beta, num_samples=num_samples)
        totals[beta] = sums(candidates, selections, diagnose(candidates, selections, beta))
    yield (
        "| σ/β | accepted of draws, first pass | accepted of draws, all | passes | best accepted "
        "| effective samples | gain, σ | gain of π_r, σ | KL, nats | KL of π_r, nats |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for point in reversed(curve(totals)):
        ratio = 1 / point["beta"] if point["beta"] else np.inf
        yield (
            f"| {'∞' if np.isinf(ratio) else f'{ratio:g}'} "
            f"| {100 * point['acceptance_rate_round_1']:.1f} % "
            f"| {100 * point['acceptance_rate']:.1f} % "
            f"| {point['rounds']:.2f} | {100 * point['has_best']:.1f} % "
            f"| {point['effective_samples']:.1f} | {point['reward_gain']:.2f} "
            f"| {'∞' if np.isinf(ratio) else f'{ratio:g}'} | {point['kl']:.2f} "
            f"| {'∞' if np.isinf(ratio) else f'{ratio**2 / 2:.3g}'} |"
        )


def by_duplicates(num_prompts: int = 100_000, num_texts: int = 20) -> Iterator[str]:
    """Yield the table of `duplicates`: total variation distance of the accepted text from π_r.

    Texts are drawn by Zipf's law, so they repeat. One candidate is accepted per prompt, β = 0.5.
    """
    draw = np.random.default_rng(1)
    proposal = 1 / np.arange(1, num_texts + 1)
    proposal /= proposal.sum()
    rewards = draw.standard_normal(num_texts)
    optimal = proposal * np.exp(rewards / 0.5)
    optimal /= optimal.sum()
    yield "| n | distinct texts | keep | collapse |\n|---|---|---|---|"
    for size in (4, 16, 64, 256):
        texts = draw.choice(num_texts, (num_prompts, size), p=proposal)
        candidates = Candidates(
            np.full(num_prompts, size),
            draw.integers(0, 2**64, num_prompts * size, dtype=np.uint64),
            texts.ravel(),
            rewards[texts.ravel()],
        )
        shown = []
        variants: tuple[Duplicates, ...] = ("keep", "collapse")
        for duplicates in variants:
            found = select_many(candidates, beta=0.5, num_samples=1, duplicates=duplicates)
            counts = np.bincount(candidates.texts[found.is_accepted], minlength=num_texts)
            shown.append(np.abs(counts / num_prompts - optimal).sum() / 2)
        distinct = np.mean(np.count_nonzero(np.diff(np.sort(texts, axis=1), axis=1), axis=1) + 1)
        yield f"| {size} | {distinct:.1f} | {shown[0]:.3f} | {shown[1]:.3f} |"


def by_size(found: Mapping[int, Distances]) -> Iterator[str]:
    """Yield the table of distances over n, for one and for eight samples per prompt."""
    columns = [(ratio, k) for k in (1, 8) for ratio in RATIOS]
    names = [f"σ/β = {ratio:g}, k = {k}" for ratio, k in columns]
    yield f"| n | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
    for size in SHOWN:
        yield f"| {size} | {' | '.join(f'{found[size][c]:.3f}' for c in columns)} |"


def distances(size: int, numbers: Sequence[int]) -> Distances:
    """Return Kolmogorov distances of the accepted y from π_r = N(σ/β, 1), by (σ/β, k).

    `numbers` are the values of k.
    """
    accepted: dict[tuple[float, int], list[np.ndarray]] = defaultdict(list)
    batch = max(1, min(NUM_PROMPTS, 2**21 // size))
    for start in range(0, NUM_PROMPTS, batch):
        candidates = gaussian(
            min(batch, NUM_PROMPTS - start), size, seed=size * NUM_PROMPTS + start
        )
        for k in numbers:
            for ratio in RATIOS:
                found = select_many(candidates, beta=1 / ratio, num_samples=k)
                accepted[ratio, k].append(candidates.rewards[found.is_accepted])
    return {key: _kolmogorov(np.concatenate(found), key[0]) for key, found in accepted.items()}


def _kolmogorov(sample: np.ndarray, mean: float) -> float:
    exact = np.array([(1 + erf((y - mean) / sqrt(2))) / 2 for y in np.sort(sample).tolist()])
    steps = np.arange(len(exact) + 1) / len(exact)
    return float(max(np.abs(exact - steps[1:]).max(), np.abs(exact - steps[:-1]).max()))


def figure(found: Mapping[int, Distances]) -> str:
    """Return the figure as SVG: distance over n, one line per σ/β."""
    width, height, left, right, top, bottom = 640, 360, 56, 90, 16, 44

    def x(size: float) -> float:
        return left + (log10(size) - log10(2)) / (log10(4096) - log10(2)) * (width - left - right)

    def y(value: float) -> float:
        return top + (-log10(value)) / 2.5 * (height - top - bottom)

    lines = []
    for size in SIZES[::2]:
        lines.append(_text(x(size), height - bottom + 18, f"{size}", "middle"))
    for value in (1.0, 0.3, 0.1, 0.03, 0.01):
        lines.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            'stroke="#d9dad6"/>'
        )
        lines.append(_text(left - 8, y(value) + 4, f"{value:g}", "end"))
    # The mean distance of NUM_PROMPTS exact draws, from Kolmogorov's distribution.
    noise = sqrt(pi / 2) * log(2) / sqrt(NUM_PROMPTS)
    lines.append(
        f'<line x1="{left}" x2="{width - right}" y1="{y(noise):.1f}" y2="{y(noise):.1f}" '
        'stroke="#65686c" stroke-dasharray="4 4"/>'
    )
    lines.append(_text(left + 8, y(noise) + 18, "exact draws", "start"))
    lowest = float(height)
    for ratio, colour in zip(RATIOS, COLOURS, strict=True):
        values = [found[size][ratio, 1] for size in SIZES]
        points = " ".join(
            f"{x(size):.1f},{y(value):.1f}" for size, value in zip(SIZES, values, strict=True)
        )
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        # Keep the names 16 apart, so that they do not overlap.
        lowest = min(y(values[-1]) + 4, lowest - 16)
        lines.append(_text(width - right + 8, lowest, f"σ/β = {ratio:g}", "start", colour))
    lines.append(_text((left + width - right) / 2, height - 8, "candidates a prompt, n", "middle"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">\n'
        "<title>Kolmogorov distance of the accepted sample from the optimal policy</title>\n"
        f'<rect width="{width}" height="{height}" fill="#fdfdfb"/>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#65686c") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-family="sans-serif" font-size="13">{text}</text>'
    )


if __name__ == "__main__":
    main()
