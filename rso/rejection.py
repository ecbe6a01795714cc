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
from numpy.lib.stride_tricks import sliding_window_view

from rso import seeds
from rso.errors import UserError

Duplicates = Literal["keep", "collapse"]
Rewards = Sequence[float] | npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

# Candidates walked at once: the arrays of a step fit a core's cache.
_BLOCK = 1 << 16

# The lowest bits of a key are a column, the other 40 random.
_COLUMN_BITS = 24
_COLUMN = np.uint64(2**_COLUMN_BITS - 1)
_NEVER = np.uint64(2**64 - 1)

# Positions: not accepted, and a copy of what was, out of play.
_DECLINED, _RETIRED = -1, -2


class NonFiniteReward(UserError):
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
    draws_by_round: Counts
    """[rounds]: the draws of each pass, of all prompts."""


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

    sizes: Indices
    """[P]: candidates of each prompt."""
    states: seeds.UInt64s
    """[N]: `states_of` their ids, which order the walk and give its draws."""
    texts: Indices
    """[N]: numbers from 0, equal for equal texts of one prompt."""
    rewards: Floats
    """[N]: finite."""


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
            sizes=np.array([len(ids)]),
            states=states_of(
                seeds.hashes([prompt_id]),
                np.array([len(ids)]),
                seeds.hashes([ids[index] for index in by_id]),
                seed,
            ),
            texts=np.array([number.setdefault(texts[i], i) for i in by_id], dtype=np.intp),
            rewards=values[by_id],
        ),
        beta=beta,
        num_samples=num_samples,
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


def states_of(
    prompt_hashes: seeds.UInt64s, sizes: Indices, id_hashes: seeds.UInt64s, seed: int
) -> seeds.UInt64s:
    """uint64 [N]: what orders the walk and gives its draws, a function of (seed, prompt, id).

    From `seeds.hashes` of the P prompts and of their N candidates, `sizes` of each prompt. The top
    40 bits put a candidate in its place; `seeds.uniforms_at` makes its draw in each pass.
    """
    return seeds.bases_of(np.repeat(prompt_hashes, sizes), id_hashes, "rejection", seed)


def select_many(
    candidates: Candidates,
    *,
    beta: float,
    num_samples: int,
    duplicates: Duplicates = "keep",
) -> Selections:
    """Algorithm 1 on the candidates of many prompts at once, each prompt as by `select`.

    The fields of a candidate are [N] in the order given, those of a prompt [P]. Prompts are walked
    side by side in blocks, so that memory beyond the result stays bounded.
    Raises ValueError for settings out of range; rewards are taken to be finite.
    """
    _check_settings("select", beta, num_samples, duplicates)
    walk = _walked if duplicates == "keep" else _collapsed
    return walk(candidates, beta, num_samples)


def acceptance_probabilities(
    rewards: Rewards, beta: float, largest: Floats | np.float64 | None = None
) -> Floats:
    """float64 [...]: exp((reward - largest) / beta), exactly 1 at the largest (theorem 1).

    `largest` broadcasts; it is the largest of `rewards` if not given. A reward of -inf has
    probability 0. The limits at the ends: the indicator of the largest at beta = 0, one for all
    finite rewards at beta = inf.
    """
    values = np.asarray(rewards, dtype=np.float64)
    top = values.max(initial=-np.inf) if largest is None else largest
    # Gaps between extreme rewards overflow to -inf, which is the right probability of zero.
    with np.errstate(over="ignore"):
        if beta == 0:
            return np.where(values == top, 1.0, 0.0)
        if np.isinf(beta):
            return (values > -np.inf).astype(np.float64)
        probabilities: Floats = np.exp((values - top) / beta)
        return probabilities


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


