"""Tokens a second on this machine: training, prefill and decoding of the quickstart model.

The token budgets of docs/quickstart.md rest on these rates. Useful tokens only, no padding.
Run: .venv/bin/python benchmarks/rates.py [--config FILE]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from rso.config import load_config, resolve
from rso.decoding import Request, Sampling
from rso.decoding.transformers_engine import TransformersDecoder
from rso.models import load_causal, load_tokenizer, save_model
from rso.models import resolve as resolve_model
from rso.prefix import Row, branch_logps, collate

PROMPT, RESPONSE, ROWS, REPEATS = 64, 12, 16, 3


def main() -> None:
    """Print the median rate of each kind of work and the spread over the repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    config = resolve(load_config(parser.parse_args().config))
    source = str(resolve_model(config.model).location)
    tokenizer = load_tokenizer(source)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as directory:
        save_model(load_causal(source, dtype="float32"), tokenizer, directory)
        training = load_causal(directory, dtype="float32")
        inference = load_causal(directory, dtype=config.compute.dtype)
    for parameter in training.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    for layer in training.get_decoder().layers[: config.train_policy.freeze_layers]:
        layer.requires_grad_(False)
    ids = torch.randint(10, 40_000, (ROWS, PROMPT + RESPONSE)).tolist()
    rows = [Row(row[:PROMPT], [row[PROMPT:]]) for row in ids]
    tokens = sum(row.num_tokens for row in rows)

    def train() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.compute.dtype == "bfloat16"):
            loss = -torch.cat(branch_logps(training, collate(rows))).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        training.zero_grad()
        return tokens

    def prefill() -> int:
        with torch.inference_mode():
            branch_logps(inference, collate(rows))
        return tokens

    def decode(num_prompts: int, num_samples: int) -> int:
        decoder = TransformersDecoder(inference, tokenizer)
        requests = [Request(f"{i:016x}", row.prefix) for i, row in enumerate(rows[:num_prompts])]
        sampling = Sampling(max_new_tokens=24, num_samples=num_samples)
        decoded = decoder.decode(requests, sampling, seed=0)
        return sum(len(sample.token_ids) for samples in decoded for sample in samples)

    report("training, forward and backward", train)
    report("prefill with log-probs", prefill)
    report("decode, 16 prompts x 1", lambda: decode(16, 1))
    report("decode, 8 prompts x 16", lambda: decode(8, 16))


def report(name: str, work: Callable[[], Any]) -> None:
    """Print the median, lowest and highest rate of `work`, which returns its tokens."""
    work()
    rates = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        tokens = work()
        rates.append(tokens / (time.perf_counter() - started))
    middle = statistics.median(rates)
    print(f"{name:32} {middle:8.0f} tokens/s  ({min(rates):.0f} to {max(rates):.0f})")


if __name__ == "__main__":
    main()
