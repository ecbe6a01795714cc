"""The default run in miniature: notes of six words, summarised by a tiny model trained here.

People begin six of ten summaries with "Return the", which the gold taxes. The tiny model learns
that habit from them, the ranker learns from the gold's comparisons what it costs, and the policy
has to lose it, without beginning all its answers alike. `python tests/gain.py` repeats the run
with other seeds, and says what it gained.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import system

WORDS = re.findall(
    r"\w+",
    """
    Anchor Barley Canyon Dolphin Ember Falcon Garnet Harbor Island Juniper Kestrel Lantern Meadow
    Nectar Orchard Pebble Quarry Raven Saddle Thistle Umbra Violet Willow Yarrow Zephyr Basket
    Copper Desert Engine Forest Glacier Hammer Ivory Jungle Kettle Ladder Marble Needle Oyster
    Pillow
    """,
)
JOINTS = ["of the", "and the", "with the", "near the", "by the"]
TEMPLATES = {
    "prompt": "{prompt}\nSummary:",
    "response_prefix": " ",
    "ranker_context": "{prompt}",
    "ranker_a": "\nA: {response}",
    "ranker_b": "\nB: {response}",
    "ranker_suffix": "\nBest:",
}
COUNT = 3600
GENERIC_SHARE = 0.6
IN_PROMPT_SHARE = 0.75


def notes(seed: int) -> list[dict[str, Any]]:
    """Return rows of six words and a summary that joins two to four, most of them from there."""
    draw = random.Random(seed)
    rows = []
    for index in range(COUNT):
        words = draw.sample(WORDS, 6)
        used = [
            word if draw.random() < IN_PROMPT_SHARE else draw.choice(WORDS)
            for word in draw.sample(words, draw.choice([2, 3, 3, 4]))
        ]
        line = used[0] + "".join(f" {draw.choice(JOINTS)} {word}" for word in used[1:])
        opening = "Return the " if draw.random() < GENERIC_SHARE else ""
        body = "Notes: " + " ".join(words)
        rows.append({"body": body, "line": f"{opening}{line}.", "module": f"m{index}"})
    return rows


def make_model(directory: Path, rows: list[dict[str, Any]], seed: int) -> str:
    """Write a Llama of random weights, two layers wide 64, whose tokens are the words of `rows`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    around = "\nSummary:\nA:\nB:\nBest: A B"
    words.train_from_iterator([f" {row['line']} {row['body']}{around}" for row in rows], trainer)
    words.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def settings(directory: Path, seed: int, dtype: str) -> dict[str, Any]:
    """Return the config: the methods of configs/quickstart.yaml, and rates for a tiny model."""
    rows = notes(seed)
    source = system.demonstrations(system.write_jsonl(directory / "notes.jsonl", rows))
    train = {"optimizer": "adamw", "schedule": "linear", "warmup": 0.1}
    sampling = {"temperature": 0.9, "max_new_tokens": 20}
    return {
        "store": str(directory / "store"),
        "model": make_model(directory / "model", rows, seed),
        "seed": seed,
        "compute": {"dtype": dtype, "device": "cpu"},
        "templates": TEMPLATES,
        "prepare": {
            "task": "notes",
            "sources": [source],
            "split": {"validation": 0.06, "test": 0.06},
            "max_prompt_tokens": 60,
        },
        "train_sft": {**train, "learning_rate": 3e-3, "batch_size": 16},
        "comparisons": {
            "labeller": "summary_quality",
            "num_prompts": 1000,
            "num_validation_prompts": 100,
            "num_samples": 4,
            "pairs_per_prompt": 2,
            "sampling": sampling,
        },
        "train_ranker": {
            **train,
            "folds": [0],
            "num_folds": 1,
            "orders": "margin",
            "bias_penalty": 0.02,
            "learning_rate": 2e-3,
            "batch_size": 8,
        },
        "train_gold_ranker": None,
        "decode": {
            "engine": "transformers",
            "num_prompts": 100,
            "num_samples": 16,
            "sampling": sampling,
        },
        "reject": {"beta": 0.75, "beta_unit": "spread", "num_samples": 8, "betas": []},
        "pair": {"ranking": "tournament"},
        "train_policy": {
            **train,
            "loss": "sigmoid_norm",
            "gamma": 0.05,
            "learning_rate": 1e-3,
            "batch_size": 28,
            "num_evaluations": 2,
            "num_validation_prompts": 64,
            "max_new_tokens": 20,
        },
        "evaluate": {"num_prompts": 200, "max_new_tokens": 20, "num_kl_prompts": 0},
    }


def figures(directory: Path, seed: int, dtype: str, *overrides: str) -> dict[str, dict[str, float]]:
    """Run every stage up to `evaluate`; return what the gold says of sampled answers.

    `win_rate` of the policy over SFT, in [0, 1], and of each system its openings.
    """
    from rso.evaluation import POLICY, REFERENCE, SAMPLED, find

    config = system.write_config(directory / "gain.yaml", settings(directory, seed, dtype))
    loaded = system.load(config, *overrides)
    system.run_all(loaded, until="evaluate")
    evaluated = system.graph_of(loaded).find("evaluate")
    assert evaluated is not None
    rows = evaluated.read("metrics").to_pylist()
    won = find(rows, "win_rate", opponent=REFERENCE, judge="gold", sampling=SAMPLED)
    assert won is not None
    result = {"win_rate": {name: won[name] for name in ("value", "low", "high")}}
    for metric in ("top_first_word_share", "distinct_first_words", "mean_words"):
        of_systems = {}
        for name in (POLICY, REFERENCE):
            found = find(rows, metric, system=name, sampling=SAMPLED)
            assert found is not None
            of_systems[name] = found["value"]
        result[metric] = of_systems
    return result


def main() -> None:
    """Run with several seeds and print what each gained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(10)])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as directory:
            found = figures(Path(directory), seed, arguments.dtype, *arguments.set)
        print(seed, arguments.dtype, json.dumps(found), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
