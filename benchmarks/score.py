"""Scoring 64 candidates of a prompt: shared-prefix rows against padded batches with full logits.

Each side is a process that keeps the ranker loaded. The sides take turns:

- `ours`: the ranker of the stage `score`. It computes context and baseline once, equal candidates
  once, and two columns of the vocabulary projection;
- `padded`: every comparison is a separate sequence, right-padded in batches (`--batch`), with the
  logits of the whole vocabulary at every position, as a script around transformers computes them.

Both sides use the same weights, token ids and candidates, and bfloat16. A turn scores all
candidates of some prompts (`padded`: of one prompt). Rates are comparisons per second. Both sides'
rewards of the first prompt are compared. A first turn warms up. `--model` may name a shape, which
gets random weights. T5's encoder reads every comparison whole, so `ours` saves work only on equal
candidates and by batching equal lengths. `--copies` is the share of candidates that repeat the text
of another candidate.

Run: python benchmarks/score.py [--rounds 5] [--prompts 4] [--copies 0] [--model SOURCE | SHAPE]
"""

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _roofline
from _sides import Figures, Turns, machine, spread, take_turns
from decode import DTYPE, MODEL, SHAPES, load_config, one_token_words, write_model

SIDES = ("ours", "padded")
NUM_CANDIDATES, CONTEXT_TOKENS = 64, 256


