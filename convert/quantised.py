"""Recognises checkpoints with quantised weights, which conversion does not read.

They have weights in other dtypes, and tensors of scales beside them.  A report of each of these
tensors would be long, and would not say what is wrong.
"""

from collections.abc import Container, Mapping

from convert.source import TensorInfo
from vl2jax.common.errors import clip

# Ends of the names of tensors beside (or in the place of) quantised weights, by method.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "fp8": (".weight_scale_inv", ".weight_scale", ".input_scale", ".activation_scale"),
    "bitsandbytes": (
        *(".weight.absmax", ".weight.quant_map", ".weight.nested_absmax"),
        *(".weight.nested_quant_map", ".quant_state", ".SCB", ".weight_format"),
        *(".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
    ),
    "GPTQ or AWQ": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "compressed-tensors": (".weight_packed", ".weight_shape", ".weight_zero_point"),
    "Quanto, HQQ or torchao": ("._data", "._scale", ".W_q", ".qdata", ".zero_point", "._shift"),
    "MXFP4": ("_blocks", "_scales"),
}
# Dtypes of quantised weights, with the method that a dtype alone means.
_DTYPES = {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), "fp8"),
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2"), "fp4 or fp6"),
    **dict.fromkeys(("I8", "U8"), "int8 or 4 bits"),
}


def describe_quantised(tensors: Mapping[str, TensorInfo], expected: Container[str]) -> str | None:
    """Describes the quantised weights of a checkpoint in one line; None if it has none.

    Args:
      tensors: the tensors of the checkpoint.
      expected: names of the model's tensors.
    """
    found: dict[str, list[str]] = {}
    for name, info in tensors.items():
        method = _DTYPES.get(info.dtype) if name in expected else _method(name)
        if method is not None:
            found.setdefault(method, []).append(name)
    if not found:
        return None
    several = [method for method in found if method in _NAMES] or list(found)
    count = sum(map(len, found.values()))
    first = next(name for names in found.values() for name in names)
    return (
        f"the weights are quantised ({' and '.join(several[:2])}: {count} tensors, such as"
        f" {clip(first, 120)} {tensors[first].dtype}), which is not supported: conversion reads"
        " F32, F16 and BF16; get the original weights, or dequantise them with the program that"
        " made them (sample.py --quantize int8 quantises a converted model)"
    )


def _method(name: str) -> str | None:
    """The method that writes tensors with such a name."""
    for method, ends in _NAMES.items():
        if name.endswith(ends):
            return method
    return None