def _walked(given: Candidates, beta: float, num_samples: int) -> Selections:
    """Walk prompts of one size side by side, those that may have copies apart from the others."""
    result = _nothing_accepted(given, num_samples)
    starts = np.cumsum(given.sizes) - given.sizes
    may_have_copies = _may_have_copies(given.texts, starts)
    texts = given.texts.copy() if may_have_copies.any() else None
    for size in np.unique(given.sizes[given.sizes > 0]).tolist():
        for has_copies in (False, True):
            prompts = np.flatnonzero((given.sizes == size) & (may_have_copies == has_copies))
            walk = _Walk(given, result, starts, size, beta, num_samples)
            walk.run(prompts, texts if has_copies else None)
    np.maximum(result.position, _DECLINED, out=result.position)
    np.greater_equal(result.position, 0, out=result.is_accepted)
    return result


def _nothing_accepted(candidates: Candidates, num_samples: int) -> Selections:
    num_prompts, size = len(candidates.sizes), len(candidates.rewards)
    max_rounds = min(num_samples, int(candidates.sizes.max(initial=0)))
    return Selections(
        is_accepted=np.zeros(size, dtype=np.bool_),
        round=np.full(size, _DECLINED, dtype=np.int32),
        position=np.full(size, _DECLINED, dtype=np.int32),
        acceptance_probability=np.zeros(size),
        num_rounds=np.zeros(num_prompts, dtype=np.int64),
        num_draws=np.zeros(num_prompts, dtype=np.int64),
        num_shortfall=np.full(num_prompts, num_samples, dtype=np.int64),
        draws_by_round=np.zeros(max_rounds, dtype=np.int64),
    )


def _may_have_copies(texts: Indices, starts: Indices) -> Bools:
    """[prompts]: whether texts may repeat; numbered as they first appear, they rise if none do."""
    falls = np.flatnonzero(texts[1:] <= texts[:-1]) + 1
    prompts = np.searchsorted(starts, falls, side="right") - 1
    found = np.zeros(len(starts), dtype=np.bool_)
    found[prompts[falls > starts[prompts]]] = True
    return found


