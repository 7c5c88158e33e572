"""Kinds of adapter: what the tensors of one layer make of its weight, whoever wrote them.

With s = alpha / rank, weights flattened to (m, n), and the writers' own letters:

    LoRA     s up down                           Factors; with a core `mid` between them also
    LoHa     s (a1 b1) * (a2 b2), by elements    Factors of rank r1 r2 where that is small, else Dense
    LoKr     s (w1 kron w2)                      Factors of rank r1 r2 where that is small, else Dense
    full     the difference itself               Dense
    GLoRA    s (W a1 a2 + b1 b2)                 OnBase
    (IA)^3   W by a factor a row or a column     OnBase
    OFT      blocks' rotations of rows (LyCORIS, sd-scripts) or of columns (peft, OneTrainer)   OnBase
    BOFT     several such, between permutations  OnBase
    DoRA     any of the first four, W + delta brought to learnt lengths of rows or columns      OnBase
    DEFT     `deft_math`                         Factors where nothing is taken out, else OnBase

Formulas as in LyCORIS f49d30d (lycoris/modules, as its networks run them: `get_diff_weight` of its LoHa and LoKr has s
twice), ComfyUI's comfy/weight_adapter, peft 0.21 and OneTrainer's LoRAModule.py; they differ where it is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from networks import deft_io, deft_math
from networks.deft_factors import Factors
from networks.deft_io import DeftLayer

LARGEST_RANK = 256  # of the factors that a LoHa or LoKr is given as; a weight's smaller half side is the other limit


@dataclass(frozen=True)
class Dense:
    """A change of one weight that is no product of two small matrices, or not exactly.

    :param kind: in words, for what is said of it
    :param shape: the weight's (m, in[, kh, kw])
    :param delta: makes it (m, n), float32, anew each time
    """

    kind: str
    shape: tuple[int, ...]
    delta: Callable[[], Tensor]


@dataclass(frozen=True)
class OnBase:
    """A change that depends on the base model's weight.

    :param kind: in words, for what is said of it
    :param shape: the weight's (m, in[, kh, kw]); n in one number, and 0, where a file does not tell
    :param delta: of the weight W (m, n), float32, makes the change (m, n)
    :param together: key names, where the change depends on the weights of several layers, stacked in this order
    :param of_all: of those, stacked, makes the change (m, n) of this one; `delta` then refuses
    """

    kind: str
    shape: tuple[int, ...]
    delta: Callable[[Tensor], Tensor]
    together: tuple[str, ...] = ()
    of_all: Callable[[Tensor], Tensor] | None = None


Change: TypeAlias = Factors | Dense | OnBase
Parts: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Facts:
    """What stands beside a layer's tensors.

    :param config: of peft, for the layer's model
    :param path: of the layer in its model, with the dots that its file has
    :param rank: that peft's configuration has for the layer
    :param module: `ss_network_module`
    :param recorded: deft_io's record of the layer
    :param kernel: (kh, kw) of a convolution, where files of matrices alone leave it to be known
    """

    config: Mapping[str, object] = field(default_factory=dict)
    path: str = ""
    rank: int | None = None
    module: str = ""
    recorded: tuple[int, float, int] | None = None
    kernel: tuple[int, int] | None = None


@dataclass(frozen=True)
class Kind:
    """:param sign: the tensor by which a layer is of this kind
    :param make: takes out of a layer's tensors what it uses
    :raises KeyError: (`make`) with the name of a tensor that is missing
    :raises ValueError: (`make`) when the tensors do not fit each other
    """

    name: str
    sign: str
    make: Callable[[Parts, Facts], Change]


def change_of(parts: Mapping[str, Tensor], facts: Facts) -> Change:
    """What the tensors of one layer make of its weight.

    :raises KeyError: with the name of a tensor that is missing, or that no kind has
    :raises ValueError: when the tensors are empty, not finite or do not fit each other
    """
    rest = dict(parts)
    for name, tensor in rest.items():
        deft_io.check_values(name, tensor)
    kind = next((kind for kind in KINDS if kind.sign in rest), None)
    if kind is None:
        raise KeyError(next(iter(rest)))
    lengths = rest.pop("dora_scale", None)
    change = kind.make(rest, facts)
    if rest:
        raise KeyError(next(iter(rest)))
    return change if lengths is None else _dora(change, lengths.float())


def _matrix(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where a matrix is expected")
    return tensor.float().flatten(1)


def _number(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"{tensor.numel()} values where one is expected")
    return float(tensor)


def _scale(parts: Parts, rank: int) -> float:
    """alpha / rank; 1 without an alpha, and, as kohya's programs have it, with an alpha of 0."""
    alpha = parts.pop("alpha", None)
    return 1.0 if alpha is None else (_number(alpha) or rank) / rank


