"""Statistical rejection sampling (algorithm 1): from candidates of π_sft to samples of π_r (eq. 4).

The paper's listing leaves some choices open. Candidates are taken in a keyed random order. By
default (`duplicates="keep"`) every copy of a text has its own draw, so that the copies keep their
share of the proposals; when one copy is accepted, all copies leave play. If there are too few
distinct candidates, all of them are accepted and the shortfall is counted. Rewards must be finite.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from rso import seeds
from rso.aliases import Bools, Floats, Indices, UInt64s
from rso.errors import UserError

Duplicates = Literal["keep", "collapse"]
RewardsLike = Sequence[float] | npt.NDArray[np.floating]
Counts = npt.NDArray[np.int64]

# Candidates per block of prompts: the arrays of a pass over one block fit the cache of a core.
_BLOCK = 1 << 16

# The lowest 24 bits of a key are the candidate's column. The other 40 bits are random. `_NEVER`
# sorts last; it replaces the keys of candidates that cannot be accepted in a pass.
_COLUMN_BITS = 24
_COLUMN = np.uint64(2**_COLUMN_BITS - 1)
_NEVER = np.uint64(2**64 - 1)

# Two values of `position`: not accepted; and out of play, as a copy of an accepted text.
_DECLINED, _RETIRED = -1, -2


class NonFiniteReward(UserError):
    """A reward is NaN or infinite.

    Comparisons with NaN are false, so the paper's listing would accept such a candidate silently.
    """


class Selection(NamedTuple):
    """What algorithm 1 did with each of the n candidates of one prompt, in their given order."""

    is_accepted: npt.NDArray[np.bool_]
    """[n]: the candidate itself is accepted. The other copies of an accepted text are declined."""
    round: npt.NDArray[np.int32]
    """[n]: the pass that accepted the candidate, from 0; -1 if declined."""
    position: npt.NDArray[np.int32]
    """[n]: the place in the order of acceptance, from 0; -1 if declined."""
    acceptance_probability: Floats
    """[n]: exp((reward - max_reward) / beta) in the last pass that had the candidate in play.

    `max_reward` is the largest reward in play in that pass.
    """
    num_rounds: int
    """Passes made."""
    num_draws: int
    """Uniforms compared. A copy of a text has no draw after the text is accepted."""
    num_shortfall: int
    """How many of `num_samples` are missing because there were too few distinct candidates."""


class Selections(NamedTuple):
    """The fields of `Selection` for P prompts with N candidates in all.

    Arrays over candidates are [N], in the given order. Arrays over prompts are [P].
    """

    is_accepted: Bools
    round: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    acceptance_probability: Floats
    num_rounds: Counts
    num_draws: Counts
    num_shortfall: Counts
    draws_by_round: Counts
    """[rounds]: the draws of each pass, summed over prompts."""


def rejection_sample(
    texts: Sequence[str],
    rewards: RewardsLike,
    *,
    beta: float,
    num_samples: int,
    seed: int,
    ids: Sequence[str] | None = None,
    duplicates: Duplicates = "keep",
) -> list[int]:
    """Indices of the accepted candidates of one prompt, in order of acceptance (algorithm 1).

    There are `num_samples` indices, or fewer if there are fewer distinct texts. beta = 0 takes the
    best candidates, beta = inf a uniform subset. The draws depend on `ids`, so that the order of
    the input does not matter. Without `ids` the draws of a candidate depend on its text and on how
    many copies of the text stand before it.

    Raises:
        NonFiniteReward: a reward is NaN or infinite.
        ValueError: lengths differ, ids are not distinct, or a setting is out of range.
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

    The candidates of a prompt are in ascending order of their ids. `collapse` uses the first copy
    of each text, which is then the copy with the smallest id.
    """

    sizes: Indices
    """[P]: the number of candidates of each prompt."""
    states: UInt64s
    """[N]: the result of `states_of`, which determines the order and the draws."""
    texts: Indices
    """[N]: numbers from 0, equal for equal texts of one prompt."""
    rewards: Floats
    """[N]: finite."""


def select(
    ids: Sequence[str],
    texts: Sequence[str],
    rewards: RewardsLike,
    *,
    prompt_id: str,
    beta: float,
    num_samples: int,
    seed: int,
    duplicates: Duplicates = "keep",
) -> Selection:
    """The `Selection` of algorithm 1 from the candidates of one prompt.

    `ids`, `texts` and `rewards` are [n]. The draws are keyed by (seed, prompt_id, id, pass). With
    `duplicates="collapse"` only the copy of a text with the smallest id takes part, with its own
    reward.

    Raises:
        NonFiniteReward: a reward is NaN or infinite.
        ValueError: lengths differ, ids are not distinct, or a setting is out of range.
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


