"""From one number format to another; counts the values that become infinite."""

from __future__ import annotations

import numpy as np

from scripts.weights.safetensors import ITEM_BYTES, Raw


def cast(values: Raw, source: str, target: str) -> Raw:
    """Raw numbers of one safetensors dtype -> raw numbers of another, rounded to nearest even as torch does;
    NaN stays NaN.

    Too large a value becomes infinity, as in torch; the caller looks for that (see infinite).
    """
    if source == target:
        return values
    if source == "F16":
        single = values.view(np.float16).astype(np.float32).view(np.uint32)
    elif source == "BF16":
        single = np.left_shift(values, 16, dtype=np.uint32)
    else:
        single = values
    if target == "F32":
        return single
    if target == "F16":
        with np.errstate(over="ignore"):
            return single.view(np.float32).astype(np.float16).view(np.uint16)
    # Round to nearest even: add just under half of the last kept bit, and one more if that bit is set. A value that
    # came from F16 is exact or rounds the same way.
    rounded = ((single + (0x7FFF + ((single >> 16) & 1))) >> 16).astype(np.uint16)
    if infinite(
        single, "F32"
    ):  # if all bits of a NaN are set, the carry would run through the exponent and leave a zero
        nan = (single & 0x7FFFFFFF) > 0x7F800000
        rounded[nan] = (single[nan] >> 16) | 0x40
    return rounded


def infinite(values: Raw, dtype: str) -> int:
    """How many raw numbers are NaN or infinite: all bits of the exponent are set."""
    exponent = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}[dtype]
    sign = 1 << (8 * ITEM_BYTES[dtype] - 1)
    # First the two maxima: they take no memory, and nearly always they give the answer. A positive NaN or infinity is
    # the largest of the signed numbers; a negative one is the largest of the unsigned numbers.
    if values.view(f"i{values.itemsize}").max(initial=0) < exponent and values.max(initial=0) < sign | exponent:
        return 0
    return int(np.count_nonzero((values & values.dtype.type(sign - 1)) >= exponent))
