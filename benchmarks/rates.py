"""Tokens per second on this machine: training, prefill and decoding of the quickstart model.

The token budgets of configs/quickstart.yaml are based on these rates. Padding does not count. The
texts are the docstrings of the quickstart. The trainer and the engine are those of the stages.
Run: .venv/bin/python benchmarks/rates.py [--config FILE]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from rso.allocator import keep_freed_memory
from rso.config import Config, load_config, resolve_auto
from rso.decoding import Request, Sampling
from rso.decoding.transformers_engine import TransformersDecoder
from rso.logps import response_logps
from rso.models import load_model, load_tokenizer, resolve_model, save_model
from rso.prefix import PrefixRow
from rso.templates import encode_prompt, encode_response
from rso.training.sft import Demonstration, train_sft

STEPS, REPEATS, NUM_PREFILL = 5, 3, 64


def main() -> None:
    """Print the median rate of each kind of work and the spread over the repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    config = resolve_auto(load_config(parser.parse_args().config))
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as directory:
        source = str(resolve_model(config.model).location)
        model = str(Path(directory, "model"))
        save_model(load_model(source, dtype="float32"), load_tokenizer(source), model)
        report("training (train_sft)", training_rates(config, model, Path(directory)))
        inference_rates(config, model)


def training_rates(config: Config, model: str, directory: Path) -> list[float]:
    """Return the tokens per second of each optimiser step, without the first, which warms up."""
    result = train_sft(
        model,
        demonstrations(config, (STEPS + 1) * config.train_sft.batch_size),
        config.train_sft,
        config.compute,
        config.templates,
        seed=0,
        work_directory=str(directory / "work"),
        output_directory=str(directory / "trained"),
    )
    return [entry["num_tokens"] / entry["seconds"] for entry in result.curve[1:]]


def inference_rates(config: Config, directory: str) -> None:
    """Report prefill with log-probabilities, and decoding of 1 and of 16 samples per prompt."""
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, dtype=config.compute.dtype, attention=config.compute.attention)
    rows = [
        PrefixRow(
            encode_prompt(tokenizer, config.templates, row.prompt),
            [encode_response(tokenizer, config.templates, row.target, eos=True)],
        )
        for row in demonstrations(config, NUM_PREFILL)
    ]

    def prefill() -> int:
        response_logps(model, rows, token_budget=config.compute.token_budget)
        return sum(row.num_tokens for row in rows)

    def decode(num_prompts: int, num_samples: int) -> int:
        decoder = TransformersDecoder(model, tokenizer)
        requests = [Request(f"{i:016x}", row.prefix) for i, row in enumerate(rows[:num_prompts])]
        sampling = Sampling(max_new_tokens=24, num_samples=num_samples)
        decoded = decoder.decode(requests, sampling, seed=0)
        return sum(len(sample.token_ids) for samples in decoded for sample in samples)

    report("prefill with log-probs", repeated(prefill))
    report("decode, 16 prompts x 1", repeated(lambda: decode(16, 1)))
    report("decode, 8 prompts x 16", repeated(lambda: decode(8, 16)))


def demonstrations(config: Config, count: int) -> list[Demonstration]:
    """Return the first `count` lines of the config's first source, a JSONL file.

    Raises:
        SystemExit: the file is missing.
    """
    source = config.prepare.sources[0]
    if not Path(source.path).exists():
        sys.exit(f"rates: {source.path} is missing; `make bench` writes it.")
    with open(source.path, encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    prompt, target = (source.fields.get(name, name) for name in ("prompt", "target"))
    return [
        Demonstration(f"{number:016x}", row[prompt], row[target]) for number, row in enumerate(rows)
    ]


def repeated(work: Callable[[], int]) -> Iterable[float]:
    """Yield the rates of `work`, which returns its number of tokens; a first call warms up."""
    work()
    for _ in range(REPEATS):
        started = time.perf_counter()
        tokens = work()
        yield tokens / (time.perf_counter() - started)


def report(name: str, rates: Iterable[float]) -> None:
    """Print the median, the lowest and the highest rate."""
    found = list(rates)
    spread = f"{min(found):.0f} to {max(found):.0f}, {len(found)} repeats"
    print(f"{name:32} {statistics.median(found):8.0f} tokens/s  ({spread})")


if __name__ == "__main__":
    main()
