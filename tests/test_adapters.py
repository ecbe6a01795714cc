"""A directory of PEFT adapters in the place of a model: what it is, and what it computes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import system
import torch
from conftest import Family
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from servers import Scripted, Vllm, serving
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rso import adapters, models
from rso.config import Templates
from rso.decoding import Decoder, Request, Sampling, Servers, load_decoder
from rso.decoding.server_engine import serve_command
from rso.errors import UserError
from rso.ranking import Comparison, load_ranker
from rso.work import directory_digest
from stages.runner import run_stage

GREEDY = Sampling(0.0, 0, 1.0, max_new_tokens=12, logprobs=True)
ITEMS = [Comparison("a question", "one answer", "another"), Comparison("a text", "good", "bad")]


class Adapted(NamedTuple):
    """A base, adapters of it, and the two merged by PEFT alone and saved."""

    base: str
    directory: str
    merged: str


@pytest.fixture(scope="module", params=["llama", "t5"])
def adapted(
    request: pytest.FixtureRequest,
    families: dict[str, Family],
    make_adapters: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Adapted:
    folder, family = tmp_path_factory.mktemp("adapted"), families[request.param]
    directory = make_adapters(family.policy, folder / "adapters")
    base = family.model_class.from_pretrained(family.policy, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, directory).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    family.tokenizer.save_pretrained(folder / "merged")
    return Adapted(family.policy, directory, str(folder / "merged"))


of_llama = pytest.mark.parametrize("adapted", ["llama"], indirect=True)


@pytest.fixture(scope="module")
def requests(tiny_tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    texts = ["Return the sum", "Open a file and read its lines", "A", "Is A better than B?"]
    return [Request(f"{i:016x}", tiny_tokenizer.encode(text)) for i, text in enumerate(texts)]


def edited(directory: str, target: Path, **changes: Any) -> str:
    """Return a copy of adapters with other settings."""
    config = Path(shutil.copytree(directory, target)) / adapters.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return str(target)


@of_llama
def test_identity_is_that_of_adapters_and_base_wherever_they_are(
    adapted: Adapted, make_adapters: Callable[..., str], tmp_path: Path
) -> None:
    identity = models.resolve_model(adapted.directory).identity
    assert identity["base_sha256"] == models.resolve_model(adapted.base).identity["sha256"]
    digest = models.model_digest(adapted.directory)
    assert directory_digest(adapted.directory, "reference") == digest
    shutil.copytree(adapted.base, tmp_path / "base")
    moved = edited(adapted.directory, tmp_path / "moved", base_model_name_or_path="../base")
    assert models.resolve_model(moved).identity == identity
    assert models.model_digest(moved) == digest
    others = [
        edited(moved, tmp_path / "scaled", lora_alpha=8),
        make_adapters(adapted.base, tmp_path / "weights", seed=1),
    ]
    assert not [other for other in others if models.resolve_model(other).identity == identity]
    assert not [other for other in others if models.model_digest(other) == digest]
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert models.resolve_model(moved).identity != identity
    assert models.model_digest(moved) != digest


@of_llama
def test_base_is_found_from_the_working_directory_and_at_the_hub_revision(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"base_model_name_or_path": Path(adapted.base).name}
    monkeypatch.chdir(Path(adapted.base).parent)
    assert models.base_of(edited(adapted.directory, tmp_path / "here", **name)) == adapted.base
    hub = {"base_model_name_or_path": "no-such-org/model", "revision": "0123456"}
    directory = edited(adapted.directory, tmp_path / "hub", **hub)
    with pytest.raises(UserError, match=r"no-such-org/model.*revision 0123456"):
        models.resolve_model(directory)


def test_model_computes_what_peft_does_and_is_an_ordinary_one(
    adapted: Adapted, tmp_path: Path
) -> None:
    model = models.load_model(adapted.directory, dtype=torch.float32)
    auto: Any = type(model)
    plain = auto.from_pretrained(adapted.base, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    before = plain.eval()(**inputs).logits
    expected = PeftModel.from_pretrained(plain, adapted.directory).eval()(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-4)
    assert (expected - before).abs().max() > 1
    assert type(model) is auto and not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    tokenizer = models.load_tokenizer(adapted.directory)
    models.save_model(model, tokenizer, tmp_path, dtype=torch.float32)
    opened = auto.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_model_in_bfloat16_is_the_merged_one_loaded_in_bfloat16(adapted: Adapted) -> None:
    """One rounding, after merging; what a plain loading leaves in float32 stays so."""
    model = models.load_model(adapted.directory, dtype="bfloat16")
    merged = models.load_model(adapted.merged, dtype="bfloat16")
    for of in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(model, of)()), dict(getattr(merged, of)())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
    assert model.config.dtype == merged.config.dtype == torch.bfloat16


@of_llama
def test_tokenizer_is_the_adapters_own_or_else_the_base_s(
    adapted: Adapted, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert models.load_tokenizer(adapted.directory).name_or_path == adapted.base
    own = edited(adapted.directory, tmp_path / "own")
    tiny_tokenizer.save_pretrained(own)
    (Path(own) / "chat_template.jinja").write_text("mine")
    assert models.load_tokenizer(own).chat_template == "mine"


def test_transformers_decoder_gives_the_samples_of_the_merged_model(adapted: Adapted) -> None:
    tokenizer = models.load_tokenizer(adapted.base)
    prompts = [Request(f"{i:016x}", tokenizer.encode(t)) for i, t in enumerate(("A B", "a text"))]
    sampling = Sampling(1.0, 0, 1.0, max_new_tokens=12, num_samples=4, logprobs=True)
    found, merged, base = (
        load_decoder("transformers", directory, dtype="float32").decode(prompts, sampling, seed=0)
        for directory in (adapted.directory, adapted.merged, adapted.base)
    )
    assert found == merged != base


def greedy(decoder: Decoder, requests: list[Request]) -> tuple[list[list[int]], list[float]]:
    decoded = [responses[0] for responses in decoder.decode(requests, GREEDY, seed=0)]
    decoder.close()
    return [d.token_ids for d in decoded], [d.cumulative_logp or 0.0 for d in decoded]


@of_llama
@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 12])
def test_vllm_decoder_gives_the_responses_of_the_merged_model(
    adapted: Adapted,
    requests: list[Request],
    make_adapters: Callable[..., str],
    tmp_path: Path,
    rank: int,
) -> None:
    directory = make_adapters(adapted.base, tmp_path / "adapters", r=rank, lora_alpha=4 * rank)
    tokens, logps = greedy(
        load_decoder("vllm", directory, dtype="float32", max_model_len=64), requests
    )
    expected = load_decoder("transformers", directory, dtype="float32")
    merged_tokens, merged_logps = greedy(expected, requests)
    base_tokens, _ = greedy(load_decoder("transformers", adapted.base, dtype="float32"), requests)
    assert tokens == merged_tokens != base_tokens
    np.testing.assert_allclose(logps, merged_logps, rtol=1e-4)


@pytest.fixture
def twice(adapted: Adapted, make_adapters: Callable[..., str], tmp_path: Path) -> str:
    """Adapters of a base that is one of adapters."""
    second = make_adapters(adapted.merged, tmp_path / "second", seed=1)
    return edited(second, tmp_path / "twice", base_model_name_or_path=adapted.directory)


@of_llama
def test_adapters_of_adapters_are_merged_one_after_the_other(
    adapted: Adapted, twice: str, tmp_path: Path
) -> None:
    once = edited(twice, tmp_path / "once", base_model_name_or_path=adapted.merged)
    ids = torch.tensor([[5, 6, 7, 8]])
    found, expected = (models.load_model(d, dtype=torch.float32)(ids).logits for d in (twice, once))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@of_llama
@pytest.mark.slow
def test_vllm_refuses_adapters_that_it_cannot_compute(
    adapted: Adapted, twice: str, make_adapters: Callable[..., str], tmp_path: Path
) -> None:
    dora = make_adapters(adapted.base, tmp_path / "dora", use_dora=True)
    with pytest.raises(UserError, match=r"not yet support DoRA\. Use the transformers engine"):
        load_decoder("vllm", dora, dtype="float32")
    with pytest.raises(UserError, match=r"cannot start with .*Use the transformers engine"):
        load_decoder("vllm", twice, dtype="float32")


@of_llama
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_ranker_gives_the_logits_of_the_merged_model(adapted: Adapted, engine: str) -> None:
    def logits(directory: str, engine: str = "transformers") -> np.ndarray:
        ranker = load_ranker(
            directory, Templates(), dtype="float32", token_budget=256, engine=engine
        )
        return ranker.compare(ITEMS)

    found, merged = logits(adapted.directory, engine), logits(adapted.merged)
    np.testing.assert_allclose(found, merged, atol=1e-4)
    assert np.abs(merged - logits(adapted.base)).min() > 0.01


class Beside(Scripted):
    """A server of adapters beside their base."""

    base = "base"

    def models(self) -> dict[str, Any]:
        """Return the cards as vLLM gives them: that of adapters has no length."""
        root = {"id": "base", "root": self.base, "parent": None, "max_model_len": 256}
        return {"data": [root, {"id": self.model, "root": self.root, "parent": "base"}]}


@of_llama
def test_server_is_asked_for_adapters_and_checked_for_their_base(
    adapted: Adapted, requests: list[Request]
) -> None:
    server = Beside("adapter")
    server.root, server.base = adapted.directory, adapted.base
    with serving(server) as url:
        decoder = load_decoder("vllm-server", adapted.directory, servers=Servers((url,)))
        assert decoder.context_length == 256
        decoder.decode(requests, Sampling(max_new_tokens=2), seed=0)
        assert {body["model"] for body in server.asked} == {"adapter"}
        server.base = "/another/base"
        with pytest.raises(UserError) as error:
            load_decoder("vllm-server", adapted.directory, servers=Servers((url,)))
    options = f"--enable-lora --max-lora-rank 8 --lora-modules adapter={adapted.directory}"
    assert options in str(error.value)
    assert models.model_digest(adapted.base) in str(error.value)
    assert f"{models.model_digest(adapted.directory)}=" in str(error.value)


@of_llama
@pytest.mark.slow
def test_vllm_server_gives_the_responses_of_the_merged_model(
    adapted: Adapted, requests: list[Request], tmp_path: Path
) -> None:
    server = Vllm(serve_command(adapted.directory, "float32", 64), tmp_path / "log")
    try:
        servers = Servers((server.wait().url,))
        found = load_decoder("vllm-server", adapted.directory, dtype="float32", servers=servers)
        tokens, logps = greedy(found, requests)
    finally:
        server.kill()
    expected = load_decoder("transformers", adapted.merged, dtype="float32")
    merged_tokens, merged_logps = greedy(expected, requests)
    assert tokens == merged_tokens
    np.testing.assert_allclose(logps, merged_logps, rtol=1e-4)


@of_llama
def test_run_takes_adapters_as_its_model_and_as_its_proposal(
    adapted: Adapted, finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    skipped = run.graph(f"model={adapted.directory}", "train_sft.skip=true")
    run_stage(skipped, "prepare")
    reference = run_stage(skipped, "train_sft").artifact.output("reference")
    written = load_file(Path(reference) / "model.safetensors")
    merged = load_file(Path(adapted.merged) / "model.safetensors")
    assert written.keys() == merged.keys()
    assert all(torch.equal(written[name], merged[name]) for name in merged)
    candidates = [
        run_stage(run.graph(f"decode.policy={policy}"), "decode").artifact.digest("candidates")
        for policy in (adapted.directory, adapted.merged, adapted.base)
    ]
    assert candidates[0] == candidates[1] != candidates[2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base_model_name_or_path": None}, "names no base; set base_model_name_or_path"),
        ({"base_model_name_or_path": "/absent"}, r"base that it names is missing.*found nothing"),
        ({"peft_type": "IA3"}, r"of type IA3, expected LORA; merge them into their base"),
    ],
)
@of_llama
def test_adapters_without_a_base_or_of_another_type_are_user_errors(
    adapted: Adapted, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    directory = edited(adapted.directory, tmp_path / "edited", **changes)
    with pytest.raises(UserError, match=sentence):
        models.resolve_model(directory)


@of_llama
def test_adapters_without_safetensors_are_a_user_error(adapted: Adapted, tmp_path: Path) -> None:
    directory = edited(adapted.directory, tmp_path / "edited")
    (Path(directory) / adapters.WEIGHTS).rename(Path(directory) / "adapter_model.bin")
    with pytest.raises(UserError, match="save the adapters as safetensors"):
        models.resolve_model(directory)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"num_hidden_layers": 3}, "only one of them has .*layers.2.*lora"),
        ({"num_hidden_layers": 1}, "only one of them has .*layers.1.*lora"),
        ({"intermediate_size": 96}, "size mismatch for .*mlp"),
    ],
)
@of_llama
def test_adapters_of_another_base_are_a_user_error_in_every_engine(
    adapted: Adapted,
    make_llama: Callable[..., str],
    make_adapters: Callable[..., str],
    tmp_path: Path,
    shape: dict[str, int],
    sentence: str,
) -> None:
    base = make_llama(tmp_path / "other", **shape)
    made = make_adapters(adapted.base, tmp_path / "made", target_modules=["q_proj", "up_proj"])
    directory = edited(made, tmp_path / "here", base_model_name_or_path=base)
    for engine in ("transformers", "vllm", "vllm-server"):
        with pytest.raises(UserError, match=rf"do not fit the base.*{sentence}.*were trained on"):
            load_decoder(engine, directory, dtype="float32")


@of_llama
def test_adapters_that_added_tokens_are_a_user_error(adapted: Adapted, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(adapted.base)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    config = PeftModel.from_pretrained(model, adapted.directory).peft_config["default"]
    get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"size mismatch for .*where tokens were added, merge"):
        models.load_model(tmp_path, dtype="float32")


def test_adapters_of_a_shared_output_layer_are_a_user_error(
    make_llama: Callable[..., str], make_adapters: Callable[..., str], tmp_path: Path
) -> None:
    base = make_llama(tmp_path / "tied", tie_word_embeddings=True)
    directory = make_adapters(base, tmp_path / "adapters", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="which are one in the base and could not be merged"):
        models.load_model(directory, dtype="float32")


@of_llama
def test_adapters_that_name_themselves_as_base_are_a_user_error(
    adapted: Adapted, tmp_path: Path
) -> None:
    directory = edited(adapted.directory, tmp_path / "itself", base_model_name_or_path=".")
    for load in (models.resolve_model, models.load_model_config, models.model_digest):
        with pytest.raises(UserError, match="names this directory itself as the base"):
            load(directory)


@of_llama
def test_adapters_of_a_hub_s_latest_are_a_user_error(adapted: Adapted, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    directory = edited(adapted.directory, tmp_path / "latest", revision=None)
    with pytest.raises(UserError, match=rf"revision main, which may move; .* {commit} now"):
        adapters.check_pinned(directory, {"commit": commit})
    adapters.check_pinned(directory, {"sha256": commit})
    pinned = edited(adapted.directory, tmp_path / "pinned", revision=commit)
    adapters.check_pinned(pinned, {"commit": commit})


@of_llama
def test_adapters_of_a_gguf_base_have_a_digest(adapted: Adapted, tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"one")
    name = {"base_model_name_or_path": "../base.gguf"}
    directory = edited(adapted.directory, tmp_path / "adapters", **name)
    digest = models.model_digest(directory)
    (tmp_path / "base.gguf").write_bytes(b"two")
    assert models.model_digest(directory) != digest


@of_llama
def test_adapters_in_four_bits_are_a_user_error(adapted: Adapted) -> None:
    with pytest.raises(UserError, match=r"lora\.quantise is for whole models.*train_sft\.skip"):
        models.load_model(adapted.directory, dtype="float32", quantise=True)
