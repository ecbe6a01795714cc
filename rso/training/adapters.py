"""Low-rank adapters by PEFT, and the merged weights of a model with adapters."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from rso.config import Optimisation
from rso.errors import UserError

ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."


def add_adapters(model: PreTrainedModel, settings: Optimisation, seed: int, *, where: str) -> Any:
    """`model` with the adapters of `settings.lora`; only the adapters are trained.

    `seed` determines their initial weights. Their initial update is zero. Adapters are float32, and
    so is the rest of the model unless it is quantised.

    Raises:
        UserError: the settings freeze parts too, no layer has any of the names, or a layer with one
            of the names is not linear.
    """
    lora = settings.lora
    assert lora is not None
    if settings.freeze_layers or settings.freeze_embeddings:
        raise UserError(
            f"{where}: lora trains adapters alone, so everything else is frozen already; remove"
            f" {where}.freeze_layers and freeze_embeddings, or lora."
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.modules) or ALL_LINEAR,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"{where}.lora.modules: {', '.join(lora.modules) or ALL_LINEAR} fits no layer of the"
            f" model ({error}); name its linear layers, e.g. q_proj, or leave it empty for all."
        ) from error
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and len(module.lora_A) == 0:
            raise UserError(
                f"{where}.lora.modules: {name.removeprefix(_PREFIX)} is a"
                f" {type(module.get_base_layer()).__name__}; adapters are for linear layers."
            )
    if lora.quantise == "none":
        adapted.float()
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` carries adapters."""
    return isinstance(model, PeftModel)


def merged_state(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model without adapters, with each adapter's update added to its layer.

    The names are those of the model without adapters. `state` has all weights of the adapted model.
    No weight in memory changes: to merge in place and then undo it would leave rounding errors.
    """
    merged = {
        name.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" not in name and not _is_quantisation_state(name)
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            place = f"{name.removeprefix(_PREFIX)}.weight"
            down, up = (
                state[f"{name}.lora_{side}.{model.active_adapter}.weight"].float() for side in "AB"
            )
            update = up @ down * module.scaling[model.active_adapter]
            base: Any = module.get_base_layer()
            is_quantised = merged[place].dtype != torch.float32
            weight = dequantize_module_weight(base).float() if is_quantised else merged[place]
            # GPT-2 has weights [in, out].
            is_transposed = getattr(module, "fan_in_fan_out", False)
            merged[place] = weight + (update.T if is_transposed else update)
    return merged


def _is_quantisation_state(name: str) -> bool:
    return any(part in name for part in (".absmax", ".quant_map", ".nested_", ".quant_state"))
