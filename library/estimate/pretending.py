"""A graphics card that is not there: tensors with sizes and no values, on which a training's own code runs.

torch's fake tensors know shapes, dtypes and devices. What they lack for a whole training step on a torch that was built
without CUDA is added here, for as long as `card` lasts:

- C++ asks a tensor's device guard for a stream, which such a torch does not have; so C++ is told that fake tensors
  on the meta device, and Python that they are on the card.
- torch.autocast turns itself off, and its C++ part passes over tensors of the meta device; so `_Functions` casts.
- Attention takes the kernel that an H100 would take, which keeps no matrix of all pairs.
- What the program wants to know of values is answered as in a training that goes well.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from library.models import swapping
from networks.deft_batch import BatchedFactors

CARD = torch.device("cuda:0")
KNOWN = 4096  # numbers

# CUDA's lists of torch.autocast (torch 2.13, ATen/autocast_mode.h): all of it that torch has as a function of Python,
# and what calls it by another name
LOWER = frozenset((
    "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "conv1d", "conv2d", "conv3d", "conv_tbc",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "einsum", "gru_cell", "linear",
    "lstm_cell", "matmul", "mm", "mv", "prelu", "rnn_relu_cell", "rnn_tanh_cell", "scaled_dot_product_attention",
    "__matmul__", "__rmatmul__",
))  # fmt: skip
FULL = frozenset((
    "acos", "asin", "binary_cross_entropy_with_logits", "cdist", "cosh", "cosine_embedding_loss", "cosine_similarity",
    "dist", "erfinv", "exp", "expm1", "frobenius_norm", "group_norm", "hinge_embedding_loss", "huber_loss", "kl_div",
    "l1_loss", "layer_norm", "log", "log10", "log1p", "log2", "logsumexp", "margin_ranking_loss", "mse_loss",
    "multi_margin_loss", "multilabel_margin_loss", "native_layer_norm", "nll_loss", "nuclear_norm", "pdist",
    "poisson_nll_loss", "pow", "reciprocal", "renorm", "rms_norm", "rsqrt", "sinh", "smooth_l1_loss",
    "soft_margin_loss", "softplus", "tan", "triplet_margin_loss",
    "__pow__", "__rpow__", "interpolate", "norm",
))  # fmt: skip
FULL_RESULT = frozenset(("cumprod", "cumsum", "log_softmax", "prod", "softmax", "sum"))


@contextlib.contextmanager
def card() -> Iterator[None]:
    """Within it, tensors that are made have no values, on the CPU and on `CARD` alike."""
    functions, backward = _Functions(), torch.autograd._engine_run_backward

    def run_backward(*given: Any, **named: Any) -> Any:  # functions that are called on the way, by checkpoints for one
        with functions:
            return backward(*given, **named)

    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (torch.autograd, "_engine_run_backward", run_backward),
            (torch.Tensor, "_make_subclass", _unlike(torch.Tensor._make_subclass)),
            (torch.Tensor, "pin_memory", lambda tensor: tensor),
            (nn.Module, "_apply", _applied),
            (BatchedFactors, "_is_possible", staticmethod(lambda module: True)),  # which wants plain parameters
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda: True),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (swapping, "group_of", _Moved),
            # the state of a card's random numbers is nothing that checkpoints could keep
            (torch.utils.checkpoint, "_get_device_module", lambda device="cuda": types.SimpleNamespace()),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        for name in ("cuda", "cpu", "meta"):
            is_so = property(functools.partial(_is_on, name))
            stack.enter_context(mock.patch.object(FakeTensor, f"is_{name}", is_so, create=True))
        # what Python has made of numbers stays known while it is small: lengths of texts decide sizes
        stack.enter_context(mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", KNOWN))
        stack.enter_context(_Fakes(allow_non_fake_inputs=True))
        stack.enter_context(functions)
        yield


class _Fakes(FakeTensorMode):
    """Tensors that C++ makes where others are, which it has been told are on the meta device, are on the card."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and device.type == "meta":
            kwargs = {**kwargs, "device": CARD}
        return super().dispatch(func, types, args, kwargs)