class _Walk:
    """The passes over prompts of one size: a prompt a row, its candidates columns."""

    def __init__(
        self,
        given: Candidates,
        result: Selections,
        starts: Indices,
        size: int,
        beta: float,
        num_samples: int,
    ) -> None:
        self._result, self._starts, self._size = result, starts, size
        self._beta, self._num_samples = beta, num_samples
        # Views, [start, column]: the `size` values from each start on.
        self._states = sliding_window_view(given.states, size)
        self._rewards = sliding_window_view(given.rewards, size)
        self._texts: Indices | None = None
        self._position = sliding_window_view(result.position, size, writeable=True)
        self._probability = sliding_window_view(result.acceptance_probability, size, writeable=True)

    def run(self, prompts: Indices, texts: Indices | None) -> None:
        """Make passes until every prompt has its samples or no candidates in play.

        `texts` are those of all candidates, None if no prompt has copies; a copy to write in.
        """
        if texts is not None:
            self._texts = sliding_window_view(texts, self._size, writeable=True)
            for some in self._blocks(prompts):
                starts = self._starts[some]
                self._texts[starts] = _columns_of_texts(self._texts[starts])
        # Ends: in each pass the largest reward has probability one, and a uniform is below one.
        for number in range(min(self._num_samples, self._size)):
            left = [self._pass(number, some) for some in self._blocks(prompts)]
            prompts = np.concatenate([prompts[:0], *left])

    def _blocks(self, prompts: Indices) -> list[Indices]:
        """So many prompts at a time as fit a core's cache."""
        num = max(1, _BLOCK // self._size)
        return [prompts[at : at + num] for at in range(0, len(prompts), num)]

    def _pass(self, number: int, prompts: Indices) -> Indices:
        """Make pass `number` over the candidates in play; return the prompts that need another."""
        result, starts = self._result, self._starts[prompts]
        states, rewards = self._states[starts], self._rewards[starts]
        keys = (states & ~_COLUMN) | np.arange(self._size, dtype=np.uint64)
        if number:
            is_out = self._position[starts] != _DECLINED
            np.putmask(rewards, is_out, -np.inf)
            np.putmask(keys, is_out, _NEVER)
        chance = acceptance_probabilities(rewards, self._beta, rewards.max(axis=1, keepdims=True))
        is_miss = seeds.uniforms_at(states, number) >= chance
        # All bits set, _NEVER, where it is a miss.
        hits = keys | -is_miss.astype(np.uint64)
        if self._texts is not None:
            # Of the copies of a text the first one hit is accepted; those behind make no draw.
            least = _least_of_text(hits, self._texts[starts])
            np.putmask(hits, hits > least, _NEVER)
            is_miss = least == _NEVER
        hits.sort(axis=1)
        hits = hits[:, : self._num_samples]
        room = result.num_shortfall[prompts]
        row, order = np.nonzero((hits != _NEVER) & (np.arange(hits.shape[1]) < room[:, None]))
        places = starts[row] + (hits[row, order] & _COLUMN).astype(np.intp)
        result.round[places] = number
        result.position[places] = self._num_samples - room[row] + order
        count = np.bincount(row, minlength=len(room))

        # No draw is made beyond the last sample.
        last = np.where(count < room, _NEVER - 1, hits[np.arange(len(room)), count - 1])[:, None]
        is_drawn = keys <= (last if self._texts is None else np.minimum(least, last))
        num_draws = is_drawn.sum(axis=1)
        result.num_draws[prompts] += num_draws
        result.draws_by_round[number] += num_draws.sum()
        result.num_rounds[prompts] += 1
        result.num_shortfall[prompts] -= count
        if number:
            # They rise from pass to pass, and are zero out of play.
            np.maximum(chance, self._probability[starts], out=chance)
        self._probability[starts] = chance

        # Where there is room left, all that was hit was accepted.
        is_left = ((keys != _NEVER) & is_miss).any(axis=1) & (count < room)
        if self._texts is not None:
            position = self._position[starts[is_left]]
            np.putmask(position, ~is_miss[is_left] & (position == _DECLINED), _RETIRED)
            self._position[starts[is_left]] = position
        left: Indices = prompts[is_left]
        return left


def _columns_of_texts(texts: Indices) -> Indices:
    """[rows, columns]: a column for each text, the same for all its copies."""
    columns = np.arange(texts.shape[1])
    # One sort of (text, column) pairs is several times faster than an argsort.
    ordered = (texts << _COLUMN_BITS) | columns
    ordered.sort(axis=1)
    is_first = np.ones(texts.shape, dtype=np.bool_)
    np.greater(ordered[:, 1:] ^ ordered[:, :-1], int(_COLUMN), out=is_first[:, 1:])
    run = np.maximum.accumulate(np.where(is_first, columns, 0), axis=1)
    found = np.empty_like(texts)
    np.put_along_axis(found, ordered & int(_COLUMN), run, axis=1)
    return found


def _least_of_text(keys: seeds.UInt64s, texts: Indices) -> seeds.UInt64s:
    """[rows, columns]: the least key among the copies of a text."""
    cells = texts + np.arange(len(texts))[:, None] * texts.shape[1]
    least = np.full(texts.size, _NEVER)
    np.minimum.at(least, cells.ravel(), keys.ravel())
    of_text: seeds.UInt64s = least[cells]
    return of_text


def _collapsed(candidates: Candidates, beta: float, num_samples: int) -> Selections:
    """Walk the first copy of each text alone; the others get its acceptance probability."""
    num_prompts = len(candidates.sizes)
    prompts = np.repeat(np.arange(num_prompts), candidates.sizes)
    cells = prompts * (candidates.texts.max(initial=0) + 1) + candidates.texts
    _, firsts, text = np.unique(cells, return_index=True, return_inverse=True)
    first = firsts[text]
    stands = first == np.arange(len(first))
    alone = Candidates(
        np.bincount(prompts[stands], minlength=num_prompts),
        candidates.states[stands],
        candidates.texts[stands],
        candidates.rewards[stands],
    )
    walked = _walked(alone, beta, num_samples)
    result = _nothing_accepted(candidates, num_samples)
    for name in ("is_accepted", "round", "position", "acceptance_probability"):
        getattr(result, name)[stands] = getattr(walked, name)
    result.acceptance_probability[:] = result.acceptance_probability[first]
    return walked._replace(**{name: getattr(result, name) for name in Selections._fields[:4]})


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