def _kernel_of(n: int, facts: Facts) -> tuple[int, ...]:
    """A weight's shape behind its outputs, for n columns."""
    size = math.prod(facts.kernel or (1,))
    return (n // size, *facts.kernel) if facts.kernel and n % size == 0 else (n,)


def _fits(condition: bool, *tensors: Tensor) -> None:
    if not condition:
        raise ValueError(" and ".join(str(tuple(tensor.shape)) for tensor in tensors) + " do not fit")


def _lora(parts: Parts, facts: Facts) -> Change:
    mid = parts.pop("lora_mid.weight", None)
    if mid is not None:
        down = _matrix(parts["lora_down.weight"])
        _fits(mid.dim() > 2 and mid.shape[1] == down.shape[0], mid, down)
        parts["lora_down.weight"] = torch.einsum("ij...,jn->in...", mid.float(), down)
    names = ("lora_up.weight", "lora_down.weight", "alpha")
    gate = parts.pop("deft_g", None)  # the authors' additive form
    layer = deft_io.checked_layer({name: parts.pop(name) for name in list(parts) if name in names}, facts.recorded)
    assert isinstance(layer, Factors)
    return layer if gate is None else replace(layer, up=layer.up * torch.sigmoid(gate.float()))


def _loha(parts: Parts, facts: Facts) -> Change:
    pairs: list[tuple[Tensor, Tensor]] = []
    rank, kernel = 0, tuple[int, ...]()
    for k in "12":
        a, b, core = parts.pop(f"hada_w{k}_a"), parts.pop(f"hada_w{k}_b"), parts.pop(f"hada_t{k}", None)
        rank = b.shape[0]
        if core is None:  # OneTrainer has convolutions' own shapes
            up, down = _matrix(a), _matrix(b)
            kernel = tuple(b.shape[1:]) if b.dim() > 2 else _kernel_of(b.shape[1], facts)
        else:
            up, down, kernel = _cored(core, a, b)
        _fits(up.shape[1] == down.shape[0], up, down)
        pairs.append((up, down))
    (up1, down1), (up2, down2) = pairs
    _fits(up1.shape[0] == up2.shape[0] and down1.shape[1] == down2.shape[1], up1, up2, down1, down2)
    scale, m = _scale(parts, rank), up1.shape[0]
    if up1.shape[1] * up2.shape[1] <= _rank_limit(m, down1.shape[1]):  # face-splitting products
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        return Factors(up, scale * (down1[:, None] * down2[None]).flatten(0, 1), kernel)
    return Dense("LoHa", (m, *kernel), lambda: (up1 @ down1) * (up2 @ down2) * scale)


def _cored(core: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """up (m, r) and down (r, n) of a product with a core (r, r, kh, kw) between a (r, m) and b (r, in)."""
    fitting = core.dim() > 2 and a.dim() == b.dim() == 2 and core.shape[:2] == (a.shape[0], b.shape[0])
    _fits(fitting, core, a, b)
    down = torch.einsum("ij...,jn->in...", core.float(), b.float())
    return a.float().mT.contiguous(), down.flatten(1), tuple(down.shape[1:])


def _rank_limit(m: int, n: int) -> int:
    return min(LARGEST_RANK, min(m, n) // 2)


def _lokr(parts: Parts, facts: Facts) -> Change:
    rank = facts.rank
    left, left_rank = _lokr_half(parts, "lokr_w1")
    core = parts.pop("lokr_t2", None)
    if core is not None:
        up, down, inner = _cored(core, parts.pop("lokr_w2_a"), parts.pop("lokr_w2_b"))
        right, right_rank, kernel = (up, down), up.shape[1], inner
    else:
        whole = parts.get("lokr_w2")
        if whole is None and parts["lokr_w2_b"].dim() > 2:
            whole = parts["lokr_w2_b"]
        right, right_rank = _lokr_half(parts, "lokr_w2")
        kernel = tuple(whole.shape[1:]) if whole is not None and whole.dim() > 2 else (right[1].shape[1],)
    # files' own rank is the smaller matrices'; where both are whole, LyCORIS and ComfyUI take s = 1, and peft alpha / r
    inner_rank = rank or left_rank or right_rank
    alpha = parts.pop("alpha", None)
    scale = 1.0 if alpha is None or not inner_rank else (_number(alpha) or inner_rank) / inner_rank
    columns = left[1].shape[1]
    kernel = _kernel_of(columns * kernel[0], facts) if len(kernel) == 1 else (columns * kernel[0], *kernel[1:])
    return _kronecker(left, right, scale, kernel)


def _lokr_half(parts: Parts, name: str) -> tuple[tuple[Tensor, Tensor], int]:
    """One side of the product as two factors, and their rank, 0 of a whole matrix."""
    if name in parts:
        whole = _matrix(parts.pop(name))
        ones = torch.eye(min(whole.shape))
        return ((ones, whole) if whole.shape[0] <= whole.shape[1] else (whole, ones)), 0
    a, b = _matrix(parts.pop(f"{name}_a")), _matrix(parts.pop(f"{name}_b"))
    _fits(a.shape[1] == b.shape[0], a, b)
    return (a, b), b.shape[0]


def _kronecker(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], scale: float, kernel: tuple[int, ...]
) -> Change:
    """(a1 b1) kron (a2 b2) is (a1 kron a2) (b1 kron b2)."""
    m, n = left[0].shape[0] * right[0].shape[0], left[1].shape[1] * right[1].shape[1]
    if left[0].shape[1] * right[0].shape[1] <= _rank_limit(m, n):
        return Factors(torch.kron(left[0], right[0]), scale * torch.kron(left[1], right[1]), kernel)
    return Dense("LoKr", (m, *kernel), lambda: torch.kron(left[0] @ left[1], scale * (right[0] @ right[1])))


def _full(parts: Parts, facts: Facts) -> Change:
    difference = parts.pop("diff")
    _matrix(difference)
    return Dense("full difference", tuple(difference.shape), lambda: difference.float().flatten(1))


def _replaced(parts: Parts, facts: Facts) -> Change:
    weight = parts.pop("set_weight")
    _matrix(weight)
    return OnBase("weight set anew", tuple(weight.shape), lambda W: weight.float().flatten(1) - W)


def _glora(parts: Parts, facts: Facts) -> Change:
    """a1 acts on a convolution's inputs alone. ComfyUI knows an older form too, transposed, which is refused."""
    a1, a2, b1, b2 = (parts.pop(f"{name}.weight") for name in ("a1", "a2", "b1", "b2"))
    A1, A2, B1 = _matrix(a1), _matrix(a2), _matrix(b1)
    core = parts.pop("bm.weight", None)
    B2 = b2.float() if core is None else torch.einsum("ij...,jn->in...", core.float(), _matrix(b2))
    fitting = A1.shape[1] == A2.shape[0] and A1.shape[0] == A2.shape[1] == B2.shape[1] and B1.shape[1] == B2.shape[0]
    _fits(fitting, a1, a2, b1, b2)
    scale = _scale(parts, A2.shape[0])

    def delta(W: Tensor) -> Tensor:
        removed = torch.einsum("oi...,ij->oj...", W.reshape(len(W), A1.shape[0], -1), (A1 @ A2).to(W))
        return scale * (removed.flatten(1) + B1.to(W) @ B2.flatten(1).to(W))

    return OnBase("GLoRA", (B1.shape[0], *B2.shape[1:]), delta)


def _ia3(parts: Parts, facts: Facts) -> Change:
    factors, on_input = parts.pop("weight").float().flatten(), bool(_number(parts.pop("on_input")))
    return _stretched(factors, on_input, facts.kernel or ())


def _peft_ia3(parts: Parts, facts: Facts) -> Change:
    """peft's vector is the factor itself, (1, in) or (out, 1), of a convolution (1, in or out, 1, 1)."""
    vector = parts.pop("ia3_l")
    on_input = vector.shape[0] == 1
    if vector.dim() > 2:
        patterns = facts.config.get("feedforward_modules") or []
        ends = isinstance(patterns, list | tuple) and any(facts.path.endswith(str(end)) for end in patterns)
        on_input = ends or (isinstance(patterns, str) and re.fullmatch(patterns, facts.path) is not None)
    factors = vector.float().flatten() - 1
    if vector.dim() > 2 and facts.kernel is None:  # a convolution's, of a size that only the weight tells
        return _stretched(factors, on_input, (0, 0))
    return _stretched(factors, on_input, facts.kernel or ())


def _stretched(factors: Tensor, on_input: bool, kernel: tuple[int, ...]) -> OnBase:
    """W with its rows, or its inputs, longer by these parts of them.

    :param kernel: (kh, kw) of a convolution, zeros where it is not known
    """
    shape: tuple[int, ...] = (0, len(factors), *kernel) if on_input else (len(factors), 0)

    def delta(W: Tensor) -> Tensor:
        if not on_input:
            return W * factors.to(W)[:, None]
        return (W.reshape(len(W), len(factors), -1) * factors.to(W)[:, None]).flatten(1)

    return OnBase("(IA)^3", shape, delta)


def _rotations(blocks: Tensor, limit: float) -> Tensor:
    """Cayley's (I + Q) (I - Q)^-1 with Q = B - B^T, its norm at most `limit` if that is not 0."""
    _fits(blocks.dim() >= 3 and blocks.shape[-1] == blocks.shape[-2], blocks)
    Q = blocks.float() - blocks.float().mT
    norm = Q.norm() + 1e-8
    if limit > 0 and norm > limit:
        Q = Q * (limit / norm)
    ones = torch.eye(Q.shape[-1])
    return torch.linalg.solve(ones - Q, ones + Q, left=False)


def _oft(parts: Parts, facts: Facts) -> Change:
    """LyCORIS' diag-oft and sd-scripts' networks.oft: R^T W for each block of rows; alpha, times m, limits ||Q||.

    ComfyUI takes alpha without m as the limit.
    """
    blocks, rescale = parts.pop("oft_blocks"), parts.pop("rescale", None)
    m = blocks.shape[-3] * blocks.shape[-1]
    alpha = parts.pop("alpha", None)
    R = _rotations(blocks, 0.0 if alpha is None else _number(alpha) * m)
    if blocks.dim() == 4:
        return _boft(R, rescale)
    stretch = _row_factors(rescale, m)

    def delta(W: Tensor) -> Tensor:
        turned = torch.einsum("knm,knj->kmj", R.to(W), W.reshape(*R.shape[:2], -1)).reshape(W.shape)
        return turned * stretch.to(W) - W

    return OnBase("OFT", (m, 0), delta)


def _row_factors(rescale: Tensor | None, m: int) -> Tensor:
    """Rows' factors (m, 1)."""
    if rescale is None:
        return torch.ones(m, 1)
    _fits(rescale.numel() == m, rescale)
    return rescale.float().reshape(m, 1)


def _boft(R: Tensor, rescale: Tensor | None) -> OnBase:
    """LyCORIS' BOFT: R (stages, blocks, b, b), each stage between a permutation and its inverse."""
    stages, _, b, _ = R.shape
    m = R.shape[1] * b
    stretch = _row_factors(rescale, m)
    if m % (2 ** (stages - 1) * b):
        raise ValueError(f"{stages} stages of blocks of {b} do not fit {m} rows")

    def delta(W: Tensor) -> Tensor:
        turned = W
        for stage in range(stages):
            k = 2**stage * (b // 2)
            mixed = turned.reshape(-1, 2, k, W.shape[1]).transpose(1, 2).reshape(-1, b, W.shape[1])
            mixed = R[stage].to(W) @ mixed
            turned = mixed.reshape(-1, k, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)
        return turned * stretch.to(W) - W

    return OnBase("BOFT", (m, 0), delta)


def _oft_of_inputs(parts: Parts, facts: Facts) -> Change:
    """peft's and OneTrainer's OFT: W R^T for each block of columns, R from the upper triangle of a skew Q.

    OneTrainer's convolutions have W R instead. Its files and peft's default take five terms of Neumann's series.
    """
    vectors = parts.pop("oft_R").float()
    scaled = "scaled_oft" in parts and bool(_number(parts.pop("scaled_oft")))
    parts.pop("alpha", None)
    elements = vectors.shape[-1]
    b = (1 + math.isqrt(1 + 8 * elements)) // 2
    _fits(vectors.dim() == 2 and b * (b - 1) // 2 == elements, vectors)
    if facts.config.get("coft"):
        vectors = _near_identity(vectors, float(str(facts.config.get("eps", 6e-5))))
    if scaled:
        vectors = vectors / (2 * math.sqrt(b - 1))
    Q = vectors.new_zeros(len(vectors), b, b)
    rows, columns = torch.triu_indices(b, b, 1)
    Q[:, rows, columns] = vectors
    Q = Q - Q.mT
    ones = torch.eye(b)
    if facts.config.get("use_cayley_neumann", True):
        R = _neumann(Q, int(str(facts.config.get("num_cayley_neumann_terms", 5))))
    else:
        R = torch.linalg.solve(ones + Q, ones - Q, left=False)
    of_peft = bool(facts.config) or facts.kernel is None
    turn = R.mT if of_peft else R

    def delta(W: Tensor) -> Tensor:
        blocks = W.reshape(len(W), -1, b)
        return torch.einsum("ork,rkc->orc", blocks, turn.to(W).expand(blocks.shape[1], b, b)).reshape(W.shape) - W

    shared = len(vectors) == 1
    return OnBase("OFT", (0, 0 if shared else len(vectors) * b), delta)


def _neumann(Q: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q^2 + ... + Q^(terms - 1), the last one once, as peft has it."""
    R = torch.eye(Q.shape[-1]).expand_as(Q).clone()
    if terms <= 1:
        return R
    R = R + 2 * Q
    if terms <= 2:
        return R
    power = Q @ Q
    R = R + 2 * power
    for _ in range(3, terms - 1):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q


def _near_identity(vectors: Tensor, eps: float) -> Tensor:
    """peft's constrained OFT: no block's Q longer than eps / sqrt(blocks)."""
    limit = eps / math.sqrt(len(vectors))
    norms = math.sqrt(2) * vectors.norm(dim=1, keepdim=True)
    return torch.where(norms <= limit, vectors, limit * vectors / norms.clamp(min=1e-30))


def _dora(change: Change, lengths: Tensor) -> OnBase:
    """(W + delta) with rows, or columns of inputs, brought to these lengths: (m, 1, ...), or (1, in, ...)."""
    on_input = lengths.shape[0] == 1 and lengths.numel() > 1
    m = change.shape[0]
    if not on_input:
        _fits(lengths.numel() == m, lengths)
    else:
        _fits(lengths.dim() >= 2 and lengths.numel() == lengths.shape[1], lengths)

    def delta(W: Tensor) -> Tensor:
        found = change.delta(W) if isinstance(change, OnBase) else change.delta().to(W)
        new = (W + found).reshape(m, lengths.shape[1] if on_input else 1, -1)
        norm = new.norm(dim=(0, 2), keepdim=True) if on_input else new.norm(dim=(1, 2), keepdim=True)
        target = lengths.to(W).reshape(1, -1, 1) if on_input else lengths.to(W).reshape(-1, 1, 1)
        return (new * (target / norm.clamp(min=torch.finfo(W.dtype).tiny))).reshape(W.shape) - W

    return OnBase("DoRA", change.shape, delta)


def _deft(parts: Parts, facts: Facts) -> Change:
    """Our own `save_format=deft`, peft's DEFT, and the authors' in peft's names."""
    if "deft_E0" in parts:
        layer = deft_io.checked_layer({name: parts.pop(name) for name in list(parts)}, facts.recorded)
        assert isinstance(layer, DeftLayer)
        return of_deft_layer(layer)
    P, R, gate = parts.pop("deft_P").float(), parts.pop("deft_R", None), parts.pop("deft_g", None)
    frozen = parts.pop("deft_Q", None)  # the authors' Q of the start, which they keep unless told otherwise
    alpha = parts.pop("alpha", None)
    scale = 1.0 if alpha is None else _number(alpha) / P.shape[1]
    basis = str(facts.config.get("decomposition_method", "relu"))
    if basis not in ("relu", "qr", "svd"):
        raise ValueError(f"decomposition_method {basis} is not known")
    R = None if facts.config.get("para") or R is None else R.float()
    _fits(P.dim() == 2 and (R is None or R.shape[:1] == P.shape[1:]), P)
    if basis != "relu":
        theirs = _lapack(P, basis) if frozen is None else frozen.float()
        _fits(theirs.shape == P.shape, theirs, P)
        P, basis = (P, basis) if frozen is None else (theirs, "qr")  # which leaves what is orthonormal as it is
        R = R if R is None else R * _signs(theirs, deft_math.left_and_eraser(P, basis)[0])[:, None]
    return of_deft_layer(DeftLayer(basis, P, R, torch.zeros_like(P), scale, gate))


def _lapack(P: Tensor, basis: str) -> Tensor:
    """peft's and the authors' Q or U."""
    return torch.linalg.qr(P)[0] if basis == "qr" else torch.linalg.svd(P, full_matrices=False)[0]


def _signs(theirs: Tensor, ours: Tensor) -> Tensor:
    """1 or -1 for each column: the sign of Q's is part of Q R."""
    return torch.where((theirs * ours).sum(0) < 0, -1.0, 1.0)


def of_deft_layer(layer: DeftLayer) -> Change:
    """A layer of a DEFT: a LoRA where nothing of W is taken out."""
    m = layer.E0.shape[0]
    if layer.R is not None and not layer.removes:
        up, down = deft_io.factors_of(layer, lambda: torch.zeros(m, layer.R.shape[1]))  # type: ignore[union-attr]
        return Factors(up.detach(), down.detach(), (down.shape[1],))

    def delta(W: Tensor) -> Tensor:
        up, down = deft_io.factors_of(layer, lambda: W)
        return (up @ down).detach()

    return OnBase("DEFT" if layer.R is not None else "PaRa", (m, 0 if layer.R is None else layer.R.shape[1]), delta)


KINDS = (
    Kind("LoRA", "lora_down.weight", _lora),
    Kind("LoHa", "hada_w1_a", _loha),
    Kind("LoKr", "lokr_w1", _lokr),
    Kind("LoKr", "lokr_w1_a", _lokr),
    Kind("full", "diff", _full),
    Kind("full", "set_weight", _replaced),
    Kind("GLoRA", "a1.weight", _glora),
    Kind("(IA)^3", "on_input", _ia3),
    Kind("(IA)^3", "ia3_l", _peft_ia3),
    Kind("OFT", "oft_blocks", _oft),
    Kind("OFT", "oft_R", _oft_of_inputs),
    *(Kind("DEFT", f"deft_P{basis}", _deft) for basis in ("", "_svd", "_relu", "_none", "_tsvd", "_nmf")),
)
