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
Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

# Candidates walked at once: some arrays of this size fit a core's cache.
_BLOCK = 1 << 15


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


class Selections(NamedTuple):
    """The same of P prompts: [N] for the candidates in their given order, [P] for the prompts."""

    is_accepted: Bools
    round: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    acceptance_probability: Floats
    num_rounds: Counts
    num_draws: Counts
    num_shortfall: Counts


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


class Candidates(NamedTuple):
    """The candidates of P prompts, prompt after prompt, N in all.

    Within a prompt they come in ascending order of their ids, so that `collapse` lets the copy with
    the smallest id stand for a text.
    """

    prompt_hashes: seeds.UInt64s
    """[P]: `seeds.hashes` of the prompt ids."""
    sizes: Indices
    """[P]: candidates of each prompt."""
    id_hashes: seeds.UInt64s
    """[N]: `seeds.hashes` of the candidates' ids."""
    texts: Indices
    """[N]: numbers from 0, equal for equal texts of one prompt."""
    rewards: Floats
    """[N]: finite."""


class Diagnostics(NamedTuple):
    """What β does to the candidates of each prompt: [P] each."""

    has_best: Bools
    """A candidate with the largest reward is among the accepted."""
    reward_gain: Floats
    """Mean reward of the accepted less that of all candidates, nats; 0 without accepted ones."""
    expected_acceptance: Floats
    """Theorem 1's acceptance rate of a draw from the reference policy, with the sample maximum."""
    effective_samples: Floats
    """Kish's effective number of candidates weighted exp(reward / β), from 1 to n."""
    kl: Floats
    """KL(π_r || π_sft) in nats, estimated over the candidates with these weights; at most ln n."""


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
    values = _checked_rewards(where, ids, texts, rewards)
    by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.intp)
    number: dict[str, int] = {}
    found = select_many(
        Candidates(
            prompt_hashes=seeds.hashes([prompt_id]),
            sizes=np.array([len(ids)]),
            id_hashes=seeds.hashes([ids[index] for index in by_id]),
            texts=np.array([number.setdefault(texts[i], i) for i in by_id], dtype=np.intp),
            rewards=values[by_id],
        ),
        beta=beta,
        num_samples=num_samples,
        seed=seed,
        duplicates=duplicates,
    )
    given = np.argsort(by_id)
    return Selection(
        is_accepted=found.is_accepted[given],
        round=found.round[given],
        position=found.position[given],
        acceptance_probability=found.acceptance_probability[given],
        num_rounds=int(found.num_rounds[0]),
        num_draws=int(found.num_draws[0]),
        num_shortfall=int(found.num_shortfall[0]),
    )


