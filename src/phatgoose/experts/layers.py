"""What kinds of adapters read of a base's layer: its weights, and how a file's differ from them."""

from typing import Any

from torch import Tensor, nn

from phatgoose.errors import IncompatibleExpertError, UnsupportedAdapterError
from phatgoose.experts.base import linear_sizes


def is_transposed(layer: nn.Module) -> bool:
    """Whether its weight is [in, out], as that of GPT-2's Conv1D."""
    sizes, weight = linear_sizes(layer), getattr(layer, "weight", None)
    return type(layer).__name__ == "Conv1D" and sizes is not None and weight is not None


def weight_of(layer: nn.Module, who: str) -> Tensor:
    """The weight [O, I] of a linear layer, or [V, H] of an embedding, in fp32; quantised ones too.

    Raises UnsupportedAdapterError where nobody can tell it.
    """
    weight: Any = getattr(layer, "weight", None)
    if weight is not None and getattr(weight, "is_meta", False):
        raise UnsupportedAdapterError(
            f"{who}: depends on the base's weights, and these are not loaded here. Load the base "
            "onto a device."
        )
    if weight is None or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        from peft.utils.integrations import dequantize_module_weight

        try:
            weight = dequantize_module_weight(layer)
        except Exception as error:
            raise UnsupportedAdapterError(
                f"{who}: depends on the base's weight there, and that of this "
                f"{type(layer).__name__} cannot be read ({error}). Load the base without "
                "quantisation, in bfloat16 say."
            ) from None
    whole: Tensor = weight.detach().float()
    return whole.T if is_transposed(layer) else whole


def difference(layer: nn.Module, parameter: str, stored: Tensor, who: str) -> Tensor:
    """What a stored parameter differs by from the layer's own, in fp32.

    It is compared in the layer's dtype, in which PEFT would load it. Raises
    IncompatibleExpertError where the two cannot be compared.
    """
    own = getattr(layer, parameter, None)
    if not isinstance(own, Tensor):
        raise IncompatibleExpertError(
            f"{who}: holds a {parameter}, and the base's {type(layer).__name__} there has none. It "
            "was trained on another base."
        )
    if own.is_meta or not own.dtype.is_floating_point or own.dtype.itemsize < 2:
        why = "is not loaded here" if own.is_meta else "is quantised"
        raise UnsupportedAdapterError(
            f"{who}: holds a whole {parameter}, and the base's own {why}, so what differs cannot "
            "be told. Load the base in bfloat16 or float32."
        )
    if own.shape != stored.shape:
        raise IncompatibleExpertError(_other_shape(who, parameter, stored, own))
    return stored.detach().to(own.device, own.dtype).float() - own.detach().float()


def _other_shape(who: str, parameter: str, stored: Tensor, own: Tensor) -> str:
    found, wanted = list(stored.shape), list(own.shape)
    told = f"{who}: holds a {parameter} of {found}, the base's own is {wanted}."
    if len(found) == 2 and found[1:] == wanted[1:]:
        return (
            f"{told} It was trained with a vocabulary of another size. Give the base the same, by "
            f"model.resize_token_embeddings({found[0]}), and its tokenizer the new tokens."
        )
    return f"{told} It was trained on another base."


def embed_scale_of(layer: nn.Module) -> float:
    """What an embedding multiplies its rows by; 1 for most."""
    scale = getattr(layer, "embed_scale", None)
    return 1.0 if scale is None else float(scale)
