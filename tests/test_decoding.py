"""One contract that every engine passes, and the promises of the transformers engine beyond it."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Family
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from rso import decoding, models, seeds
from rso.decoding import (
    Decoder,
    Request,
    Sampling,
    Servers,
    check_room,
    draws,
    load_decoder,
    vllm_engine,
)
from rso.decoding.side_by_side import side_by_side
from rso.decoding.transformers_engine import TransformersDecoder
from rso.errors import UserError

PROMPTS = [
    "Return the sum of all the numbers in a list.",
    "Open a file and read its lines",
    "Return the sum of the lazy dog, and the dog does not care. " * 3,
    "A",
    "Is A better than B?",
]


OURS = ["transformers", "transformers-t5"]
VLLM = [pytest.param(name, marks=pytest.mark.slow) for name in ("vllm", "vllm-server")]
of_llamas = pytest.mark.parametrize("kind", [OURS[0], *VLLM], indirect=True)
in_ours = pytest.mark.parametrize("kind", OURS, indirect=True)
our_llama = pytest.mark.parametrize("kind", OURS[:1], indirect=True)


@pytest.fixture(scope="module", params=[*OURS, *VLLM])
def kind(request: pytest.FixtureRequest) -> str:
    """An engine, and the family of the model that it decodes where that is not Llama's."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def subject(kind: str, families: dict[str, Family]) -> Family:
    return families["t5" if kind.endswith("t5") else "llama"]


