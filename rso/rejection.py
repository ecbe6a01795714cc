"""Statistical rejection sampling (algorithm 1): from candidates of π_sft to samples of π_r (eq. 4).

Where the paper's listing leaves a choice open: candidates are walked in a keyed random order, the
copies of a text keep their proposal mass and are retired together (`duplicates="keep"`), too few
distinct candidates are all accepted and the shortfall is counted, and rewards must be finite.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from rso import seeds

Duplicates = Literal["keep", "collapse"]
Rewards = Sequence[float] | npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


class NonFiniteReward(ValueError):
    """A reward is NaN or infinite. NaN compares false, so the listing would accept it silently."""


class Selection(NamedTuple):
    """What algorithm 1 did with each of the n candidates of one prompt, in their given order."""

    is_accepted: npt.NDArray[np.bool_]
    """[n]: accepted itself; the other copies of an accepted text are not."""
    round: npt.NDArray[np.int32]
    """[n]: the pass that accepted the candidate, from 0; -1 if declined."""
    position: npt.NDArray[np.int32]
    """[n]: the place in the order of acceptance, from 0; -1 if declined."""
    acceptance_probability: Floats
    """[n]: exp((reward - max_reward) / beta) in the last pass that had the candidate in play."""
    num_rounds: int
    num_draws: int
    """Uniforms compared; a copy retired earlier in the same pass makes no draw."""
    num_shortfall: int
    """How many of `num_samples` were not to be had because the distinct candidates ran out."""


def rejection_sample(
    texts: Sequence[str],
    rewards: Rewards,
    *,
    beta: float,
    num_samples: int,
    seed: int,
    ids: Sequence[str] | None = None,
    duplicates: Duplicates = "keep",
) -> list[int]:
    """Indices of the accepted candidates of one prompt, in order of acceptance (algorithm 1).

    At most `num_samples`, fewer when there are fewer distinct texts. beta = 0 takes the top k,
    beta = inf a uniform subset. With `ids` the draws belong to the ids, and the order of the input
    does not matter; without, they belong to (text, how often it came before).
    Raises NonFiniteReward, and ValueError for arguments that do not fit together.
    """
    selection = select(
        _occurrence_ids(texts) if ids is None else ids,
        texts,
        rewards,
        prompt_id="",
        beta=beta,
        num_samples=num_samples,
        seed=seed,
        duplicates=duplicates,
    )
    accepted = np.flatnonzero(selection.is_accepted)
    return [int(i) for i in accepted[np.argsort(selection.position[accepted])]]


def select(
    ids: Sequence[str],
    texts: Sequence[str],
    rewards: Rewards,
    *,
    prompt_id: str,
    beta: float,
    num_samples: int,
    seed: int,
    duplicates: Duplicates = "keep",
) -> Selection:
    """Algorithm 1 on the candidates of `prompt_id`, with everything worth recording about it.

    `ids`, `texts` and `rewards` are [n]; the draws are keyed by (seed, prompt_id, id, pass).
    With `duplicates="collapse"` the copy with the smallest id stands for a text, with its reward.
    Raises NonFiniteReward, and ValueError for arguments that do not fit together.
    """
    where = f"prompt {prompt_id}" if prompt_id else "rejection_sample"
    _check_settings(where, beta, num_samples, duplicates)
    values = _checked_rewards(where, ids, texts, rewards)
    standing = _first_by_id(ids, texts) if duplicates == "collapse" else np.arange(len(texts))
    order = seeds.order(ids, "rejection", seed, prompt_id)
    return _walk(
        order[standing[order] == order],
        values,
        text=_first_by_id(ids, texts),
        states=seeds.bases(ids, "uniforms", seed, prompt_id),
        beta=beta,
        num_samples=num_samples,
        standing=standing,
    )


def acceptance_probabilities(rewards: Rewards, beta: float) -> Floats:
    """float64 [n]: exp((reward - max reward) / beta), exactly 1 at the maximum (theorem 1).

    Its limits at the ends: the indicator of the maximum at beta = 0, one everywhere at beta = inf.
    """
    values = np.asarray(rewards, dtype=np.float64)
    # Gaps between extreme rewards overflow to -inf, which is the right probability of zero.
    with np.errstate(over="ignore"):
        gaps: Floats = values - values.max(initial=-np.inf)
        if beta == 0:
            return np.where(gaps == 0, 1.0, 0.0)
        if np.isinf(beta):
            return np.ones_like(gaps)
        probabilities: Floats = np.exp(gaps / beta)
        return probabilities


def effective_sample_size(rewards: Rewards, beta: float) -> float:
    """Kish's effective number (sum w)² / sum w² of n candidates weighted w = exp(reward / beta).

    Between 1 and n: how many samples of π_r (eq. 4) the candidates of one prompt are worth.
    """
    weights = acceptance_probabilities(rewards, beta)
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.size else 0.0


def finite_rewards(rewards: Rewards, where: str, ids: Sequence[str] | None = None) -> Floats:
    """The rewards as float64 [n]; raises NonFiniteReward that names `where` and the candidate."""
    values = np.asarray(rewards, dtype=np.float64)
    for index in np.flatnonzero(~np.isfinite(values)):
        name = f"{index}" if ids is None else f"{ids[index]} (index {index})"
        raise NonFiniteReward(
            f"{where}: candidate {name} has reward {values[index]}, expected a finite number:"
            " look at the ranker that scored it, or drop the candidate"
        )
    return values


def _walk(
    in_play: Indices,
    rewards: Floats,
    *,
    text: Indices,
    states: seeds.UInt64s,
    beta: float,
    num_samples: int,
    standing: Indices,
) -> Selection:
    """The passes of algorithm 1 over `in_play`; `text` numbers equal texts equally."""
    size = len(rewards)
    round_of = np.full(size, -1, dtype=np.int32)
    position = np.full(size, -1, dtype=np.int32)
    is_retired = np.zeros(size, dtype=np.bool_)
    probability = acceptance_probabilities(rewards, beta)
    num_accepted = num_rounds = num_draws = 0
    # Ends: in each pass the largest reward has probability one, and a uniform is below one.
    while in_play.size and num_accepted < num_samples:
        probability[in_play] = acceptance_probabilities(rewards[in_play], beta)
        is_hit = seeds.uniforms_at(states[in_play], num_rounds) < probability[in_play]
        room = num_samples - num_accepted
        hits = _first_copies(np.flatnonzero(is_hit), text[in_play])[:room]
        stop = int(hits[-1]) + 1 if len(hits) == room else in_play.size

        accepted = in_play[hits]
        round_of[accepted] = num_rounds
        position[accepted] = np.arange(num_accepted, num_accepted + len(hits))
        num_draws += _num_draws(hits, text[in_play], stop)
        num_accepted += len(hits)
        num_rounds += 1
        is_retired[text[accepted]] = True
        in_play = in_play[~is_retired[text[in_play]]]
    return Selection(
        is_accepted=position >= 0,
        round=round_of,
        position=position,
        acceptance_probability=probability[standing],
        num_rounds=num_rounds,
        num_draws=num_draws,
        num_shortfall=num_samples - num_accepted,
    )


def _first_copies(hits: Indices, text: Indices) -> Indices:
    """Those of `hits` (places in the walk) whose text is not hit at an earlier place."""
    _, first = np.unique(text[hits], return_index=True)
    return hits[np.sort(first)]


def _num_draws(hits: Indices, text: Indices, stop: int) -> int:
    """Draws made in one pass up to `stop`: all, less the copies of a text after its acceptance."""
    retired_at = np.full(int(text.max()) + 1, stop)
    retired_at[text[hits]] = hits
    return int(np.count_nonzero(np.arange(stop) <= retired_at[text[:stop]]))


def _first_by_id(ids: Sequence[str], texts: Sequence[str]) -> Indices:
    """intp [n]: for each candidate the copy of its text that has the smallest id."""
    first: dict[str, int] = {}
    for index in sorted(range(len(ids)), key=ids.__getitem__):
        first.setdefault(texts[index], index)
    return np.array([first[text] for text in texts], dtype=np.intp)


def _occurrence_ids(texts: Sequence[str]) -> list[str]:
    """One id per candidate from (text, how often it came before), the first copy sorting first."""
    seen: Counter[str] = Counter()
    made = []
    for text in texts:
        made.append(json.dumps([text, f"{seen[text]:08d}"]))
        seen[text] += 1
    return made


def _check_settings(where: str, beta: float, num_samples: int, duplicates: str) -> None:
    if not beta >= 0:
        raise ValueError(f"{where}: beta is {beta}, expected 0 or more: set reject.beta")
    if num_samples < 0:
        raise ValueError(f"{where}: num_samples is {num_samples}, expected 0 or more: raise it")
    if duplicates not in get_args(Duplicates):
        raise ValueError(
            f"{where}: duplicates is {duplicates!r}: use one of {get_args(Duplicates)}"
        )


def _checked_rewards(
    where: str, ids: Sequence[str], texts: Sequence[str], rewards: Rewards
) -> Floats:
    if not len(ids) == len(texts) == len(rewards):
        raise ValueError(
            f"{where}: {len(ids)} ids, {len(texts)} texts and {len(rewards)} rewards, expected as"
            " many of each: give one of each per candidate"
        )
    if len(set(ids)) < len(ids):
        repeated = Counter(ids).most_common(1)[0][0]
        raise ValueError(
            f"{where}: id {repeated!r} stands for several candidates, which would share their"
            " draws: give every candidate an id of its own"
        )
    return finite_rewards(rewards, where, ids)
