"""Shared-prefix rows give what one sequence at a time gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rso import prefix
from rso.branch_attention import branch_attention, dense
from rso.prefix import PrefixRow

ROWS = [
    PrefixRow([1, 20, 30, 40, 50], [[60, 61, 62, 2], [70, 2], [2], [60, 61, 62, 2]]),
    PrefixRow([9], [[80, 81, 82, 83, 84, 85, 86], [87]]),
    PrefixRow([1, 33, 34], [[99, 98, 97]]),
]


def plain_token_logps(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """One sequence, all logits, no mask: the textbook computation."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].float()
    logps = torch.log_softmax(logits, dim=-1)
    return torch.stack([logps[len(prompt) - 1 + i, token] for i, token in enumerate(response)])


@pytest.fixture(params=["branches", "sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_llama_dir: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, dtype=torch.float32, attn_implementation=request.param
    ).eval()


def test_token_logps_equal_one_sequence_at_a_time(model: PreTrainedModel) -> None:
    batch = prefix.collate(ROWS)
    found = prefix.branch_token_logps(model, batch)
    for row, logps in zip(ROWS, found, strict=True):
        for branch, token_logps in zip(row.branches, logps, strict=True):
            expected = plain_token_logps(model, row.prefix, branch)
            assert token_logps.dtype == torch.float32
            torch.testing.assert_close(token_logps, expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_one_sequence_at_a_time(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_last_logits_equal_one_sequence_at_a_time(model: PreTrainedModel) -> None:
    found = prefix.last_logits(model, prefix.collate(ROWS), [7, 200])
    expected = [
        model(input_ids=torch.tensor([row.prefix + branch])).logits[0, -1, [7, 200]]
        for row in ROWS
        for branch in row.branches
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_branches_do_not_see_each_other(model: PreTrainedModel) -> None:
    first = PrefixRow([1, 20], [[60, 61], [70, 71]])
    second = PrefixRow([1, 20], [[99, 98], [70, 71]])
    logps = [prefix.branch_logps(model, prefix.collate([row]))[0] for row in (first, second)]
    assert logps[0][1] == logps[1][1]
    assert logps[0][0] != logps[1][0]


def test_token_logps_in_bfloat16_differ_by_its_rounding(tiny_llama_dir: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, dtype=torch.bfloat16, attn_implementation="branches"
    )
    found = prefix.branch_token_logps(model, prefix.collate(ROWS))
    for row, logps in zip(ROWS, found, strict=True):
        for branch, token_logps in zip(row.branches, logps, strict=True):
            expected = plain_token_logps(model, row.prefix, branch)
            torch.testing.assert_close(token_logps, expected, rtol=0.02, atol=0.02)


def test_dense_attention_sees_what_the_kernels_by_slices_see() -> None:
    layout = prefix.collate(ROWS).layout
    query = torch.randn(1, 4, layout.num_tokens, 16)
    key, value = torch.randn(2, 1, 2, layout.num_tokens, 16)
    expected, _ = branch_attention(torch.nn.Identity(), query, key, value, None, branches=layout)
    found = dense(query, key, value, layout, 16**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_dropout_is_refused() -> None:
    layout = prefix.collate(ROWS).layout
    states = torch.randn(1, 2, layout.num_tokens, 16)
    with pytest.raises(ValueError, match=r"dropout is 0.1.*compute.attention to sdpa"):
        branch_attention(torch.nn.Identity(), *[states] * 3, None, branches=layout, dropout=0.1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], PrefixRow([], [[1]])], "row 1: the prefix is empty"),
        ([ROWS[0], PrefixRow([1], [[1], []])], "row 1, branch 1: the response has no tokens"),
        ([PrefixRow([1], [])], "row 0: no branches"),
    ],
)
def test_collate_refuses_what_has_no_logps(rows: list[PrefixRow], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefix.collate(rows)


def test_sliding_window_shorter_than_a_sequence_is_refused(model: PreTrainedModel) -> None:
    model.config.sliding_window = 7
    with pytest.raises(ValueError, match="sequence of 9 tokens"):
        prefix.hidden_states(model, prefix.collate(ROWS))


def test_sequence_longer_than_the_context_is_refused(model: PreTrainedModel) -> None:
    rows = [PrefixRow([1] * 500, [[2] * 12, [2] * 12]), PrefixRow([1], [[2] * 512])]
    prefix.hidden_states(model, prefix.collate(rows[:1]))
    with pytest.raises(ValueError, match=r"sequence of 513 .* context of 512"):
        prefix.hidden_states(model, prefix.collate(rows))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_plan_batches_covers_all_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = prefix.plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[index] for index in batch) <= budget or len(batch) == 1
    ordered = [lengths[index] for batch in batches for index in batch]
    assert ordered == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 40))
def test_split_row_keeps_all_branches_in_order(sizes: list[int], budget: int) -> None:
    row = PrefixRow([1, 2], [[number] * size for number, size in enumerate(sizes)])
    rows = prefix.split_row(row, budget)
    assert [branch for part in rows for branch in part.branches] == row.branches
    assert all(part.prefix == row.prefix for part in rows)
    assert all(part.num_tokens <= budget or len(part.branches) == 1 for part in rows)