@pytest.fixture(scope="module")
def model(subject: Family) -> PreTrainedModel:
    return subject.model_class.from_pretrained(subject.policy, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(subject: Family) -> PreTrainedTokenizerBase:
    return subject.tokenizer


@pytest.fixture(scope="module")
def requests(tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    return [Request(f"{i:016x}", tokenizer.encode(text)) for i, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def decoder(kind: str, subject: Family, request: pytest.FixtureRequest) -> Iterator[Decoder]:
    is_served = kind == "vllm-server"
    servers = Servers((request.getfixturevalue("vllm_url"),)) if is_served else None
    engine = kind.removesuffix("-t5")
    loaded = load_decoder(
        engine, subject.policy, dtype="float32", max_model_len=256, servers=servers
    )
    yield loaded
    loaded.close()


@pytest.fixture
def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Decoder:
    return TransformersDecoder(model, tokenizer)


@our_llama
def test_transformers_decode_ends_at_the_stop_tokens_of_tokenizer_and_generation_config(
    engine: Decoder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A chat model has two: the end of a turn in one, the end of a text in the other."""
    sampling = Sampling(1.5, 0, 1.0, 60, num_samples=64)
    request = Request("0" * 16, tokenizer.encode(PROMPTS[0]))
    (drawn,) = engine.decode([request], sampling, seed=1)
    (turn, _), *_ = Counter(i for response in drawn for i in response.token_ids).most_common()
    assert turn != tokenizer.eos_token_id
    config = deepcopy(model.generation_config)
    config.eos_token_id = turn
    stops = {turn, tokenizer.eos_token_id}
    assert set(models.stop_token_ids(config, tokenizer)) == stops
    before, model.generation_config = model.generation_config, config
    try:
        (found,) = TransformersDecoder(model, tokenizer).decode([request], sampling, seed=1)
    finally:
        model.generation_config = before
    ends = {response.token_ids[-1] for response in found if response.finish_reason == "stop"}
    assert ends == stops
    assert all(not stops & set(response.token_ids[:-1]) for response in found)


def plain_logits(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """fp32 [response + 1, vocabulary]: before each token of the response, and after it.

    From one plain forward pass without any cache.
    """
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            decoded = torch.tensor([[start, *response]])
            return model(torch.tensor([prompt]), decoder_input_ids=decoded).logits[0].float()
        return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :].float()


def plain_logp(model: PreTrainedModel, prompt: list[int], response: list[int]) -> float:
    logps = plain_logits(model, prompt, response).log_softmax(-1)
    return sum(float(logps[place, token]) for place, token in enumerate(response))


def plain_choice(logits: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """A transcription of temperature, top-k, top-p and the inverse CDF, one token at a time."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    ranked = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    ranked = ranked[: sampling.top_k or len(ranked)]
    weights = np.exp(scaled - scaled.max())
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= sampling.top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    target, mass = uniform * sum(weights[i] for i in kept), 0.0
    for token in sorted(kept):
        mass += weights[token]
        if mass > target:
            return token
    return max(kept)


def plain_decode(
    model: PreTrainedModel, request: Request, sampling: Sampling, seed: int, stop: int
) -> list[list[int]]:
    """Decode by the textbook: one sample at a time, the whole sequence anew for each token."""
    responses = []
    for sample in range(sampling.num_samples):
        uniforms = seeds.generator("decode", seed, request.prompt_id, sample).random(
            sampling.max_new_tokens
        )
        response: list[int] = []
        while len(response) < sampling.max_new_tokens and stop not in response:
            logits = plain_logits(model, request.token_ids, response)[-1].numpy()
            response.append(plain_choice(logits, sampling, uniforms[len(response)]))
        responses.append(response)
    return responses


@pytest.mark.parametrize("filters", [(1.0, 0, 1.0), (0.4, 5, 0.9)])
def test_decode_any_engine_gives_each_request_its_samples_in_order(
    decoder: Decoder,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[Request],
    filters: tuple[float, int, float],
) -> None:
    """Log-probs are those of the model itself, untempered and of the whole vocabulary."""
    sampling = Sampling(*filters, max_new_tokens=12, num_samples=3, logprobs=True)
    reported: list[int] = []
    decoded = decoder.decode(requests, sampling, seed=0, progress=reported.append)
    assert [len(of_prompt) for of_prompt in decoded] == [3] * len(requests)
    assert sum(reported) == 3 * len(requests)
    for request, of_prompt in zip(requests, decoded, strict=True):
        for response in of_prompt:
            is_stopped = response.token_ids[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in response.token_ids[:-1]
            assert response.finish_reason == ("stop" if is_stopped else "length")
            assert is_stopped or len(response.token_ids) == 12
            assert response.text == tokenizer.decode(response.token_ids, skip_special_tokens=True)
            # the prompt's own log-probs make this fail when answers change places
            expected = plain_logp(model, request.token_ids, response.token_ids)
            assert response.cumulative_logp == pytest.approx(expected, rel=1e-4)


def test_decode_any_engine_greedy_equals_generate(
    decoder: Decoder, model: PreTrainedModel, requests: list[Request]
) -> None:
    decoded = decoder.decode(requests, Sampling(0.0, 40, 1.0, 16, num_samples=2), seed=0)
    for request, of_prompt in zip(requests, decoded, strict=True):
        prompt = torch.tensor([request.token_ids])
        expected = model.generate(prompt, do_sample=False, max_new_tokens=16)
        size = 1 if model.config.is_encoder_decoder else prompt.shape[1]
        assert of_prompt[0].token_ids == expected[0, size:].tolist()
        assert of_prompt[1] == of_prompt[0]
        assert of_prompt[0].cumulative_logp is None


@pytest.mark.parametrize("top_k", [0, 40])
def test_decode_any_engine_same_call_repeats_and_another_seed_differs(
    decoder: Decoder, requests: list[Request], top_k: int
) -> None:
    sampling = Sampling(1.0, top_k, 1.0, 12, num_samples=4)
    first = decoder.decode(requests, sampling, seed=0)
    assert decoder.decode(requests, sampling, seed=1) != first
    assert decoder.decode(requests, sampling, seed=0) == first


def test_decode_any_engine_top_k_one_is_greedy(decoder: Decoder, requests: list[Request]) -> None:
    greedy = decoder.decode(requests, Sampling(0.0, 0, 1.0, 12), seed=0)
    assert decoder.decode(requests, Sampling(1.0, 1, 1.0, 12), seed=0) == greedy
    assert decoder.decode(requests, Sampling(1.0, 0, 1e-6, 12), seed=0) == greedy


@of_llamas
def test_decode_any_engine_stop_text_ends_a_response_with_its_tokens(
    decoder: Decoder,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[Request],
) -> None:
    free = Sampling(0.0, 0, 1.0, 16, logprobs=True)
    whole = [of_prompt[0] for of_prompt in decoder.decode(requests, free, seed=0)]
    # Letters of one of the texts, which some others have and some have not. Whole ones: vLLM
    # waits with bytes that are no letter yet, so a half letter ends no text there.
    pieces = [response.text[3:5] for response in whole if len(response.text) > 6]
    stop = next(piece for piece in pieces if "\ufffd" not in piece)
    stopped = decoder.decode(requests, replace(free, stop=("never there", stop)), seed=0)
    is_stopped = [stop in response.text for response in whole]
    assert any(is_stopped) and not all(is_stopped)
    for request, before, (after,), has_stop in zip(
        requests, whole, stopped, is_stopped, strict=True
    ):
        if not has_stop:
            # those that stopped leave the batch, which is rounded otherwise from then on
            near = pytest.approx(before.cumulative_logp, rel=1e-5)
            assert after.cumulative_logp == near
            assert after._replace(cumulative_logp=before.cumulative_logp) == before
            continue
        assert (after.text, after.finish_reason) == (before.text.split(stop)[0], "stop")
        size = len(after.token_ids)
        assert after.token_ids == before.token_ids[:size]
        assert stop in tokenizer.decode(after.token_ids, skip_special_tokens=True)
        assert stop not in tokenizer.decode(after.token_ids[:-1], skip_special_tokens=True)
        expected = plain_logp(model, request.token_ids, after.token_ids)
        assert after.cumulative_logp == pytest.approx(expected, rel=1e-4)


def test_decode_any_engine_samples_follow_the_model(
    decoder: Decoder, model: PreTrainedModel, requests: list[Request]
) -> None:
    sampling = Sampling(0.7, 5, 1.0, max_new_tokens=1, num_samples=2000)
    (decoded,) = decoder.decode(requests[:1], sampling, seed=0)
    counts = Counter(response.token_ids[0] for response in decoded)
    top, tokens = plain_logits(model, requests[0].token_ids, [])[-1].topk(5)
    expected = dict(zip(tokens.tolist(), torch.softmax(top / 0.7, -1).tolist(), strict=True))
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        # four standard deviations of a binomial share
        deviation = 4 * (probability * (1 - probability) / 2000) ** 0.5
        assert counts[token] / 2000 == pytest.approx(probability, abs=deviation)


@of_llamas
def test_decode_any_engine_refuses_a_prompt_without_room(decoder: Decoder) -> None:
    too_long = Request("feed", [5] * (decoder.context_length - 9))
    with pytest.raises(UserError, match=r"feed.*expected 1 to"):
        decoder.decode([too_long], Sampling(max_new_tokens=10), seed=0)
    assert len(decoder.decode([too_long], Sampling(max_new_tokens=9), seed=0)[0]) == 1


@in_ours
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, 40, 1.0, 16, num_samples=5),
        Sampling(1.0, 0, 1.0, 16, num_samples=5),
        Sampling(1.3, 0, 0.8, 16, num_samples=2),
        Sampling(0.9, 20, 0.6, 1, num_samples=3),
        Sampling(0.0, 0, 1.0, 16),
    ],
    ids=str,
)
def test_transformers_decode_equals_one_sample_at_a_time(
    engine: Decoder,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[Request],
    sampling: Sampling,
) -> None:
    decoded = engine.decode(requests, sampling, seed=3)
    stop = tokenizer.eos_token_id
    expected = [plain_decode(model, request, sampling, 3, stop) for request in requests]
    assert [[response.token_ids for response in of_prompt] for of_prompt in decoded] == expected


@in_ours
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("transformers_engine.ROWS_PER_WAVE", 1),
        ("transformers_engine.ROWS_PER_WAVE", 9),
        ("transformers_engine.BYTES_PER_WAVE", 1),
        ("causal.TOKENS_PER_PREFILL", 1),
        ("causal.TOKENS_PER_PREFILL", 40),
        ("shared_prompt.MOST_RUNS", 0),
        ("shared_prompt.LIVE_SHARE", 0.0),
        ("shared_prompt.LIVE_SHARE", 1.0),
    ],
)
def test_transformers_decode_batching_changes_nothing(
    engine: Decoder,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: float,
) -> None:
    sampling = Sampling(1.0, 0, 1.0, 16, num_samples=4, logprobs=True)
    expected = engine.decode(requests, sampling, seed=5)
    monkeypatch.setattr(f"rso.decoding.{setting}", value)
    found = TransformersDecoder(model, tokenizer).decode(requests, sampling, seed=5)
    for of_prompt, of_same in zip(found, expected, strict=True):
        for response, same in zip(of_prompt, of_same, strict=True):
            assert response.token_ids == same.token_ids
            assert response.cumulative_logp == pytest.approx(same.cumulative_logp, rel=1e-4)


