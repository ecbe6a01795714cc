"""What rejection sampling did at a given β: per prompt, summed over prompts, and in words.

Every β is in nats unless its name says otherwise. The sums of shards add up to the sums of the
whole, so stages record them as counters.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rso.aliases import Bools, Floats, Indices
from rso.rejection import Candidates, RewardsLike, Selections, acceptance_probabilities

Point = dict[str, float]

# With fewer effective samples than this share of `num_samples`, sampling becomes best-of-N: only a
# few candidates are likely under the optimal policy, and most of the accepted ones are others.
BEST_OF_N = 0.5
# With fewer than two effective samples the best candidate has most of the weight.
FEWEST = 2.0
# A gain in reward of at most this share of the greatest possible gain changes nothing.
UNCHANGED = 0.05


class Diagnostics(NamedTuple):
    """What β does to the n candidates of each prompt; every field is [P]."""

    has_best: Bools
    """A candidate with the largest reward is accepted."""
    reward_gain: Floats
    """Mean reward of accepted candidates minus that of all, nats; 0 if none is accepted."""
    reward_spread: Floats
    """Population standard deviation of the rewards of all candidates, nats."""
    expected_acceptance: Floats
    """Acceptance rate of a draw from π_sft (theorem 1); the maximum is that of the candidates."""
    effective_samples: Floats
    """Kish's effective number of candidates with weights exp(reward / β), from 1 to n."""
    kl: Floats
    """KL(π_r || π_sft) in nats, estimated over the candidates with these weights; at most ln n."""


def diagnose(candidates: Candidates, selections: Selections, beta: float) -> Diagnostics:
    """The `Diagnostics` of `selections`, which algorithm 1 made of `candidates` at `beta`.

    Every prompt must have at least one candidate.
    """
    sizes, rewards = candidates.sizes, candidates.rewards
    starts = np.cumsum(sizes) - sizes
    is_accepted = selections.is_accepted

    def total(values: Floats) -> Floats:
        sums: Floats = np.add.reduceat(values, starts)
        return sums

    largest = np.repeat(np.maximum.reduceat(rewards, starts), sizes)
    weights = acceptance_probabilities(rewards, beta, largest)
    mass = total(weights)
    logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    num_accepted = total(is_accepted.astype(np.float64))
    gain = total(np.where(is_accepted, rewards, 0.0)) / np.maximum(num_accepted, 1)
    mean = total(rewards) / sizes
    return Diagnostics(
        has_best=np.logical_or.reduceat(is_accepted & (rewards == largest), starts),
        reward_gain=np.where(num_accepted > 0, gain - mean, 0.0),
        reward_spread=spreads(rewards, sizes),
        expected_acceptance=mass / sizes,
        effective_samples=mass**2 / total(weights**2),
        kl=total(weights * logs) / mass - np.log(mass / sizes),
    )


def spreads(rewards: Floats, sizes: Indices) -> Floats:
    """Population standard deviation of the rewards of each prompt, [P], nats.

    `rewards` are [N], prompt after prompt. `sizes` [P] count the candidates of each prompt, at
    least one.
    """
    starts = np.cumsum(sizes) - sizes
    mean = np.add.reduceat(rewards, starts) / sizes
    squares = (rewards - np.repeat(mean, sizes)) ** 2
    found: Floats = np.sqrt(np.add.reduceat(squares, starts) / sizes)
    return found


def effective_sample_sizes(rewards: Floats, sizes: Indices, beta: float) -> Floats:
    """`effective_sample_size` of each prompt, [P]; `rewards` and `sizes` are as in `spreads`."""
    starts = np.cumsum(sizes) - sizes
    largest = np.repeat(np.maximum.reduceat(rewards, starts), sizes)
    weights = acceptance_probabilities(rewards, beta, largest)
    found: Floats = np.add.reduceat(weights, starts) ** 2 / np.add.reduceat(weights**2, starts)
    return found


def effective_sample_size(rewards: RewardsLike, beta: float) -> float:
    """Kish's effective number (sum w)² / sum w² of n candidates with weights w = exp(reward / β).

    The number is between 1 and n, or 0 without candidates. It says how many samples of π_r (eq. 4)
    the candidates of one prompt are worth.
    """
    weights = acceptance_probabilities(rewards, beta)
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.size else 0.0


def beta_for_effective_samples(rewards: Floats, sizes: Indices, effective: float) -> float:
    """The β, nats, at which the mean of `effective_sample_sizes` over prompts is `effective`.

    `rewards` and `sizes` are as in `spreads`. The mean rises with β, from the mean number of best
    candidates to the mean number of all candidates. The result is 0 if `effective` is at or below
    this range or if there are no prompts, and inf if it is at or above the range.
    """

    def mean(beta: float) -> float:
        return float(effective_sample_sizes(rewards, sizes, beta).mean())

    if not sizes.size or effective <= mean(0.0):
        return 0.0
    if effective >= sizes.mean():
        return math.inf
    starts = np.cumsum(sizes) - sizes
    gaps = np.maximum.reduceat(rewards, starts) - np.minimum.reduceat(rewards, starts)
    # Bisect over β = 2^x times the largest gap. At the lower end only the best candidates have
    # weight; at the upper end all weights are equal.
    unit, low, high = float(gaps.max()), -60.0, 60.0
    for _ in range(32):
        middle = (low + high) / 2
        if mean(unit * math.exp2(middle)) < effective:
            low = middle
        else:
            high = middle
    return unit * math.exp2(high)


