"""What rejection sampling did at some β: per prompt, summed over prompts, and in words.

Sums of shards add up to those of the whole, so they travel as counters.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rso.rejection import Candidates, Rewards, Selections, acceptance_probabilities

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Point = dict[str, float]

# Gains in reward beyond these shares of the greatest possible gain call for a warning.
BEST_OF_N, UNCHANGED = 0.95, 0.05


class Diagnostics(NamedTuple):
    """What β does to the candidates of each prompt: [P] each."""

    has_best: Bools
    """A candidate with the largest reward is among the accepted."""
    reward_gain: Floats
    """Mean reward of the accepted less that of all candidates, nats; 0 without accepted ones."""
    reward_spread: Floats
    """Standard deviation of the rewards of all candidates, nats."""
    expected_acceptance: Floats
    """Theorem 1's acceptance rate of a draw from the reference policy, with the sample maximum."""
    effective_samples: Floats
    """Kish's effective number of candidates weighted exp(reward / β), from 1 to n."""
    kl: Floats
    """KL(π_r || π_sft) in nats, estimated over the candidates with these weights; at most ln n."""


def diagnose(candidates: Candidates, selections: Selections, beta: float) -> Diagnostics:
    """What algorithm 1 at `beta` made of each prompt; every prompt has a candidate."""
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
        reward_spread=np.sqrt(total((rewards - np.repeat(mean, sizes)) ** 2) / sizes),
        expected_acceptance=mass / sizes,
        effective_samples=mass**2 / total(weights**2),
        kl=total(weights * logs) / mass - np.log(mass / sizes),
    )


def effective_sample_size(rewards: Rewards, beta: float) -> float:
    """Kish's effective number (sum w)² / sum w² of n candidates weighted w = exp(reward / β).

    Between 1 and n: how many samples of π_r (eq. 4) the candidates of one prompt are worth.
    """
    weights = acceptance_probabilities(rewards, beta)
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.size else 0.0


def sums(candidates: Candidates, selections: Selections, figures: Diagnostics) -> Point:
    """Return counts and sums over prompts; passes are numbered from 1 in their names."""
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
    # Every pass that is made accepts: the largest reward has probability one.
    for number, (hits, draws) in enumerate(zip(accepted, selections.draws_by_round, strict=False)):
        total[f"accepted_round_{number + 1}"] = int(hits)
        total[f"draws_round_{number + 1}"] = int(draws)
    return total


def curve(totals: Mapping[float, Mapping[str, float]]) -> list[Point]:
    """Return the figures of each β, ascending, from its `sums`; β = 0 has to be among them.

    Rates are accepted ones by draws, means are over prompts, rewards and KL in nats; `strength` is
    the gain in reward as a share of that of the best candidates (β = 0).
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


def advice(points: Sequence[Point], total: Mapping[str, float], beta: float) -> list[str]:
    """Return what is wrong with sampling at `beta`, and what to change; empty where nothing is.

    `total` are the `sums` at `beta`, and `points` the `curve` with it.
    """
    (point,) = (found for found in points if found["beta"] == beta)
    spread = point["reward_spread"]
    found = []
    if total["accepted"] == total["candidates"]:
        found.append(
            "Every candidate was accepted, so nothing was selected. Raise decode.num_samples or "
            "lower reject.num_samples."
        )
    elif spread == 0:
        found.append(
            "All candidates of a prompt have the same reward, so nothing was selected. Look at the "
            "ranker, and at whether the candidates differ (decode.sampling.temperature)."
        )
    elif beta > 0 and point["strength"] >= BEST_OF_N:
        found.append(
            f"reject.beta = {beta:g} is so small beside the spread of rewards in a prompt "
            f"({spread:.3g} nats) that sampling has become best-of-N: the gain in reward is "
            f"{100 * point['strength']:.0f} % of the greatest possible. Try reject.beta = "
            f"{spread / 2:.2g}, half the spread, or more decode.num_samples."
        )
    elif point["strength"] <= UNCHANGED:
        found.append(
            f"reject.beta = {beta:g} is so large beside the spread of rewards in a prompt "
            f"({spread:.3g} nats) that sampling changes nothing: the gain in reward is "
            f"{100 * point['strength']:.0f} % of the greatest possible. Try reject.beta = "
            f"{spread / 2:.2g}, half the spread."
        )
    if total["shortfall"]:
        found.append(
            f"{total['prompts_short']:,.0f} of {total['prompts']:,.0f} prompts have fewer distinct "
            f"candidates than reject.num_samples; {total['shortfall']:,.0f} samples are missing. "
            "Raise decode.num_samples or the temperature, or lower reject.num_samples."
        )
    return found