@in_ours
def test_transformers_decode_samples_ignore_neighbours_order_and_number(
    engine: Decoder, requests: list[Request]
) -> None:
    sampling = Sampling(1.0, 0, 1.0, 16, num_samples=4)
    together = engine.decode(requests, sampling, seed=5)
    assert engine.decode(requests[::-1], sampling, seed=5) == together[::-1]
    assert [engine.decode([r], sampling, seed=5)[0] for r in requests] == together
    fewer = engine.decode(requests, replace(sampling, num_samples=2), seed=5)
    assert fewer == [of_prompt[:2] for of_prompt in together]


@in_ours
def test_transformers_decode_out_of_memory_halves_the_batch_once_and_loses_nothing(
    engine: Decoder,
    model: PreTrainedModel,
    requests: list[Request],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampling = Sampling(1.0, 0, 1.0, 16, num_samples=64)
    expected = engine.decode(requests, sampling, seed=5)
    reported: list[int] = []
    with memory_for(model, rows=128):
        found = engine.decode(requests, sampling, seed=5, progress=reported.append)
    pairs = [
        (response, same)
        for of_prompt, of_same in zip(found, expected, strict=True)
        for response, same in zip(of_prompt, of_same, strict=True)
    ]
    # other batches round otherwise, which moves a token in one of some 10,000 responses
    assert sum(response != same for response, same in pairs) <= 1
    assert sum(reported) == 64 * len(requests)
    (warning,) = caplog.messages
    # half of the five prompts' 320 samples, which were one wave
    assert "memory ran out" in warning and "batches of 160 samples" in warning
    with (
        memory_for(model, rows=63),
        pytest.raises(UserError, match=r"batches of 160 samples.*lower max_new_tokens"),
    ):
        engine.decode(requests, sampling, seed=5)


@contextmanager
def memory_for(model: PreTrainedModel, rows: int) -> Iterator[None]:
    """Let the model's projection fail as a full GPU does where there are more rows."""

    def refuse(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = model.get_output_embeddings().register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


@in_ours
def test_transformers_decode_side_by_side_gives_the_same_samples(
    engine: Decoder, requests: list[Request]
) -> None:
    sampling = Sampling(1.0, 0, 1.0, 16, num_samples=4, logprobs=True)
    expected = engine.decode(requests, sampling, seed=5)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        reported: list[int] = []
        found = engine.decode(requests, sampling, seed=5, progress=reported.append)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert sum(reported) == 4 * len(requests)
    for of_prompt, of_same in zip(found, expected, strict=True):
        assert [r.token_ids for r in of_prompt] == [r.token_ids for r in of_same]


def test_side_by_side_first_error_is_raised_and_the_rest_is_left() -> None:
    begun: list[int] = []
    before = torch.get_num_threads()

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.01)
        if number == 3:
            raise UserError("at three")

    with pytest.raises(UserError, match="at three"):
        side_by_side(work, range(1000), 2)
    assert 3 in begun and len(begun) < 20
    assert torch.get_num_threads() == before


@in_ours
def test_transformers_decode_restores_the_models_attention(
    engine: Decoder, model: PreTrainedModel, requests: list[Request]
) -> None:
    def kinds() -> list[str]:
        stacks = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        return [stack.config._attn_implementation for stack in stacks]

    before = kinds()
    engine.decode(requests[:1], Sampling(max_new_tokens=2), seed=0)
    assert kinds() == before


def tiny(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def shape(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | float]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,
    }


@our_llama
def test_transformers_decode_other_architectures_equal_one_sample_at_a_time(
    tokenizer: PreTrainedTokenizerBase, requests: list[Request]
) -> None:
    sampling = Sampling(1.0, 0, 1.0, 8, num_samples=3)
    for config in (
        Qwen3Config(**shape(tokenizer)),
        MistralConfig(**shape(tokenizer), sliding_window=256),
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2),
    ):
        other = tiny(config)
        other.generation_config.eos_token_id = [tokenizer.eos_token_id, 40]
        decoded = TransformersDecoder(other, tokenizer).decode(requests[:3], sampling, seed=3)
        for request, of_prompt in zip(requests, decoded, strict=False):
            for response, expected in zip(
                of_prompt, plain_decode(other, request, sampling, 3, 40), strict=True
            ):
                if tokenizer.eos_token_id not in expected:
                    assert response.token_ids == expected