def wanted_effective_samples(num_samples: int) -> float:
    """How many effective samples β should leave: `num_samples`, but at least 2."""
    return max(FEWEST, float(num_samples))


def sums(candidates: Candidates, selections: Selections, figures: Diagnostics) -> Point:
    """Return counts, and sums over prompts; passes are numbered from 1 in the names."""
    total: Point = {
        "prompts": len(candidates.sizes),
        "candidates": int(candidates.sizes.sum()),
        "accepted": int(selections.is_accepted.sum()),
        "draws": int(selections.num_draws.sum()),
        "rounds": int(selections.num_rounds.sum()),
        "shortfall": int(selections.num_shortfall.sum()),
        "prompts_short": int((selections.num_shortfall > 0).sum()),
        "prompts_with_best": int(figures.has_best.sum()),
    }
    for name in Diagnostics._fields[1:]:
        total[f"{name}_sum"] = float(getattr(figures, name).sum())
    accepted = np.bincount(selections.round[selections.is_accepted])
    # Every pass accepts a candidate, because the largest reward has probability one. So `accepted`
    # has an entry for every pass with draws.
    for number, (hits, draws) in enumerate(zip(accepted, selections.draws_by_round, strict=False)):
        total[f"accepted_round_{number + 1}"] = int(hits)
        total[f"draws_round_{number + 1}"] = int(draws)
    return total


def curve(totals: Mapping[float, Mapping[str, float]]) -> list[Point]:
    """Return the figures of each β, ascending, from the `sums` of each β; β = 0 must be among them.

    Acceptance rates are accepted candidates divided by draws. `shortfall` is a sum. All other
    figures are means over prompts, rewards and KL in nats. `strength` is the gain in reward divided
    by the gain at β = 0, which takes the best candidates.

    Raises:
        KeyError: β = 0 is missing.
    """
    most = totals[0.0]["reward_gain_sum"]
    points = []
    for beta, total in sorted(totals.items()):
        num_prompts = max(1.0, total["prompts"])
        point = {
            "beta": beta,
            "acceptance_rate": total["accepted"] / max(1.0, total["draws"]),
            "accepted": total["accepted"] / num_prompts,
            "rounds": total["rounds"] / num_prompts,
            "shortfall": total["shortfall"],
            "has_best": total["prompts_with_best"] / num_prompts,
            "strength": total["reward_gain_sum"] / most if most > 0 else 0.0,
        }
        for name in Diagnostics._fields[1:]:
            point[name] = total[f"{name}_sum"] / num_prompts
        number = 1
        while draws := total.get(f"draws_round_{number}", 0):
            rate = total.get(f"accepted_round_{number}", 0) / draws
            point[f"acceptance_rate_round_{number}"] = rate
            number += 1
        points.append(point)
    return points


def sampling_advice(
    points: Sequence[Point],
    counters: Mapping[str, float],
    *,
    beta: float,
    beta_unit: str,
    num_samples: int,
) -> list[str]:
    """Return sentences: what is wrong with this sampling, and what to change; [] if nothing is.

    `beta`, `beta_unit` and `num_samples` are the settings. `counters` are the `sums` at this β, and
    three more: `beta_nats`, `reward_spread_median` (nats), and `beta_advised_nats`, the β that
    leaves `wanted_effective_samples`. `points` are a `curve` that contains this β.
    """
    (point,) = (found for found in points if found["beta"] == counters["beta_nats"])
    is_nats = beta_unit == "nats"
    named = f"reject.beta = {beta:g}" + ("" if is_nats else f" ({counters['beta_nats']:.3g} nats)")
    better = counters["beta_advised_nats"] / (1.0 if is_nats else counters["reward_spread_median"])
    wanted = wanted_effective_samples(num_samples)
    remedy = f"Try reject.beta = {better:.2g}, which leaves {wanted:g} effective samples"
    if not 0 < better < math.inf:
        remedy = "Look at reject/diagnostics"
    spread, effective = point["reward_spread"], point["effective_samples"]
    most = counters["candidates"] / counters["prompts"]
    found = []
    if counters["accepted"] == counters["candidates"]:
        found.append(
            "Every candidate was accepted, so nothing was selected. Raise decode.num_samples or "
            "lower reject.num_samples."
        )
    elif spread == 0:
        found.append(
            "All candidates of a prompt have the same reward, so nothing was selected. Look at the "
            "ranker, and at whether the candidates differ (decode.sampling.temperature)."
        )
    elif beta > 0 and effective < (least := max(FEWEST, BEST_OF_N * num_samples)) <= most:
        found.append(
            f"{named} is so small beside the spread of rewards in a prompt ({spread:.3g} nats) "
            f"that sampling has become best-of-N: the candidates of a prompt are worth "
            f"{effective:.2g} effective samples of the optimal policy, fewer than {least:g} where "
            f"reject.num_samples is {num_samples}. {remedy}, or raise decode.num_samples."
        )
    elif point["strength"] <= UNCHANGED:
        found.append(
            f"{named} is so large beside the spread of rewards in a prompt ({spread:.3g} nats) "
            f"that sampling changes nothing: the gain in reward is {100 * point['strength']:.0f} % "
            f"of the greatest possible. {remedy}."
        )
    if counters["shortfall"]:
        found.append(
            f"{counters['prompts_short']:,.0f} of {counters['prompts']:,.0f} prompts have fewer "
            f"distinct candidates than reject.num_samples; {counters['shortfall']:,.0f} samples "
            "are missing. Raise decode.num_samples or the temperature, or lower reject.num_samples."
        )
    return found
