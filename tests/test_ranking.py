"""Rankers: signs, sharing and refusals, against one plain forward pass a comparison."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rso import ranking
from rso.config import Templates
from rso.errors import UserError
from rso.progress import progress
from rso.ranking import Comparison, PromptCandidates, RowRanker
from rso.ranking.transformers_engine import TransformersRanker
from rso.templates import RankerEncoder

WORDS = ["one", "bad", "care", "fox", "file", "lines", "lazy", "empty"]
ITEMS = [
    Comparison("a question", "one answer", "another answer"),
    Comparison("a text", "good words", "bad words and more words"),
    Comparison("a question", "another answer", "one answer"),
    Comparison("a question", "one answer", "another answer"),
    Comparison("a question", "", "x"),
]


KINDS = ["transformers", "transformers-t5", pytest.param("vllm", marks=pytest.mark.slow)]
our_llama = pytest.mark.parametrize("kind", KINDS[:1], indirect=True)
# Engines agree within so many nats, whatever shares the batch.
NATS = 1e-4


def plain_margin(model: PreTrainedModel, encoder: RankerEncoder, item: Comparison) -> torch.Tensor:
    """logit_A - logit_B from the whole input as one sequence and all logits."""
    ids = encoder.context(item.prompt).ids
    ids = ids + encoder.side("A", item.a) + encoder.side("B", item.b) + encoder.suffix
    start = {}
    if model.config.is_encoder_decoder:
        start["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    logits = model(input_ids=torch.tensor([ids]), **start).logits[0, -1]
    return logits[encoder.labels.a] - logits[encoder.labels.b]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """An engine, and the family of the ranker where that is not Llama's."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def subject(kind: str, families: dict[str, Family]) -> Family:
    return families["t5" if kind.endswith("t5") else "llama"]


@pytest.fixture(scope="module")
def ranker(kind: str, subject: Family) -> RowRanker:
    engine = kind.removesuffix("-t5")
    return ranking.load_ranker(
        subject.ranker, subject.templates, dtype="float32", token_budget=256, engine=engine
    )


@pytest.fixture(scope="module")
def plain(subject: Family) -> Callable[[Sequence[Comparison]], np.ndarray]:
    model = subject.model_class.from_pretrained(subject.ranker, dtype=torch.float32).eval()
    encoder = RankerEncoder(subject.tokenizer, subject.templates)

    def margins(items: Sequence[Comparison]) -> np.ndarray:
        with torch.inference_mode():
            return torch.stack([plain_margin(model, encoder, item) for item in items]).numpy()

    return margins


def test_compare_equals_one_sequence_at_a_time_in_any_order(
    ranker: RowRanker, plain: Callable[[Sequence[Comparison]], np.ndarray]
) -> None:
    items = [*ITEMS, *(Comparison(f"a {x} question", y, x) for x in WORDS for y in WORDS)]
    expected = plain(items)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(items))
        found = ranker.compare([items[i] for i in order])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[order], atol=NATS)