@our_llama
def test_transformers_decoder_sliding_window_bounds_the_context(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    config = MistralConfig(**shape(tokenizer), sliding_window=256)
    assert TransformersDecoder(tiny(config), tokenizer).context_length == 256


@our_llama
def test_transformers_decoder_soft_capped_attention_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(UserError, match=r"soft-capping.*vllm"):
        TransformersDecoder(tiny(Gemma2Config(**shape(tokenizer))), tokenizer)


@our_llama
def test_transformers_decode_broken_weights_name_the_prompt(
    tokenizer: PreTrainedTokenizerBase, requests: list[Request]
) -> None:
    broken = tiny(Qwen3Config(**shape(tokenizer)))
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(UserError, match=requests[0].prompt_id):
        TransformersDecoder(broken, tokenizer).decode(requests[:1], Sampling(), seed=0)


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.floats(-8, 8), min_size=1, max_size=12),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.37, 0.83, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_draw_any_filter_equals_the_plain_transcription(
    logits: list[float], temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    # distinct logits: which of two equal ones a filter keeps is not specified
    row = np.array([value + 1e-3 * i for i, value in enumerate(logits)], dtype=np.float32)
    if len(set(row.tolist())) < len(row):
        return
    distribution = draws.filtered(torch.from_numpy(row)[None], sampling)
    uniforms = torch.tensor([[uniform]], dtype=torch.float64)
    drawn = int(draws.draw(distribution, uniforms))
    # rounding may move a boundary, so a uniform beside it may fall on either side
    near = {plain_choice(row, sampling, u) for u in (uniform - 1e-6, uniform, uniform + 1e-6)}
    assert drawn in near


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 3000),
    count=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_top_logits_equal_those_of_a_full_sort(
    size: int, count: int, dtype: torch.dtype, seed: int
) -> None:
    count = min(count, size)
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    top, token_ids = draws.top_logits(logits, count)
    expected = logits.float().sort(dim=-1, descending=True).values[:, :count]
    assert torch.equal(top, expected)
    assert torch.equal(logits.gather(-1, token_ids).float(), expected)
    assert all(len(set(row)) == count for row in token_ids.tolist())