def main() -> None:
    """Run the sides in turn and print their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a turn (padded: one)")
    parser.add_argument("--tokens", type=int, nargs=2, default=(64, 64), help="of a response")
    parser.add_argument("--copies", type=float, default=0.0, help="share of repeated candidates")
    parser.add_argument("--model", default=MODEL, help=f"a model, or one of {', '.join(SHAPES)}")
    parser.add_argument("--tokenizer", default=MODEL, help="where a shape's tokenizer is from")
    parser.add_argument("--token-budget", type=int, default=4096, help="tokens a pass of ours")
    parser.add_argument("--batch", type=int, default=16, help="comparisons a pass of padded")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    print(machine(("torch", "transformers"), arguments.device))
    ceilings = _roofline.measure(DTYPE, arguments.device)
    with tempfile.TemporaryDirectory() as directory:
        write_model(arguments, Path(directory, "model"))
        model = load_config(directory)
        given = ("prompts", "copies", "device", "token_budget", "batch")
        options = ["--directory", directory, "--tokens", *map(str, arguments.tokens)]
        for name in given:
            options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        commands = {side: [__file__, "--worker", side, *options] for side in SIDES}
        answers = take_turns(commands, arguments.rounds + 1, what="score")
    low, high = arguments.tokens
    print(
        f"\n{arguments.model}: {NUM_CANDIDATES} candidates a prompt, {arguments.copies:.0%} of "
        f"them copies; context, baseline and response of about {CONTEXT_TOKENS}, {low} and {low} "
        f"to {high} tokens; {arguments.rounds} turns a side"
    )
    print_table(answers)
    if not model.is_encoder_decoder and low == high:
        distinct = round(NUM_CANDIDATES * (1 - arguments.copies))
        seconds = _roofline.score_seconds(
            _roofline.Model.of(model),
            ceilings,
            prefix_tokens=CONTEXT_TOKENS + low,
            branch_tokens=[low] * distinct,
        )
        turns = answers["ours"][1:]
        rate = statistics.median(turn["comparisons"] / turn["seconds"] for turn in turns)
        most = NUM_CANDIDATES / seconds
        print(f"roofline (_roofline.py): {most:,.0f} comparisons/s; ours reached {rate / most:.1%}")


def print_table(answers: dict[str, list[Figures]]) -> None:
    """Print rates, CPU time and memory of both sides, and the difference of their rewards."""
    print("| side | comparisons/s, median (min to max) | CPU s for 1,000 | peak GiB |")
    print("|---|---|---|---|")
    medians = {}
    for side, turns in answers.items():
        timed = turns[1:]
        rates = [turn["comparisons"] / turn["seconds"] for turn in timed]
        cpu = statistics.median(1000 * t["cpu_seconds"] / t["comparisons"] for t in timed)
        peak = max(turn["peak"] for turn in turns) / 2**30
        medians[side] = statistics.median(rates)
        print(f"| {side} | {spread(rates, 1)} | {cpu:.1f} | {peak:.2f} |")
    ours, padded = ([turn[f"reward_{i}"] for i in range(8)] for turn in first(answers))
    apart = max(abs(a - b) for a, b in zip(ours, padded, strict=True))
    print(
        f"ours is {medians['ours'] / medians['padded']:.1f} x padded; rewards of the first prompt "
        f"are at most {apart:.3f} nats apart (spread {statistics.stdev(ours):.2f})"
    )


def first(answers: dict[str, list[Figures]]) -> tuple[Figures, Figures]:
    """Return the first turn of both sides; in it, both score the same prompt first."""
    return answers["ours"][0], answers["padded"][0]


def work(arguments: argparse.Namespace) -> None:
    """Be one side: score at every turn."""
    from rso.allocator import keep_freed_memory

    keep_freed_memory(arguments.device)
    turns = Turns(on_gpu=arguments.device == "cuda")
    score = ours(arguments) if arguments.worker == "ours" else padded(arguments)
    items = candidates(arguments)
    count = arguments.prompts if arguments.worker == "ours" else 1
    turn = 0
    while turns.begin():
        chosen = [items[(turn * count + i) % len(items)] for i in range(count)]
        turn += 1
        rewards = score(chosen)
        shown = {f"reward_{i}": float(rewards[0][i]) for i in range(8)}
        turns.end(comparisons=sum(map(len, rewards)), **shown)


def candidates(arguments: argparse.Namespace) -> list[Any]:
    """Return 16 prompts with their candidates: random words of one token each."""
    from rso.ranking import PromptCandidates

    words, draw = one_token_words(arguments.directory / "model"), random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    def responses() -> list[str]:
        distinct = round(NUM_CANDIDATES * (1 - arguments.copies))
        texts = [text(*arguments.tokens) for _ in range(distinct)]
        return texts + draw.choices(texts, k=NUM_CANDIDATES - distinct)

    def item() -> Any:
        texts = responses()
        return PromptCandidates(text(CONTEXT_TOKENS, CONTEXT_TOKENS), texts[0], texts)

    return [item() for _ in range(16)]


def ours(arguments: argparse.Namespace) -> Any:
    """Return the scoring by the stage's ranker, with the stage's default attention."""
    from rso.config import Compute, Templates
    from rso.ranking import load_ranker

    settings = Compute()
    ranker = load_ranker(
        arguments.directory / "model",
        Templates(),
        dtype=DTYPE,
        token_budget=arguments.token_budget,
        device=arguments.device,
        attention=settings.attention,
    )

    def score(items: list[Any]) -> list[Any]:
        # `padded` computes only this order.
        found = ranker.rewards_many(items, orders="baseline-first")
        return [rewards.values for rewards in found]

    return score


def padded(arguments: argparse.Namespace) -> Any:
    """Return the scoring by one sequence per comparison, with transformers' own forward pass."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from rso.config import Templates
    from rso.models import load_tokenizer
    from rso.templates import RankerEncoder

    directory = arguments.directory / "model"
    is_encoder_decoder = AutoConfig.from_pretrained(directory).is_encoder_decoder
    auto: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=getattr(torch, DTYPE)).to(arguments.device).eval()
    encoder = RankerEncoder(load_tokenizer(directory), Templates())
    a, b = encoder.labels

    def batch(inputs: list[list[int]]) -> list[float]:
        width = max(map(len, inputs))
        rows = [ids + [0] * (width - len(ids)) for ids in inputs]
        ids = torch.tensor(rows, device=arguments.device)
        sizes = torch.tensor([len(ids) for ids in inputs], device=arguments.device)
        mask = torch.arange(width, device=arguments.device) < sizes[:, None]
        if is_encoder_decoder:
            start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
            logits = model(ids, attention_mask=mask.long(), decoder_input_ids=start).logits[:, 0]
        else:
            logits = model(ids, attention_mask=mask.long()).logits
            logits = logits[torch.arange(len(ids), device=ids.device), sizes - 1]
        found: list[float] = (logits[:, b].float() - logits[:, a].float()).tolist()
        return found

    def score(items: list[Any]) -> list[list[float]]:
        rewards = []
        with torch.inference_mode():
            for item in items:
                before = encoder.context(item.prompt).ids + encoder.side("A", item.baseline)
                responses = encoder.sides("B", item.responses)
                inputs = [before + response + encoder.suffix for response in responses]
                parts = [
                    inputs[i : i + arguments.batch] for i in range(0, len(inputs), arguments.batch)
                ]
                rewards.append([value for part in parts for value in batch(part)])
        return rewards

    return score


if __name__ == "__main__":
    main()
