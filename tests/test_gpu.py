"""What only a GPU shows: kernels of its own. Each against the CPU, or against plain mathematics."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family
from test_training import TEMPLATES, pairs, reference_logps, settings
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rso import prefix
from rso.branch_attention import branch_attention, dense
from rso.config import Compute, TrainPolicy
from rso.decoding import Request, Sampling, load_decoder
from rso.decoding.shared_prompt import Columns, Slots, across
from rso.prefix import PrefixRow
from rso.ranking import PromptCandidates, load_ranker
from rso.training.policy import train_policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
in_both = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Relative to the whole, as single elements may be nearly nothing."""
    assert found.shape == expected.shape and bool(found.isfinite().all())
    difference = (found.double().cpu() - expected.double().cpu()).norm()
    assert float(difference / expected.double().norm()) < ROUNDING[dtype]


def rows(num_rows: int = 5) -> list[PrefixRow]:
    draw = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(5, 300, draw.integers(low, high)).tolist()

    return [
        PrefixRow(ids(1, 90), [ids(1, 40) for _ in range(int(draw.integers(1, 6)))])
        for _ in range(num_rows)
    ]


def states(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


@in_both
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_attention_over_branches_and_its_gradients_are_dense_attentions(
    dtype: torch.dtype, key_heads: int, num_rows: int
) -> None:
    layout = prefix.collate(rows(num_rows), device="cuda").layout
    size = layout.num_tokens
    given = [states(dtype, 1, heads, size, 64) for heads in (4, key_heads, key_heads)]
    weights = states(dtype, 1, size, 4, 64)

    def results(attend: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(kind).requires_grad_() for tensor in given]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, weights.to(kind))]

    found = results(
        lambda *qkv: branch_attention(torch.nn.Identity(), *qkv, None, branches=layout)[0], dtype
    )
    expected = results(lambda *qkv: dense(*qkv, layout, 64**-0.5), torch.float64)
    for ours, plain in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, plain, dtype)


def test_attention_takes_the_types_that_autocast_leaves() -> None:
    layout = prefix.collate(rows(), device="cuda").layout
    query, key, value = (states(torch.float32, 1, 2, layout.num_tokens, 32) for _ in "qkv")
    leaves = [query.requires_grad_(), key.requires_grad_(), value.bfloat16().requires_grad_()]
    out, _ = branch_attention(torch.nn.Identity(), *leaves, None, branches=layout)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32, torch.bfloat16]
    assert_close(out, dense(*(leaf.double() for leaf in leaves), layout, 32**-0.5), out.dtype)


@in_both
@pytest.mark.parametrize("lengths", [[7, 7, 7], [3, 7, 7, 20], list(range(1, 20))], ids=str)
def test_samples_attend_to_their_prompts(dtype: torch.dtype, lengths: list[int]) -> None:
    # the second prompt has no sample left
    prompt_of = torch.tensor([0, 0, *range(2, len(lengths)), len(lengths) - 1], device="cuda")
    num_rows, width = len(prompt_of), max(lengths)
    query = states(dtype, num_rows, 2, 3, 64)
    keys, values = (
        states(dtype, len(lengths), width, 2, 64).transpose(1, 2) for _ in ("keys", "values")
    )
    seen, total = across(
        query,
        keys,
        values,
        Columns(torch.tensor(lengths, device="cuda"), dtype),
        Slots(prompt_of, len(lengths)),
        0.2,
    )
    for row, prompt in enumerate(prompt_of.tolist()):
        k, v = (x[prompt, :, : lengths[prompt]].double() for x in (keys, values))
        scores = query[row].double() @ k.transpose(-1, -2) * 0.2
        assert_close(total[row], scores.logsumexp(-1), dtype)
        assert_close(seen[row], scores.softmax(-1) @ v, dtype)


def plain_logps(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """One sequence alone; fp32 [token] on the CPU."""
    ids = torch.tensor([prompt + response], device=model.device)
    with torch.inference_mode():
        logps = model(ids).logits[0].float().log_softmax(-1).cpu()
    return torch.stack([logps[len(prompt) - 1 + i, t] for i, t in enumerate(response)])


@in_both
def test_token_logps_equal_one_sequence_at_a_time(tiny_llama_dir: str, dtype: torch.dtype) -> None:
    ours = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, dtype=dtype, attn_implementation="branches"
    ).cuda()
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    with torch.inference_mode():
        found = prefix.branch_token_logps(ours, prefix.collate(rows(), device="cuda"))
    for row, logps in zip(rows(), found, strict=True):
        for branch, token_logps in zip(row.branches, logps, strict=True):
            expected = plain_logps(plain, row.prefix, branch)
            # a random model's logits are wide: a few per cent of them in bfloat16
            assert_close(token_logps / 5, expected / 5, dtype)