def test_keyed_uniforms_depend_on_seed_prompt_and_sample_alone() -> None:
    few = draws.keyed_uniforms(0, "a", 2, 5)
    many = draws.keyed_uniforms(0, "a", 4, 7)
    assert (many[:2, :5] == few).all()
    others = [draws.keyed_uniforms(1, "a", 2, 5), draws.keyed_uniforms(0, "b", 2, 5)]
    assert not any((other == few).any() for other in others)
    assert not (few[0] == few[1]).any()


def test_check_room_keeps_what_fits_and_says_why_not() -> None:
    requests = [Request("a", [1] * 6), Request("b", [1] * 7), Request("c", []), Request("d", [1])]
    kept, refused = check_room(requests, context_length=10, max_new_tokens=4)
    assert [request.prompt_id for request in kept] == ["a", "d"]
    assert [refusal.request.prompt_id for refusal in refused] == ["b", "c"]
    assert "7 tokens, expected 1 to 6" in refused[0].reason


def test_resolve_engine_auto_needs_no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: None)
    assert decoding.resolve_engine("auto") == "transformers"
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: object())
    assert decoding.resolve_engine("auto") == "vllm"
    with pytest.raises(UserError, match="'llama'"):
        decoding.resolve_engine("llama")


def no_vllm(directory: str, **settings: Any) -> str:
    """Return the sentence with which the vllm engine does not start."""
    with pytest.raises(UserError) as error:
        load_decoder("vllm", directory, dtype="float32", **settings)
    sentence = str(error.value)
    assert len(sentence) < 500 + len(directory), sentence
    return sentence