def states_of(prompt_hashes: UInt64s, sizes: Indices, id_hashes: UInt64s, seed: int) -> UInt64s:
    """uint64 [N]: one state per candidate, which depends on (seed, prompt, id) only.

    `prompt_hashes` [P] and `id_hashes` [N] are `seeds.hashes` of the ids of prompts and candidates.
    `sizes` [P] count the candidates of each prompt. The top 40 bits of a state determine the
    candidate's place in the order. `seeds.uniforms_at` makes its draw in each pass from the state.
    """
    return seeds.bases_of(np.repeat(prompt_hashes, sizes), id_hashes, "rejection", seed)


def select_many(
    candidates: Candidates,
    *,
    beta: float,
    num_samples: int,
    duplicates: Duplicates = "keep",
) -> Selections:
    """The `Selections` of algorithm 1 from the candidates of many prompts.

    Each prompt has the result that `select` gives it. Prompts are processed in blocks, which bounds
    the arrays of a pass. Rewards must be finite; this is not checked.

    Raises:
        ValueError: a setting is out of range.
    """
    _check_settings("select", beta, num_samples, duplicates)
    walk = _walked if duplicates == "keep" else _collapsed
    return walk(candidates, beta, num_samples)


def acceptance_probabilities(
    rewards: RewardsLike, beta: float, largest: Floats | np.float64 | None = None
) -> Floats:
    """float64 [...]: exp((reward - largest) / beta), exactly 1 at the largest (theorem 1).

    `largest` broadcasts. By default it is the largest of all `rewards`. A reward of -inf has
    probability 0. At beta = 0 the probability is 1 for the largest reward and 0 for all others. At
    beta = inf it is 1 for every finite reward.
    """
    values = np.asarray(rewards, dtype=np.float64)
    top = values.max(initial=-np.inf) if largest is None else largest
    # Gaps between extreme rewards overflow to -inf, which gives the right probability of zero.
    with np.errstate(over="ignore"):
        if beta == 0:
            return np.where(values == top, 1.0, 0.0)
        if np.isinf(beta):
            return (values > -np.inf).astype(np.float64)
        probabilities: Floats = np.exp((values - top) / beta)
        return probabilities


def finite_rewards(rewards: RewardsLike, where: str, ids: Sequence[str] | None = None) -> Floats:
    """The rewards as float64 [n].

    Raises:
        NonFiniteReward: a reward is NaN or infinite. The message names `where` and the candidate.
    """
    values = np.asarray(rewards, dtype=np.float64)
    for index in np.flatnonzero(~np.isfinite(values)):
        name = f"{index}" if ids is None else f"{ids[index]} (index {index})"
        raise NonFiniteReward(
            f"{where}: candidate {name} has reward {values[index]}, expected a finite number:"
            " look at the ranker that scored it, or drop the candidate"
        )
    return values


def _walked(given: Candidates, beta: float, num_samples: int) -> Selections:
    """Sample prompts of one size together; prompts that may have copies are processed apart."""
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
    """[prompts]: whether texts may repeat: their numbers do not strictly rise.

    Numbers in order of first appearance strictly rise if no text repeats.
    """
    falls = np.flatnonzero(texts[1:] <= texts[:-1]) + 1
    prompts = np.searchsorted(starts, falls, side="right") - 1
    found = np.zeros(len(starts), dtype=np.bool_)
    found[prompts[falls > starts[prompts]]] = True
    return found


