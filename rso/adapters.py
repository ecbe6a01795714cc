"""A directory of PEFT adapters (LoRA) as a model: reading its settings, and merging it.

`rso.models` finds the base that the directory names, and treats the two as one model. Importing
this module loads no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rso.errors import UserError, first_sentence

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(location: str | Path) -> bool:
    """Return whether a directory holds PEFT adapters, that is, an `adapter_config.json`."""
    return (Path(location) / CONFIG).is_file()


def base_source(directory: str | Path) -> str:
    """Return the model source of the base that a directory of adapters names.

    A relative path starts at the directory. If nothing is there, it starts at the working
    directory.

    Raises:
        UserError: no base is named, the weights are missing, or the adapters are not LoRA.
    """
    settings = _settings(directory)
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind != "LORA":
        raise UserError(
            f"model {directory}: the adapters are of type {kind}, expected LORA; merge them into "
            "their base (merge_and_unload in PEFT), save that, and give its directory."
        )
    if not (Path(directory) / WEIGHTS).is_file():
        raise UserError(
            f"model {directory}: {CONFIG} without {WEIGHTS}; save the adapters as safetensors."
        )
    if not base:
        raise UserError(
            f"model {directory}: {CONFIG} names no base; set base_model_name_or_path in it to the "
            "model that the adapters were trained on."
        )
    beside, revision = Path(directory) / base, settings.get("revision")
    if beside.exists():
        return str(beside)
    return f"{base}@{revision}" if revision and not Path(base).exists() else str(base)


def check_pinned(directory: str | Path, identity: Mapping[str, str]) -> None:
    """Raise `UserError` if the base is on the hub and the adapters do not name its commit.

    A branch or a tag may be another model at the next load. `identity` is the identity of the base
    now.
    """
    commit, revision = identity.get("commit"), _settings(directory).get("revision")
    if commit is not None and revision != commit:
        raise UserError(
            f"model {directory}: {CONFIG} names a base on the hub at revision "
            f'{revision or "main"}, which may move; set "revision" in it to a commit, which is '
            f"{commit} now."
        )


def max_rank(directory: str | Path) -> int:
    """Return vLLM's `max_lora_rank` for these adapters.

    It is the least power of two that is at least 8 and at least the rank of every layer. vLLM
    accepts the powers from 8 to 512.
    """
    settings = _settings(directory)
    rank = max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 8)
    return 1 << (int(rank) - 1).bit_length()


def check_fit(directory: str | Path, config: "PreTrainedConfig") -> None:
    """Raise `UserError` unless the adapters fit a model of this configuration.

    The model's weights are not loaded. vLLM does not check the fit: it skips modules that its model
    lacks, and pads weights that are too small with zeros.
    """
    import torch
    import transformers

    is_encoder_decoder = config.is_encoder_decoder
    auto: Any = (
        transformers.AutoModelForSeq2SeqLM
        if is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    with torch.device("meta"):
        model = auto.from_config(config)
    _adapted(model, directory)


def merged(
    model: "PreTrainedModel", directory: str | Path, dtype: "torch.dtype"
) -> "PreTrainedModel":
    """Return `model`, a base in float32, with the adapters merged into it, then cast to `dtype`.

    Raises:
        UserError: the adapters do not fit, or they change embeddings that the base ties.
    """
    whole: PreTrainedModel = _adapted(model, directory).merge_and_unload()
    # `whole.to` would also cast buffers, and rotary frequencies must stay in float32.
    for parameter in whole.requires_grad_(True).parameters():
        parameter.data = parameter.data.to(dtype)
    whole.config.dtype = dtype
    return whole


def _adapted(model: Any, directory: str | Path) -> Any:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig.from_pretrained(str(directory))
    # Without a task type PEFT adds nothing for the task, such as a head or its own generation.
    config.task_type, config.inference_mode = None, True
    is_empty = model.device.type == "meta"
    try:
        adapted = PeftModel(model, config, low_cpu_mem_usage=is_empty)
        found = adapted.load_adapter(str(directory), "default", low_cpu_mem_usage=is_empty)
    except (ValueError, RuntimeError) as error:
        raise _misfit(directory, str(error)) from error
    unmatched = [*found.unexpected_keys, *found.missing_keys]
    if unmatched:
        raise _misfit(directory, f"only one of them has {unmatched[0]}")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise UserError(
            f"model {directory}: the adapters change the embedding or the output layer, which are "
            "one in the base and could not be merged; train without them (target_modules), or "
            "untie the base's first (tie_word_embeddings)."
        )
    return adapted


def _misfit(directory: str | Path, why: str) -> UserError:
    return UserError(
        f"model {directory}: the adapters do not fit the base that base_model_name_or_path in "
        f"{CONFIG} names: {first_sentence(why)}; name the one that they were trained on, "
        "and where tokens were added, merge and save the whole model."
    )


def _settings(directory: str | Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((Path(directory) / CONFIG).read_bytes())
    return settings