def test_vllm_without_a_model_says_what_it_found(tmp_path: Path) -> None:
    assert "found nothing; check the path" in no_vllm(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").touch()
    assert "found a directory with notes.txt" in no_vllm(str(tmp_path))


@pytest.mark.slow
def test_vllm_without_memory_names_the_engine_that_needs_less(
    tiny_llama_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vllm_engine.CPU_OPTIONS, "kv_cache_memory_bytes", 1 << 50)
    sentence = no_vllm(tiny_llama_dir)
    assert "is less than requested memory for kv (1048576.0 GiB). Use the " in sentence
    # 512 bytes a token
    monkeypatch.setitem(vllm_engine.CPU_OPTIONS, "kv_cache_memory_bytes", 512 * 256)
    sentence = no_vllm(tiny_llama_dir, max_model_len=512)
    assert "max seq len (512)" in sentence and "(engine: transformers)" in sentence
    decoder = load_decoder("vllm", tiny_llama_dir, dtype="float32", max_model_len=128)
    assert decoder.context_length == 128
    decoder.close()


@pytest.mark.slow
def test_vllm_broken_weights_name_the_prompt(broken_llama_dir: str) -> None:
    decoder = load_decoder("vllm", broken_llama_dir, dtype="float32", max_model_len=128)
    request = Request("feed", [20, 30, 40])
    # by our sampler with a top-k, by vLLM's own without, and greedy
    for sampling in (Sampling(top_k=4), Sampling(top_k=0), Sampling(temperature=0.0)):
        with pytest.raises(UserError, match=r"not finite for prompt feed"):
            decoder.decode([request], replace(sampling, max_new_tokens=4), seed=0)
    decoder.close()


@our_llama
@pytest.mark.slow
def test_vllm_with_an_architecture_of_no_engine_says_so(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    layers = {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4}
    model = tiny(GPTNeoConfig(**(shape(tokenizer) | layers)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sentence = no_vllm(str(tmp_path))
    assert "Model architectures ['GPTNeoForCausalLM'] are not supported" in sentence
    assert "transformers engine does not compute this architecture either" in sentence
    with pytest.raises(UserError, match=r"not support an attention.*; choose a plain"):
        load_decoder("transformers", str(tmp_path), dtype="float32")


def test_sampling_impossible_value_is_refused() -> None:
    with pytest.raises(UserError, match=r"top_p.*found 0"):
        Sampling(top_p=0)