def filled(module: nn.Module, device: torch.device) -> None:
    """Takes a module from the meta device to one that `card` knows; weights that are one stay one."""
    _applied(module, lambda one: torch.empty_strided(one.size(), one.stride(), dtype=one.dtype, device=device))


class _Moved:
    """See `library.models.swapping.Group`."""

    def __init__(self, block: nn.Module, device: torch.device, stream: Any):
        self.block, self.device = block, device

    def onload_(self) -> None:
        _applied(self.block, lambda one: one.to(self.device))

    def offload_(self) -> None:
        _applied(self.block, lambda one: one.to("cpu"))


def _is_on(kind: str, tensor: Tensor) -> bool:
    return tensor.device.type == kind


def _unlike(make: Callable[..., Any]) -> Callable[..., Any]:
    def make_subclass(*given: Any, **named: Any) -> Any:
        if "dispatch_device" in named:
            named["dispatch_device"] = named["device_for_backend_keys"].type != CARD.type
        return make(*given, **named)

    return make_subclass


def _applied(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which cannot change a fake parameter in place: others come in their place."""
    changed: dict[int, tuple[Tensor, Any]] = {}

    def of(tensor: Tensor) -> Any:
        if id(tensor) not in changed:
            with torch.no_grad():
                moved = change(tensor)
            if isinstance(tensor, nn.Parameter) and moved is not tensor:
                moved = nn.Parameter(moved, tensor.requires_grad)
            changed[id(tensor)] = tensor, moved
        return changed[id(tensor)][1]

    for one in module.modules() if recurse else [module]:
        for kept in (one._parameters, one._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    kept[name] = of(tensor)
    return module


class _Functions(TorchFunctionMode):
    """What torch's functions do otherwise on the card: casts of autocast, and the kernel of attention."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in LOWER or name in FULL or name in FULL_RESULT:
            if torch.is_autocast_enabled("cuda"):
                args, kwargs = _cast(name, args, kwargs)
            if name == "scaled_dot_product_attention":
                return attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """As torch.autocast does it."""
    tensors = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    if not any(one.is_cuda for one in tensors):
        return args, kwargs
    if name in FULL_RESULT:
        wanted = any(isinstance(one, torch.dtype) for one in args) or kwargs.get("dtype") is not None
        return args, kwargs if wanted or not tensors[0].is_floating_point() else {**kwargs, "dtype": torch.float32}
    dtype = torch.get_autocast_dtype("cuda") if name in LOWER else torch.float32

    def cast(one: Any) -> Any:
        is_cast = isinstance(one, Tensor) and one.is_cuda and one.is_floating_point() and one.dtype != torch.float64
        return one.to(dtype) if is_cast else one

    return torch.utils._pytree.tree_map(cast, (args, kwargs))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by the kernel that torch takes on a card since Ampere: flash attention in half
    precision without a mask, else the memory-efficient one; both up to heads of 256 numbers."""
    if not query.is_cuda or query.dim() != 4:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    width = query.shape[-1]
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and width <= 256:
        rest = -width % 8  # which the kernel wants, and torch fills up
        if rest:
            query, key, value = (F.pad(one, (0, rest)) for one in (query, key, value))
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale or width**-0.5
        )
        return found[0][..., :width] if rest else found[0]
    bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # becomes a sum
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask.logical_not(), -torch.inf)
        rest = -attn_mask.shape[-1] % 16
        if rest:  # rows of the mask have to begin at multiples of 16 bytes
            attn_mask = F.pad(attn_mask, (0, rest))[..., : attn_mask.shape[-1]]
        bias = attn_mask.expand(*query.shape[:3], key.shape[2])
    keeps = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
    )
    return found[0]