@our_llama
@pytest.mark.parametrize("token_budget", [1, 100, 4096])
def test_compare_in_any_batch_equals_one_sequence_at_a_time(
    tiny_ranker_dir: str,
    plain: Callable[[Sequence[Comparison]], np.ndarray],
    token_budget: int,
) -> None:
    ranker = ranking.load_ranker(
        tiny_ranker_dir, Templates(), dtype="float32", token_budget=token_budget
    )
    np.testing.assert_allclose(ranker.compare(ITEMS), plain(ITEMS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("orders", ["both", "baseline-first"])
def test_rewards_prefer_the_candidate_to_the_baseline(
    ranker: RowRanker, plain: Callable[[Sequence[Comparison]], np.ndarray], orders: Any
) -> None:
    texts = [*WORDS, "one", "one"]
    items = [PromptCandidates("a question", "one", texts), PromptCandidates("p", "x", [])]
    found = ranker.rewards_many(items, orders=orders)
    forward = plain([Comparison("a question", "one", text) for text in texts])
    backward = plain([Comparison("a question", text, "one") for text in texts])
    expected = (backward - forward) / 2 if orders == "both" else -forward
    np.testing.assert_allclose(found[0].values, expected, atol=NATS)
    np.testing.assert_allclose(found[0].forward, forward, atol=NATS)
    assert found[0].values[0] == found[0].values[8] == found[0].values[9]
    assert found[1].values.shape == (0,) and found[1].num_tokens == 0
    if orders == "both":
        np.testing.assert_allclose(found[0].backward, backward, atol=NATS)
        assert found[0].values[0] == pytest.approx(0, abs=NATS)
        assert ranker.rewards("a question", "one", texts).tolist() == found[0].values.tolist()
    else:
        # The slot alone gives the baseline a reward against itself.
        assert found[0].backward is None and abs(found[0].values[0]) > 0.01


def test_rewards_count_the_tokens_of_shared_prefixes_once(
    ranker: RowRanker, subject: Family
) -> None:
    encoder = RankerEncoder(subject.tokenizer, subject.templates)
    context, end = len(encoder.context("a question").ids), len(encoder.suffix)
    first, second = len(encoder.side("A", "one answer")), len(encoder.side("B", "one answer"))
    texts = ["x", "lazy file", "x", " x\n"]
    of_texts = [len(encoder.side("B", text)) for text in texts[:2]]
    forward = context + first + sum(size + end for size in of_texts)
    of_texts = [len(encoder.side("A", text)) for text in texts[:2]]
    backward = context + sum(size + second + end for size in of_texts)
    items = [PromptCandidates("a question", "one answer", texts)]
    for orders, expected in (("baseline-first", forward), ("both", forward + backward)):
        assert ranker.rewards_many(items, orders=orders)[0].num_tokens == expected


def test_text_that_differs_in_the_prefix_or_white_space_is_the_same_to_a_ranker(
    tiny_ranker_dir: str,
) -> None:
    ranker = ranking.load_ranker(
        tiny_ranker_dir, Templates(response_prefix=" "), dtype="float32", token_budget=256
    )
    same = ["a good file", " a good file", "a good file\n", " a good file \n"]
    with progress("rewards", total=2, unit="responses") as bar:
        (found,) = ranker.rewards_many([PromptCandidates("a question", "lazy", same)], bar)
        assert bar.done == 2 and len(set(found.values.tolist())) == 1
    pairs = [Comparison("a question", a, b) for a in same for b in same]
    # Exactly, so that rounding decides no verdict.
    assert ranker.preference(pairs).tolist() == [0.0] * 16
    with progress("compare", total=1, unit="comparisons") as bar:
        ranker.compare(pairs, bar)
        assert bar.done == 1


def test_preference_averages_both_orders(
    ranker: RowRanker, plain: Callable[[Sequence[Comparison]], np.ndarray]
) -> None:
    forward = plain(ITEMS)
    backward = plain([Comparison(item.prompt, item.b, item.a) for item in ITEMS])
    found = ranker.preference(ITEMS)
    np.testing.assert_allclose(found, (forward - backward) / 2, atol=NATS)
    swapped = ranker.preference([Comparison(item.prompt, item.b, item.a) for item in ITEMS])
    np.testing.assert_allclose(swapped, -found, atol=NATS)
    for mine, expected in zip(ranker.both_orders(ITEMS), (forward, backward), strict=True):
        np.testing.assert_allclose(mine, expected, atol=NATS)


def test_equal_texts_are_computed_once(ranker: RowRanker) -> None:
    items = [PromptCandidates("a question", "one", ["x", "y", "x", "x"])]
    for orders, expected in (("baseline-first", 2), ("both", 4)):
        with progress("rewards", total=expected, unit="comparisons") as bar:
            ranker.rewards_many(items, bar, orders=orders)
            assert bar.done == expected
    with progress("compare", total=4, unit="comparisons") as bar:
        ranker.compare(ITEMS, bar)
        assert bar.done == 4


# The larger one is more than there is to compute.
@pytest.mark.parametrize("token_budget", [256, 1 << 20])
def test_out_of_memory_halves_the_token_budget_once(
    tiny_ranker_dir: str, caplog: pytest.LogCaptureFixture, token_budget: int
) -> None:
    ranker = ranking.load_ranker(
        tiny_ranker_dir, Templates(), dtype="float32", token_budget=token_budget
    )
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    room, batches = 1 << 20, []

    def refuse(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        batches.append(inputs[0].numel())

    embeddings = ranker._model.get_input_embeddings()
    with embeddings.register_forward_pre_hook(refuse):
        expected = ranker.rewards("a question", "one", texts)
        room = max(batches) * 3 // 4
        found = ranker.rewards("a question", "one", texts)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        (warning,) = caplog.messages
        assert "memory ran out" in warning and "half as many" in warning
        room = 1
        with pytest.raises(UserError, match="memory ran out in batches of"):
            ranker.rewards("a question", "one", texts)


def test_nothing_to_compare_gives_nothing(ranker: RowRanker) -> None:
    assert ranker.compare([]).shape == (0,)
    assert ranker.preference([]).shape == (0,)
    assert [z.shape for z in ranker.both_orders([])] == [(0,), (0,)]
    assert ranker.rewards_many([]) == []


def test_non_finite_logits_name_the_prompt(
    tiny_ranker_dir: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_ranker_dir, dtype=torch.float32).eval()
    encoder = RankerEncoder(tiny_tokenizer, Templates())
    with torch.no_grad():
        model.lm_head.weight[encoder.labels.a] = float("nan")
    broken = TransformersRanker(model, encoder)
    with pytest.raises(ranking.NonFiniteLogit, match="prompt 'a question': 1 of 1"):
        broken.rewards("a question", "one", ["two"])


@our_llama
def test_comparison_longer_than_the_context_is_a_user_error(ranker: RowRanker) -> None:
    with pytest.raises(UserError, match=r"prompt 'a question': .* the model's context is 512"):
        ranker.rewards("a question", "one", ["fox " * 600])


def test_long_contexts_are_cut_and_counted(tiny_ranker_dir: str) -> None:
    ranker = ranking.load_ranker(
        tiny_ranker_dir, Templates(max_context_tokens=20), dtype="float32", token_budget=256
    )
    assert ranker.count_cut(["a question", "a question " * 50]) == 1
    long = [Comparison("a question " * n, "one", "two") for n in (50, 60)]
    first, second = ranker.compare(long)
    assert first == pytest.approx(second, abs=1e-5)


def test_planted_preference_has_the_right_sign_everywhere(
    make_llama: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A ranker taught by plain cross-entropy that "good" is good gives "good" the high reward."""
    directory = make_llama(tmp_path / "planted", initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    encoder = RankerEncoder(tiny_tokenizer, Templates())
    plant(model, encoder)
    ranker = TransformersRanker(model.eval(), encoder)
    rewards = ranker.rewards("a text", "lazy", ["good", "fox", "good", "empty"])
    assert rewards[[0, 2]].min() > 1 + rewards[[1, 3]].max()
    z = ranker.preference(
        [Comparison("a text", "good", "fox"), Comparison("a text", "fox", "good")]
    )
    assert z[0] > 1 and z[1] < -1


def plant(model: PreTrainedModel, encoder: RankerEncoder) -> None:
    """Train on "good" against another word in either slot, and on other words against each other.

    The target is the label token; between two other words it is both labels, once each.
    """
    a, b = encoder.labels
    taught = [(("good", word), a) for word in WORDS] + [((word, "good"), b) for word in WORDS]
    others = list(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
    taught += [(pair, label) for pair in others for label in (a, b)]
    pairs = [pair for pair, _ in taught]
    target = torch.tensor([label for _, label in taught])
    inputs = [encoder.context("a text").ids + encoder.branch(*pair) for pair in pairs]
    ids = torch.zeros(len(pairs), max(map(len, inputs)), dtype=torch.int64)
    for row, values in enumerate(inputs):
        ids[row, : len(values)] = torch.tensor(values)
    last = torch.tensor([len(values) - 1 for values in inputs])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        # Causal attention: padding on the right changes nothing at the last position.
        logits = model(input_ids=ids).logits[torch.arange(len(pairs)), last]
        loss = torch.nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
