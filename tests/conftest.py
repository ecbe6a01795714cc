"""Tiny real models: two layers, width 32, random weights, a tokenizer trained here."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is loaded: tiny models are fastest on one thread, and sums of floats depend on the
# number of threads, so runs in this process and in others agree to the last bit.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import servers
import system
from transformers import PreTrainedTokenizerBase

from rso.config import Templates

CORPUS = [
    "Return the sum of all the numbers in a list, or zero when the list is empty.",
    "Open a file and read its lines; raise an error when the file does not exist.",
    "The quick brown fox jumps over the lazy dog, and the dog does not care.",
    "[CONTEXT] a question [RESPONSE A] one answer [RESPONSE B] another answer [BETTER] A",
    "[CONTEXT] a text [RESPONSE A] good words [RESPONSE B] bad words [BETTER] B",
    "Is A better than B? A is good. B is good. A B A B",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE with BOS (added by itself), EOS, pad, role tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def make_llama(tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """Return a maker of tiny Llama directories: `make_llama(directory, seed=0, **config)`."""

    def make(directory: Path, seed: int = 0, **overrides: object) -> str:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        settings: dict[str, object] = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 512,
            # Wide enough that random weights have opinions.
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
        model.save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture(scope="session")
def make_adapters() -> Callable[..., str]:
    """Return a maker of adapters: `make_adapters(base, directory, seed=0, **lora_config)`."""

    def make(base: str, directory: Path, seed: int = 0, **overrides: Any) -> str:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        from rso.models import load_model_config

        is_encoder_decoder = load_model_config(base).is_encoder_decoder
        auto: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        # Of random weights on both sides, so that they change what the model says.
        settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
        config = LoraConfig(**(settings | {"init_lora_weights": False} | overrides))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(auto.from_pretrained(base, dtype=torch.float32), config)
        adapted.save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture(scope="session")
def tiny_llama_dir(make_llama: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny policy in fp32, a plain Hugging Face directory."""
    return make_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_ranker_dir(
    make_llama: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A tiny ranker: the same shape and tokenizer, other weights."""
    return make_llama(tmp_path_factory.mktemp("tiny-ranker"), seed=1)


@pytest.fixture(scope="session")
def broken_llama_dir(
    make_llama: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A policy one of whose logits is never finite."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = make_llama(tmp_path_factory.mktemp("broken-llama"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def t5_tokenizer() -> PreTrainedTokenizerBase:
    """Unigram as T5 has it: pad 0, EOS 1 (added by itself at the end), unknown 2, no BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    # The pieces to keep are the likely ones: each word on its own is one.
    tokenizer.train_from_iterator(
        CORPUS + [word for text in CORPUS for word in text.split()], trainer
    )
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[(piece, score) for piece, score in pieces], extra_ids=0)


@pytest.fixture(scope="session")
def make_t5(t5_tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """Return a maker of tiny T5 directories: `make_t5(directory, seed=0, kind="t5", **config)`."""

    def make(directory: Path, seed: int = 0, kind: str = "t5", **overrides: object) -> str:
        import torch
        from transformers import AutoConfig, AutoModelForSeq2SeqLM

        settings: dict[str, object] = {
            # More than tokens, as T5's own 32128.
            "vocab_size": 256,
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            # Wide enough that random weights have opinions.
            "initializer_factor": 1.0,
            # Steps are compared with the plain computation, which draws no noise.
            "dropout_rate": 0.0,
            "pad_token_id": t5_tokenizer.pad_token_id,
            "eos_token_id": t5_tokenizer.eos_token_id,
            "decoder_start_token_id": t5_tokenizer.pad_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = AutoConfig.for_model(kind, **(settings | overrides))
            model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(directory)
        t5_tokenizer.save_pretrained(directory)
        return str(directory)

    return make


class Family(NamedTuple):
    """Two tiny models of one architecture, with the tokenizer and templates that suit them."""

    model_class: Any
    policy: str
    ranker: str
    tokenizer: PreTrainedTokenizerBase
    templates: Templates


@pytest.fixture(scope="session")
def families(
    tiny_llama_dir: str,
    tiny_ranker_dir: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    make_t5: Callable[..., str],
    t5_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Family]:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    policy = make_t5(tmp_path_factory.mktemp("tiny-t5"))
    ranker = make_t5(tmp_path_factory.mktemp("tiny-t5-ranker"), seed=1)
    text = Templates(prompt="{prompt}")
    return {
        "llama": Family(
            AutoModelForCausalLM, tiny_llama_dir, tiny_ranker_dir, tiny_tokenizer, Templates()
        ),
        "t5": Family(AutoModelForSeq2SeqLM, policy, ranker, t5_tokenizer, text),
    }


@pytest.fixture(params=["llama", "t5"])
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    """A decoder-only and an encoder-decoder model, in turn."""
    return families[request.param]


@pytest.fixture(scope="session")
def tiny_run(tiny_llama_dir: str, tmp_path_factory: pytest.TempPathFactory) -> system.Run:
    """The config of a tiny run over an empty store of its own; sources as in `system`."""
    folder = tmp_path_factory.mktemp("tiny-run")
    data = system.write_jsonl(folder / "questions.jsonl", system.examples() + system.bad_rows())
    sources = [system.demonstrations(data)]
    store = folder / "store"
    settings = system.settings(tiny_llama_dir, store, sources)
    return system.Run(system.write_config(folder / "tiny.yaml", settings), store)


@pytest.fixture(scope="session")
def finished(tiny_run: system.Run) -> system.Run:
    """The tiny run with every stage done; tests read it and change only copies."""
    system.run_all(tiny_run.config())
    return tiny_run


@pytest.fixture(scope="session")
def vllm_url(tiny_llama_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a real vLLM server of the tiny policy, started as users are told to."""
    from rso.decoding.server_engine import serve_command

    command = serve_command(tiny_llama_dir, "float32", 256)
    server = servers.Vllm(command, tmp_path_factory.mktemp("vllm") / "log")
    try:
        yield server.wait().url
    finally:
        server.kill()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trainers whose `run` was called; it does nothing."""
    from rso.training.base import PrefixTrainer, TrainingResult

    trainers: list[Any] = []

    def run(self: Any) -> TrainingResult:
        trainers.append(self)
        return TrainingResult(0, 0, 0.0, [])

    monkeypatch.setattr(PrefixTrainer, "run", run)
    return trainers
