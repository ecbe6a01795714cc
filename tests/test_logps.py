"""Summed log-probs of responses."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rso import logps
from rso.prefix import PrefixRow

ROWS = [
    PrefixRow([1, 20, 30], [[60, 61, 2], [70], [60, 61]]),
    PrefixRow([9], [[80, 81, 82, 83, 84]]),
]


@pytest.mark.parametrize("token_budget", [1, 9, 1000])
def test_response_logps_equal_the_plain_computation(tiny_llama_dir: str, token_budget: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    found = logps.response_logps(model, ROWS, token_budget=token_budget)
    for row, values in zip(ROWS, found, strict=True):
        for branch, value in zip(row.branches, values, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row.prefix + branch])).logits[0]
            table = torch.log_softmax(logits, dim=-1)[len(row.prefix) - 1 : -1]
            expected = float(table.gather(1, torch.tensor(branch)[:, None]).sum())
            assert value == pytest.approx(expected, rel=1e-5)