@in_both
@pytest.mark.parametrize("num_prompts", [1, 3, 24])
def test_decode_logps_are_those_of_one_sequence(
    tiny_llama_dir: str, dtype: torch.dtype, num_prompts: int
) -> None:
    draw = np.random.default_rng(1)
    requests = [
        Request(f"{i:016x}", draw.integers(5, 300, 5 + 3 * i).tolist()) for i in range(num_prompts)
    ]
    name = str(dtype).removeprefix("torch.")
    decoder = load_decoder("transformers", tiny_llama_dir, dtype=name, device="cuda")
    sampling = Sampling(1.0, 20, 1.0, max_new_tokens=24, num_samples=7, logprobs=True)
    decoded = decoder.decode(requests, sampling, seed=0)
    assert decoder.decode(requests, sampling, seed=0) == decoded
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=dtype).cuda()
    for request, responses in zip(requests, decoded, strict=True):
        for response in responses:
            expected = plain_logps(plain, request.token_ids, response.token_ids).sum()
            found = torch.tensor(response.cumulative_logp)
            assert_close(found, expected, dtype)


def test_decode_greedy_on_both_devices_is_the_same(tiny_llama_dir: str) -> None:
    requests = [Request(f"{i:016x}", list(range(5, 20 + 4 * i))) for i in range(12)]
    greedy = Sampling(0.0, 0, 1.0, max_new_tokens=24, logprobs=True)
    on_cpu, on_gpu = (
        load_decoder("transformers", tiny_llama_dir, dtype="float32", device=device).decode(
            requests, greedy, seed=0
        )
        for device in ("cpu", "cuda")
    )
    for (ours,), (theirs,) in zip(on_gpu, on_cpu, strict=True):
        assert replace_logp(ours) == replace_logp(theirs)
        assert ours.cumulative_logp == pytest.approx(theirs.cumulative_logp, rel=1e-4)


def replace_logp(response: Any) -> Any:
    return response._replace(cumulative_logp=None)


def test_decode_t5_in_half_precision_follows_its_own_logits(families: dict[str, Family]) -> None:
    family = families["t5"]
    requests = [Request(f"{i:016x}", list(range(5, 9 + 2 * i))) for i in range(12)]
    sampling = Sampling(1.0, 0, 1.0, max_new_tokens=16, num_samples=5, logprobs=True)
    decoder = load_decoder("transformers", family.policy, dtype="bfloat16", device="cuda")
    decoded = decoder.decode(requests, sampling, seed=0)
    model = family.model_class.from_pretrained(family.policy, dtype=torch.bfloat16).cuda()
    start = model.config.decoder_start_token_id
    for request, responses in zip(requests, decoded, strict=True):
        for response in responses:
            with torch.inference_mode():
                logits = model(
                    torch.tensor([request.token_ids], device="cuda"),
                    decoder_input_ids=torch.tensor(
                        [[start, *response.token_ids[:-1]]], device="cuda"
                    ),
                ).logits[0]
            logps = logits.float().log_softmax(-1).cpu()
            expected = logps[range(len(response.token_ids)), response.token_ids].sum()
            assert_close(torch.tensor(response.cumulative_logp), expected, torch.bfloat16)


@in_both
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_rewards_on_both_devices_are_the_same(
    families: dict[str, Family], kind: str, dtype: torch.dtype
) -> None:
    family = families[kind]
    items = [
        PromptCandidates(f"question {i}", "one answer", ["another answer", "one answer", "x " * i])
        for i in range(1, 9)
    ]

    def rewards(device: str, dtype: torch.dtype) -> Sequence[np.ndarray]:
        ranker = load_ranker(
            family.ranker,
            family.templates,
            dtype=dtype,
            token_budget=200,
            device=device,
            attention="branches" if kind == "llama" else "sdpa",
        )
        return [rewards.values for rewards in ranker.rewards_many(items)]

    found, expected = rewards("cuda", dtype), rewards("cpu", torch.float32)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_policy_training_on_both_devices_has_the_same_losses(
    tiny_llama_dir: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    dtype: str,
    tolerance: float,
) -> None:
    data = pairs(tiny_tokenizer)
    logps = reference_logps(tiny_llama_dir, tiny_tokenizer, data)

    def losses(device: str, dtype: str) -> list[float]:
        result = train_policy(
            tiny_llama_dir,
            data,
            logps,
            settings(TrainPolicy, learning_rate=1e-4, step_zero_tolerance=1.0),
            Compute(dtype=dtype, device=device, attention="branches"),
            TEMPLATES,
            seed=0,
            work_directory=str(tmp_path / device / "work"),
            output_directory=str(tmp_path / device / "model"),
            evaluate=None,
        )
        return [step["loss"] for step in result.training.curve]

    found, expected = losses("cuda", dtype), losses("cpu", "float32")
    assert len(found) == len(expected) > 3
    np.testing.assert_allclose(found, expected, rtol=tolerance)
