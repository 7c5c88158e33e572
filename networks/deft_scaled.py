"""Numbers in few bits: scales beside 8-bit weights, and rounding to a dtype, to nearest or stochastically.

A scaled weight is W = stored * scale, with one scale a tensor, one a row, or one a block of a row's inputs. What
programs write: ComfyUI `<layer>.scale_weight` with a key `scaled_fp8`, and later `<layer>.weight_scale` with
`<layer>.comfy_quant` (JSON in bytes) or the metadata's `_quantization_metadata`; musubi-tuner
(fp8_optimization_utils.py, 30c658c) `<layer>.scale_weight` of shape (1,), (m, 1) or (m, blocks, 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8)
SCALE_ENDINGS = (".scale_weight", ".weight_scale")  # behind a layer's path
# what else comes with scaled weights and goes with them: scales of inputs, marks
COMPANIONS = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant|scale_weight|weight_scale)")
KNOWN_FORMATS = ("float8_e4m3fn", "float8_e5m2")  # of ComfyUI's marks
# keys of quantised forms that are not read
_UNKNOWN = re.compile(
    r".*\.(absmax|quant_map|nested_absmax|quant_state\..*|SCB|qweight|qzeros|wscales|wtscale|smooth_factor"
    r"|weight_scale_2|weight_scale_inv|weight_zero_point|weight_packed)"
)
_SMALLEST = 1e-12  # of a scale: a layer of zeros


@dataclass(frozen=True)
class Scale:
    """The scales of one weight.

    :param key: the tensor's that holds them
    :param shape: that tensor's
    :param blocks: how many a row; 0 for one scale of the whole tensor
    """

    key: str
    shape: tuple[int, ...]
    blocks: int


def unknown_form(keys: Iterable[str]) -> str | None:
    """A key by which weights are seen to be quantised in a way that is not read here."""
    return next((key for key in keys if _UNKNOWN.fullmatch(key)), None)


def find(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Scale]:
    """Key of a weight -> its scales.

    :raises ValueError: naming the key, when their shape is none of the known
    """
    found = {}
    for key, shape in shapes.items():
        ending = next((ending for ending in SCALE_ENDINGS if key.endswith(ending)), "")
        weight = f"{key.removesuffix(ending)}.weight" if ending else ""
        if weight in shapes:
            found[weight] = Scale(key, shape, _blocks(key, shape, shapes[weight]))
    return found


def _blocks(key: str, scale: tuple[int, ...], weight: tuple[int, ...]) -> int:
    if math.prod(scale) == 1:
        return 0
    inner = math.prod(scale[1:])
    fits = bool(weight) and inner > 0 and scale[0] == weight[0] and math.prod(weight[1:]) % inner == 0
    if not fits or (inner > 1 and tuple(size for size in scale[1:] if size != 1) != (inner,)):
        raise ValueError(f"{key}: scales of shape {scale} for a weight of {weight} are not known here")
    return inner


def to_float(stored: Tensor, values: Tensor) -> None:
    """Copies into a tensor of float32; of fp8 by its bits, which is five times as fast as torch's conversion.

    e5m2 is the upper half of a float16; e4m3fn's exponent is less than float16's by 8, and its NaN alone is another.
    """
    if stored.dtype not in FP8:
        values.copy_(stored)
        return
    bits = stored.view(torch.int8).to(torch.int16)
    if stored.dtype == torch.float8_e5m2:
        values.copy_(bits.bitwise_left_shift_(8).view(torch.float16))
        return
    nan = (stored.view(torch.uint8).bitwise_and(0x7F) == 0x7F) if stored.numel() else None
    values.copy_(bits.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)).mul_(256.0)
    if nan is not None and nan.any():
        values[nan] = torch.nan


def times(values: Tensor, scales: Tensor, blocks: int) -> Tensor:
    """Rows (rows, ...) of a weight times their scales, or the whole's one, in place."""
    if blocks == 0:
        return values.mul_(scales.reshape(()))
    rows = values.shape[0]
    values.view(rows, blocks, -1).mul_(scales.reshape(rows, blocks, 1))
    return values


def made(values: Tensor, blocks: int, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Scales for some rows (rows, ...) of a weight, or for the whole where `blocks` is 0, in the scales' dtype."""
    largest = values.abs().amax() if blocks == 0 else values.reshape(values.shape[0], blocks, -1).abs().amax(2)
    scales = (largest / torch.finfo(stored).max).clamp_(min=_SMALLEST)
    rounded = scales.to(dtype)
    return torch.where(rounded > 0, rounded, torch.finfo(dtype).tiny)


def rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Float32 values in another dtype, to nearest, or up or down by chance so that the mean is right.

    8-bit values beyond the largest are the largest; in other dtypes they overflow as in torch.
    """
    if dtype in FP8:
        largest = torch.finfo(dtype).max
        values = values.clamp(-largest, largest)
    nearest = values.to(dtype)
    if generator is None or dtype.itemsize > 2:
        return nearest
    # the neighbour on the other side of the value, one step of the magnitude's bits away
    bits = nearest.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    back = nearest.float()
    step = torch.where(values.abs() > back.abs(), 1, -1).to(bits.dtype)
    other = (bits + step).view(dtype).float()
    share = ((values - back) / (other - back)).nan_to_num_(0.0, 0.0, 0.0)  # 0 / 0 where it is exact or at the end
    chance = torch.rand(values.shape, generator=generator)
    return torch.where(chance < share, (bits + step), bits).view(dtype)