class _Walk:
    """The passes over prompts of one size; arrays have a row per prompt, a column per candidate."""

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
        # Views [start, column]: row i has the `size` values from index i on.
        self._states = sliding_window_view(given.states, size)
        self._rewards = sliding_window_view(given.rewards, size)
        self._texts: Indices | None = None
        self._position = sliding_window_view(result.position, size, writeable=True)
        self._probability = sliding_window_view(result.acceptance_probability, size, writeable=True)

    def run(self, prompts: Indices, texts: Indices | None) -> None:
        """Make passes until every prompt has its samples or has no candidates in play.

        `texts` are the texts of all candidates, in an array that this method overwrites. Give None
        if no prompt has copies.
        """
        if texts is not None:
            self._texts = sliding_window_view(texts, self._size, writeable=True)
            for some in self._blocks(prompts):
                starts = self._starts[some]
                self._texts[starts] = _columns_of_texts(self._texts[starts])
        # So many passes are enough, because every pass accepts a candidate of every prompt: the
        # largest reward has probability one, and a uniform is below one.
        for number in range(min(self._num_samples, self._size)):
            left = [self._pass(number, some) for some in self._blocks(prompts)]
            prompts = np.concatenate([prompts[:0], *left])

    def _blocks(self, prompts: Indices) -> list[Indices]:
        """The prompts in blocks of at most `_BLOCK` candidates, with at least one prompt each."""
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
        # The key of a miss becomes _NEVER: all its bits are set.
        hits = keys | -is_miss.astype(np.uint64)
        if self._texts is not None:
            # The first copy of a text that hits is accepted. The copies after it have no draw.
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

        # Candidates after the last sample have no draw.
        last = np.where(count < room, _NEVER - 1, hits[np.arange(len(room)), count - 1])[:, None]
        is_drawn = keys <= (last if self._texts is None else np.minimum(least, last))
        num_draws = is_drawn.sum(axis=1)
        result.num_draws[prompts] += num_draws
        result.draws_by_round[number] += num_draws.sum()
        result.num_rounds[prompts] += 1
        result.num_shortfall[prompts] -= count
        if number:
            # A probability never falls from pass to pass, and it is zero out of play. So the
            # maximum is the probability in the last pass that had the candidate in play.
            np.maximum(chance, self._probability[starts], out=chance)
        self._probability[starts] = chance

        # A prompt that still needs samples has accepted every hit, so its other candidates whose
        # text was hit are copies of accepted texts.
        is_left = ((keys != _NEVER) & is_miss).any(axis=1) & (count < room)
        if self._texts is not None:
            position = self._position[starts[is_left]]
            np.putmask(position, ~is_miss[is_left] & (position == _DECLINED), _RETIRED)
            self._position[starts[is_left]] = position
        left: Indices = prompts[is_left]
        return left


def _columns_of_texts(texts: Indices) -> Indices:
    """[rows, columns]: one column per text, the same for all copies of the text."""
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


def _least_of_text(keys: UInt64s, texts: Indices) -> UInt64s:
    """[rows, columns]: the least key among the copies of each candidate's text."""
    cells = texts + np.arange(len(texts))[:, None] * texts.shape[1]
    least = np.full(texts.size, _NEVER)
    np.minimum.at(least, cells.ravel(), keys.ravel())
    of_text: UInt64s = least[cells]
    return of_text


def _collapsed(candidates: Candidates, beta: float, num_samples: int) -> Selections:
    """Sample from the first copies of the texts; other copies get their acceptance probability."""
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
    """One id per candidate, made of its text and the number of copies before it.

    The ids of the copies of a text sort in the order of the copies.
    """
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
    where: str, ids: Sequence[str], texts: Sequence[str], rewards: RewardsLike
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
