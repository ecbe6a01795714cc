"""T5 on shared-prefix rows and in the trainers, against one sequence at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family
from test_training import (
    BF16,
    FP32,
    assert_step_equals,
    comparisons,
    demonstrations,
    settings,
)
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from rso import prefix
from rso.config import Compute, TrainPolicy, TrainRanker, TrainSft
from rso.errors import UserError
from rso.models import load_model, save_model
from rso.prefix import PrefixRow
from rso.ranking import Comparison, load_ranker
from rso.templates import RankerEncoder, encode_prompt, encode_response
from rso.training.base import PrefixTrainer
from rso.training.policy import PolicyPair, train_policy
from rso.training.ranker import train_ranker
from rso.training.sft import train_sft

ROWS = [
    PrefixRow([20, 30, 40, 50, 1], [[60, 61, 62, 1], [70, 1], [1], [60, 61, 62, 1]]),
    PrefixRow([9], [[80, 81, 82, 83, 84, 85, 86], [87]]),
    PrefixRow([33, 34, 1], [[99, 98, 97]]),
]

# 2.6e-5 of a norm's largest gradient was seen once: T5's scores are not scaled.
ROUNDING = 1e-4


@pytest.fixture
def t5(families: dict[str, Family]) -> Family:
    return families["t5"]


def open_model(directory: str, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=dtype).eval()


def plain_token_logps(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]):
    """One prompt, one response, the labels as any user of T5 gives them."""
    output = model(input_ids=torch.tensor([list(prompt)]), labels=torch.tensor([list(response)]))
    logps = torch.log_softmax(output.logits[0].float(), dim=-1)
    return logps.gather(1, torch.tensor(list(response))[:, None])[:, 0]


@pytest.fixture(scope="module", params=["t5", "t5-1.1", "mt5"])
def directory(
    request: pytest.FixtureRequest,
    make_t5: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The variants: 1.1 has a head of its own and, as mt5, does not scale what goes into it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "t5":
        return make_t5(folder)
    if request.param == "mt5":
        return make_t5(folder, kind="mt5", num_decoder_layers=1)
    # The setting says not to scale; weights are apart where the file has two that differ.
    model = open_model(
        make_t5(folder / "tied", tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    )
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0) * 0.3)
    model.save_pretrained(folder)
    return str(folder)


def test_token_logps_equal_one_sequence_at_a_time(directory: str) -> None:
    model = open_model(directory)
    found = prefix.branch_token_logps(model, prefix.collate(ROWS))
    for row, logps in zip(ROWS, found, strict=True):
        for branch, token_logps in zip(row.branches, logps, strict=True):
            expected = plain_token_logps(model, row.prefix, branch)
            assert token_logps.dtype == torch.float32
            torch.testing.assert_close(token_logps, expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_one_sequence_at_a_time(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(directory)
    monkeypatch.setattr(prefix, "LOGITS_BLOCK", 3 * model.config.vocab_size)
    weights = [[1.0, -2.0, 0.5, 3.0], [1.0, -1.0], [2.0]]
    logps = prefix.branch_logps(model, prefix.collate(ROWS))
    sum(row @ torch.tensor(w) for row, w in zip(logps, weights, strict=True)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, row_weights in zip(ROWS, weights, strict=True):
        for branch, weight in zip(row.branches, row_weights, strict=True):
            (weight * plain_token_logps(model, row.prefix, branch).sum()).backward()
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-5 * scale)


def test_last_logits_are_those_of_the_first_token_after_prefix_and_branch(directory: str) -> None:
    model = open_model(directory)
    found = prefix.last_logits(model, prefix.collate(ROWS), [7, 200])
    start = torch.tensor([[model.config.decoder_start_token_id]])
    expected = [
        model(input_ids=torch.tensor([row.prefix + branch]), decoder_input_ids=start).logits[
            0, -1, [7, 200]
        ]
        for row in ROWS
        for branch in row.branches
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_token_logps_in_bfloat16_differ_by_its_rounding(t5: Family) -> None:
    model = open_model(t5.policy, torch.bfloat16)
    found = prefix.branch_token_logps(model, prefix.collate(ROWS))
    for row, logps in zip(ROWS, found, strict=True):
        for branch, token_logps in zip(row.branches, logps, strict=True):
            expected = plain_token_logps(model, row.prefix, branch)
            torch.testing.assert_close(token_logps, expected, rtol=0.02, atol=0.02)


def test_bfloat16_is_near_float32(t5: Family) -> None:
    """Largest difference of a token's log-prob, nats: measured was 0.012."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = open_model(t5.policy, dtype)
        with torch.no_grad():
            logps = prefix.branch_logps(model, prefix.collate([ROWS[0]] * 2 + ROWS))
            tokens = prefix.branch_token_logps(model, prefix.collate(ROWS))
        assert torch.isfinite(torch.cat(logps)).all()
        found.append(torch.cat([branch for row in tokens for branch in row]))
    assert 0 < (found[0] - found[1]).abs().max() < 0.025