def select_many(
    candidates: Candidates,
    *,
    beta: float,
    num_samples: int,
    seed: int,
    duplicates: Duplicates = "keep",
) -> Selections:
    """Algorithm 1 on the candidates of many prompts at once, each prompt as by `select`.

    The fields of a candidate are [N] in the order given, those of a prompt [P]. Prompts are walked
    side by side in blocks, so that memory beyond the result stays bounded.
    Raises ValueError for settings out of range; rewards are taken to be finite.
    """
    _check_settings("select", beta, num_samples, duplicates)
    num_prompts, size = len(candidates.sizes), len(candidates.rewards)
    result = Selections(
        is_accepted=np.zeros(size, dtype=np.bool_),
        round=np.full(size, -1, dtype=np.int32),
        position=np.full(size, -1, dtype=np.int32),
        acceptance_probability=np.zeros(size),
        num_rounds=np.zeros(num_prompts, dtype=np.int64),
        num_draws=np.zeros(num_prompts, dtype=np.int64),
        num_shortfall=np.full(num_prompts, num_samples, dtype=np.int64),
    )
    walk = _Walk(candidates, result, beta, num_samples, seed, duplicates == "collapse")
    # Of similar size, so that little of a block is padding.
    by_size = np.argsort(candidates.sizes, kind="stable")
    start = int(np.searchsorted(candidates.sizes[by_size], 0, side="right"))
    while start < num_prompts:
        num = max(1, _BLOCK // int(candidates.sizes[by_size[start]]))
        # The last prompt of a block is the widest.
        while num > 1 and num * int(candidates.sizes[by_size[start:][:num]][-1]) > 2 * _BLOCK:
            num //= 2
        walk.block(by_size[start : start + num])
        start += num
    np.greater_equal(result.position, 0, out=result.is_accepted)
    return result


def diagnose(candidates: Candidates, selections: Selections, beta: float) -> Diagnostics:
    """What algorithm 1 at `beta` made of each prompt; every prompt has a candidate."""
    sizes, rewards = candidates.sizes, candidates.rewards
    starts = np.cumsum(sizes) - sizes
    is_accepted = selections.is_accepted

    def total(values: Floats) -> Floats:
        sums: Floats = np.add.reduceat(values, starts)
        return sums

    largest = np.repeat(np.maximum.reduceat(rewards, starts), sizes)
    weights = _probabilities(rewards, largest, beta)
    mass = total(weights)
    logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    num_accepted = total(is_accepted.astype(np.float64))
    gain = total(np.where(is_accepted, rewards, 0.0)) / np.maximum(num_accepted, 1)
    return Diagnostics(
        has_best=np.logical_or.reduceat(is_accepted & (rewards == largest), starts),
        reward_gain=np.where(num_accepted > 0, gain - total(rewards) / sizes, 0.0),
        expected_acceptance=mass / sizes,
        effective_samples=mass**2 / total(weights**2),
        kl=total(weights * logs) / mass - np.log(mass / sizes),
    )


def acceptance_probabilities(rewards: Rewards, beta: float) -> Floats:
    """float64 [n]: exp((reward - max reward) / beta), exactly 1 at the maximum (theorem 1).

    Its limits at the ends: the indicator of the maximum at beta = 0, one everywhere at beta = inf.
    """
    values = np.asarray(rewards, dtype=np.float64)
    return _probabilities(values, values.max(initial=-np.inf), beta)


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


def _probabilities(rewards: Floats, largest: Floats | np.float64, beta: float) -> Floats:
    # Gaps between extreme rewards overflow to -inf, which is the right probability of zero.
    with np.errstate(over="ignore"):
        gaps: Floats = rewards - largest
        if beta == 0:
            return np.where(gaps == 0, 1.0, 0.0)
        if np.isinf(beta):
            return np.ones_like(gaps)
        # Candidates out of play may lie above the largest in play.
        probabilities: Floats = np.exp(np.minimum(gaps, 0.0) / beta)
        return probabilities


class _Walk:
    """The passes of algorithm 1 over blocks of prompts, a prompt a row, its candidates columns."""

    def __init__(
        self,
        candidates: Candidates,
        result: Selections,
        beta: float,
        num_samples: int,
        seed: int,
        collapse: bool,
    ) -> None:
        self._given, self._result = candidates, result
        self._beta, self._num_samples, self._collapse = beta, num_samples, collapse
        ends = np.cumsum(candidates.sizes)
        self._starts = ends - candidates.sizes
        self._seed = seed

    def block(self, prompts: Indices) -> None:
        """Fill in the result for some prompts."""
        given, result = self._given, self._result
        sizes = given.sizes[prompts]
        columns = np.arange(int(sizes.max()))
        exists = columns < sizes[:, None]
        # Padding points at a candidate of the same prompt and is never alive.
        index = self._starts[prompts][:, None] + np.minimum(columns, sizes[:, None] - 1)
        prompt = given.prompt_hashes[prompts][:, None]
        order = seeds.bases_of(prompt, given.id_hashes[index], "rejection", self._seed)
        order[~exists] = np.iinfo(np.uint64).max
        walk = np.argsort(order, axis=1)
        text = _first_copies(np.where(exists, given.texts[index], -1 - columns))
        index = np.take_along_axis(index, walk, axis=1)
        # Padding sorts behind all candidates.
        alive = exists.copy()
        if text is not None:
            text = np.take_along_axis(text, walk, axis=1)
            if self._collapse:
                alive &= text == walk
        states = seeds.bases_of(prompt, given.id_hashes[index], "uniforms", self._seed)
        rewards = given.rewards[index]
        probability = _acceptance(rewards, exists, self._beta)
        self._passes(prompts, index, rewards, states, alive, text, probability)
        if text is not None and self._collapse:
            # Copies get the probability of the one that stands for them.
            standing = np.empty_like(walk)
            np.put_along_axis(standing, walk, columns[None, :], axis=1)
            place = np.take_along_axis(standing, text, axis=1)
            probability = np.take_along_axis(probability, place, axis=1)
        result.acceptance_probability[index[exists]] = probability[exists]

    def _passes(
        self,
        prompts: Indices,
        index: Indices,
        rewards: Floats,
        states: seeds.UInt64s,
        alive: Bools,
        text: Indices | None,
        probability: Floats,
    ) -> None:
        """Walk until every prompt has its samples or no candidates; `probability` is updated."""
        result = self._result
        rows = np.arange(len(prompts))
        num_accepted = np.zeros(len(prompts), dtype=np.int64)
        # Ends: in each pass the largest reward has probability one, and a uniform is below one.
        for number in range(self._num_samples):
            goes_on = alive.any(axis=1) & (num_accepted[rows] < self._num_samples)
            if not goes_on.any():
                break
            if not goes_on.all():
                rows, index, rewards, states, alive = (
                    array[goes_on] for array in (rows, index, rewards, states, alive)
                )
                text = None if text is None else text[goes_on]
            room = self._num_samples - num_accepted[rows][:, None]
            chance = _acceptance(rewards, alive, self._beta)
            probability[rows] = np.where(alive, chance, probability[rows])
            is_hit = alive & (seeds.uniforms_at(states, number) < chance)
            if text is not None:
                _drop_later_copies(is_hit, text)
            counts = np.cumsum(is_hit, axis=1)
            is_accepted = is_hit & (counts <= room)
            # A draw is made until the last sample is found.
            is_drawn = alive & (counts - is_hit < room)
            row, column = np.nonzero(is_accepted)
            chosen = index[row, column]
            result.round[chosen] = number
            result.position[chosen] = num_accepted[rows[row]] + counts[row, column] - 1
            if text is None:
                alive &= ~is_accepted
            else:
                retired_at = np.full(text.shape, text.shape[1])
                retired_at[row, text[row, column]] = column
                retired_at = np.take_along_axis(retired_at, text, axis=1)
                # A copy behind the one that was accepted makes no draw.
                is_drawn &= np.arange(text.shape[1]) <= retired_at
                alive &= retired_at == text.shape[1]
            num_accepted[rows] += np.minimum(counts[:, -1], room[:, 0])
            result.num_draws[prompts[rows]] += is_drawn.sum(axis=1)
            result.num_rounds[prompts[rows]] += 1
        result.num_shortfall[prompts] = self._num_samples - num_accepted


def _acceptance(rewards: Floats, alive: Bools, beta: float) -> Floats:
    """[rows, columns]: the acceptance probabilities among the living of each row."""
    largest = np.where(alive, rewards, -np.inf).max(axis=1, keepdims=True)
    return _probabilities(rewards, largest, beta)


def _drop_later_copies(is_hit: Bools, text: Indices) -> None:
    """Of several hits of one text in a row leave the first, in place."""
    row, column = np.nonzero(is_hit)
    _, first = np.unique(row * text.shape[1] + text[row, column], return_index=True)
    is_later = np.ones(len(row), dtype=np.bool_)
    is_later[first] = False
    is_hit[row[is_later], column[is_later]] = False


def _first_copies(texts: Indices) -> Indices | None:
    """[rows, columns]: the first column of the row with the same text; None without copies."""
    order = np.argsort(texts, axis=1, kind="stable")
    ordered = np.take_along_axis(texts, order, axis=1)
    is_new = np.ones(texts.shape, dtype=np.bool_)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=is_new[:, 1:])
    if is_new.all():
        return None
    run = np.maximum.accumulate(np.where(is_new, np.arange(texts.shape[1]), 0), axis=1)
    first = np.empty_like(texts)
    np.put_along_axis(first, order, np.take_along_axis(order, run, axis=1), axis=1)
    return first


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