def test_prefixes_are_encoded_once_and_padding_stays_within_the_batch(t5: Family) -> None:
    model = open_model(t5.policy)
    seen: dict[str, list[torch.Size]] = {"encoder": [], "decoder": []}
    for name, shapes in seen.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, named, to=shapes: to.append(named["input_ids"].shape),
            with_kwargs=True,
        )
    rows = [
        PrefixRow([3, 4, 5], [[6] * 30, *([7, 8 + i] for i in range(20))]),
        PrefixRow([9] * 60, [[6]]),
        *(PrefixRow([9, i], [[6]]) for i in range(8)),
    ]
    batch = prefix.collate(rows)
    most = sum(row.num_tokens for row in rows)
    prefix.branch_token_logps(model, batch)
    assert sum(shape[0] for shape in seen["encoder"]) == len(rows)
    assert sum(shape[0] for shape in seen["decoder"]) == batch.num_branches
    assert all(shape.numel() <= most for shapes in seen.values() for shape in shapes)
    seen["encoder"].clear()
    prefix.last_logits(model, batch, [1, 2])
    assert sum(shape[0] for shape in seen["encoder"]) == batch.num_branches
    assert all(shape.numel() <= most for shape in seen["encoder"])


@pytest.mark.parametrize(
    "row", [PrefixRow([], [[1]]), PrefixRow([5, 1], [[1], []]), PrefixRow([5, 1], [])]
)
def test_rows_without_tokens_are_refused(row: PrefixRow) -> None:
    with pytest.raises(ValueError, match="row 1"):
        prefix.collate([ROWS[0], row])


def test_dropout_is_in_sft_and_not_in_preference_optimisation(
    t5: Family,
    make_t5: Callable[..., str],
    tmp_path: Path,
    captured: list[PrefixTrainer[Any]],
) -> None:
    family = t5._replace(policy=make_t5(tmp_path / "t5", dropout_rate=0.5))
    run_sft(family, tmp_path)
    run_policy(family, tmp_path, reference_logps(family, family.policy))
    losses = [
        [float(t.training_step(t.network, {"step": t.steps[0]})) for _ in range(2)]
        for t in captured
    ]
    assert losses[0][0] != losses[0][1]
    assert losses[1] == pytest.approx([0.6931472] * 2, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_model_gives_the_logits_of_the_one_in_memory(
    t5: Family, directory: str, tmp_path: Path, dtype: str
) -> None:
    model = load_model(directory, dtype=getattr(torch, dtype))
    save_model(model, t5.tokenizer, tmp_path, dtype=model.dtype)
    opened = open_model(str(tmp_path), model.dtype)
    ids = torch.tensor([[20, 30, 1]])
    expected = model(input_ids=ids, labels=ids).logits
    assert torch.equal(opened(input_ids=ids, labels=ids).logits, expected)
    generated = opened.generate(ids, max_new_tokens=3, do_sample=False)[0]
    assert generated[0] == model.config.decoder_start_token_id
    assert generated[1] == expected[0, 0].argmax()


def test_bfloat16_training_lowers_the_loss(t5: Family, tmp_path: Path) -> None:
    result = run_sft(t5, tmp_path, BF16, epochs=10)
    assert result.curve[-1]["loss"] < 0.7 * result.curve[0]["loss"]
    assert open_model(str(tmp_path / "model"), "auto").dtype == torch.bfloat16


def test_sft_step_equals_plain_computation(
    t5: Family, tmp_path: Path, captured: list[PrefixTrainer[Any]]
) -> None:
    run_sft(t5, tmp_path, batch_size=12)

    def plain() -> Tensor:
        total, num_tokens = torch.tensor(0.0), 0
        for row in demonstrations():
            prompt = encode_prompt(t5.tokenizer, t5.templates, row.prompt)
            target = encode_response(t5.tokenizer, t5.templates, row.target, eos=True)
            assert prompt[-1] == target[-1] == t5.tokenizer.eos_token_id
            total = total - plain_token_logps(captured[0].network, prompt, target).sum()
            num_tokens += len(target)
        return total / num_tokens

    assert_step_equals(captured[0], plain, rounding=ROUNDING)


def test_ranker_step_equals_plain_computation(
    t5: Family, tmp_path: Path, captured: list[PrefixTrainer[Any]]
) -> None:
    run_ranker(t5, tmp_path, batch_size=36, orders="margin", bias_penalty=0.0)
    encoder = RankerEncoder(t5.tokenizer, t5.templates)
    model = captured[0].network
    start = torch.tensor([[model.config.decoder_start_token_id]])

    def z(prompt: str, a: str, b: str) -> Tensor:
        ids = [*encoder.context(prompt).ids, *encoder.branch(a, b)]
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits[0, -1]
        return logits[encoder.labels.a] - logits[encoder.labels.b]

    def plain() -> Tensor:
        rows = [c for c in comparisons() if c.split == "train"]
        total = torch.tensor(0.0)
        for row in rows:
            ab = z(row.prompt, row.chosen, row.rejected)
            ba = z(row.prompt, row.rejected, row.chosen)
            total = total - row.weight * functional.logsigmoid((ab - ba) / 2)
        return total / len(rows)

    assert_step_equals(captured[0], plain, rounding=ROUNDING)


def test_policy_step_equals_plain_computation(
    t5: Family, tmp_path: Path, captured: list[PrefixTrainer[Any]]
) -> None:
    rows, reference = pairs(t5), reference_logps(t5, t5.ranker)
    run_policy(t5, tmp_path, reference, starts_as_reference=False, batch_size=12, gamma=0.3)
    model = captured[0].network

    def plain() -> Tensor:
        total = torch.tensor(0.0)
        for row in rows:
            prompt = encode_prompt(t5.tokenizer, t5.templates, row.prompt)
            gains = [
                plain_token_logps(model, prompt, ids).sum() - reference[row.prompt_id, response_id]
                for response_id, ids in (
                    (row.chosen_id, row.chosen_token_ids),
                    (row.rejected_id, row.rejected_token_ids),
                )
            ]
            total = total - functional.logsigmoid(0.3 * (gains[0] - gains[1]))
        return total / len(rows)

    assert_step_equals(captured[0], plain, rounding=ROUNDING)


def test_sft_learns_and_its_model_opens_with_plain_transformers(t5: Family, tmp_path: Path) -> None:
    result = run_sft(t5, tmp_path, epochs=10, freeze_layers=1)
    assert result.curve[-1]["loss"] < 0.7 * result.curve[0]["loss"]
    before, after = (open_model(d).state_dict() for d in (t5.policy, str(tmp_path / "model")))
    for name in before:
        is_frozen = ".block.0." in name
        assert torch.equal(before[name], after[name]) == is_frozen, name
    opened = open_model(str(tmp_path / "model"))
    ours = load_model(tmp_path / "model", dtype=torch.float32, attention="branches")
    ids = torch.tensor([[20, 30, 1]])
    torch.testing.assert_close(
        opened(input_ids=ids, labels=ids).logits, ours(input_ids=ids, labels=ids).logits
    )
    assert opened.generation_config.decoder_start_token_id == opened.config.decoder_start_token_id
    assert opened.generate(ids, max_new_tokens=3).shape[0] == 1


def test_policy_starts_as_the_reference_and_raises_its_margin(t5: Family, tmp_path: Path) -> None:
    result = run_policy(t5, tmp_path, reference_logps(t5, t5.policy), epochs=6)
    assert result.step_zero_difference == pytest.approx(0, abs=1e-5)
    assert result.training.curve[-1]["margin"] > 1


def test_ranker_learns_a_planted_preference_and_scores_with_it(t5: Family, tmp_path: Path) -> None:
    # Five seeds on each of three kinds of CPU gave 0.92 to 1.0; another one is given room.
    result = run_ranker(t5, tmp_path, epochs=16, batch_size=6, learning_rate=1e-3, orders="margin")
    assert result.held_out.accuracy.value >= 0.75
    ranker = load_ranker(str(tmp_path / "model"), t5.templates, dtype="float32", token_budget=256)
    sides = [Comparison("a text", "good", "bad"), Comparison("a text", "bad", "good")]
    logits = ranker.preference(sides)
    assert logits[0] > 0 > logits[1]


def test_vllm_with_an_encoder_names_the_engine_that_works(t5: Family) -> None:
    from rso import decoding

    with pytest.raises(UserError, match=r"encoder-decoder.*engine: transformers"):
        decoding.load_decoder("vllm", t5.policy)


def pairs(family: Family) -> list[PolicyPair]:
    rows = []
    for number, word in enumerate(("list", "file", "lines", "fox", "dog", "number")):
        texts = [f"{verb} {word}" for verb in ("Return", "Open the", "Read")]
        ids = [encode_response(family.tokenizer, family.templates, t, eos=True) for t in texts]
        for a, b in ((0, 1), (0, 2)):
            names = [f"r{number}{side}" for side in (a, b)]
            rows.append(PolicyPair(f"p{number}", f"the {word}", *names, ids[a], ids[b]))
    return rows


def reference_logps(family: Family, directory: str) -> dict[tuple[str, str], float]:
    model = open_model(directory)
    found = {}
    with torch.no_grad():
        for row in pairs(family):
            prompt = encode_prompt(family.tokenizer, family.templates, row.prompt)
            for side, ids in (
                (row.chosen_id, row.chosen_token_ids),
                (row.rejected_id, row.rejected_token_ids),
            ):
                found[row.prompt_id, side] = float(plain_token_logps(model, prompt, ids).sum())
    return found


def places(directory: Path) -> dict[str, Any]:
    return {
        "seed": 0,
        "work_directory": str(directory / "work"),
        "output_directory": str(directory / "model"),
    }


def run_sft(family: Family, directory: Path, compute: Compute = FP32, **changes: Any) -> Any:
    given = settings(TrainSft, **changes)
    return train_sft(
        family.policy, demonstrations(), given, compute, family.templates, **places(directory)
    )


def run_ranker(family: Family, directory: Path, **changes: Any) -> Any:
    given = settings(TrainRanker, **changes)
    return train_ranker(
        family.ranker, comparisons(), given, FP32, family.templates, **places(directory)
    )


def run_policy(
    family: Family,
    directory: Path,
    logps: dict[tuple[str, str], float],
    *,
    starts_as_reference: bool = True,
    **changes: Any,
) -> Any:
    return train_policy(
        family.policy,
        pairs(family),
        logps,
        settings(TrainPolicy, **changes),
        FP32,
        family.templates,
        **places(directory),
        starts_as_reference=starts_as_reference,
    )
