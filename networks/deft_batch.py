"""All adapted layers of a model at once: their factors before a forward pass, and their gradients after the backward.

A basis and its derivative are a dozen small operations: layer by layer they cost more than the layer's own update. Here
they are done for all layers of one shape together, once a pass. In between, layers work with factors that carry no
history, and so may be run again at any time (gradient checkpointing).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from networks import deft_math
from networks.deft_config import DeftError

if TYPE_CHECKING:
    from networks.deft_module import DeftModule

# E - E0 is of the size of a rate's steps, for float16 a little too small
FLOAT16_GAIN = 64.0


@dataclass
class Factors:
    """Of one pass: each layer's up and down in the compute dtype, without history.

    `changes` are the layers' (E - E0), in the compute dtype, as long as `down` is formed layer by layer.
    """

    dtype: torch.dtype
    up: dict[DeftModule, Tensor]
    down: dict[DeftModule, Tensor]
    changes: dict[DeftModule, Tensor]
    versions: list[int]


class BatchedFactors:
    """The factors and gradients of `modules`, which adapt layers of `root`; for basis qr.

    Factors live for one pass: until their gradients have come, until a layer is entered again outside a backward pass,
    or until `drop` is called; with dropout off and no gradients asked for, until a parameter changes. Optimizers change
    parameters in ways that no version counter or pointer shows, hence the caution.

    :param root: the model that is called; a hook on its output notices when a backward pass begins
    """

    def __init__(self, modules: Iterable[DeftModule], root: nn.Module):
        self.modules = list(modules)
        self.enabled = True
        # a leaf that every layer's graph ends in: backward() runs its node, autograd.grad() for P and R does not
        self.probe = torch.zeros((), requires_grad=True)
        self._probe_node = torch.autograd.graph.get_gradient_edge(self.probe).node
        self._factors: Factors | None = None
        self._entered: set[DeftModule] = set()
        self._collected: dict[DeftModule, list[Tensor]] = {}
        self._queued = False
        self._checked = False
        for module in self.modules:
            module.batch = self
        self._hook = root.register_forward_hook(self._watch_output)

    def remove(self) -> None:
        """Leaves the model and the modules as they were."""
        self._hook.remove()
        for module in self.modules:
            module.batch = None

    def drop(self) -> None:
        """Forgets the factors, whose parameters may have changed."""
        self._factors = None
        self._entered = set()

    def start_step(self) -> None:
        """Forgets the factors; and looks after bases where passes do without this class, as compiled ones do."""
        self.drop()
        if not self._checked:
            with torch.no_grad():
                self._bases(torch.float32)
        self._checked = False

    # --- forward ---------------------------------------------------------------------------------------------------

    def enter(self, module: DeftModule, dtype: torch.dtype) -> bool:
        """Called when a layer's forward begins; whether its factors in `dtype` are to be had here.

        Not in a graph that is being compiled, where P or R is split over processes (DeepSpeed's stage 3, FSDP), or
        within DistributedDataParallel's forward, which counts gradients as they come.
        """
        if not self.enabled or torch.compiler.is_compiling():
            return False
        if type(module.P) is not nn.Parameter or hasattr(module.P, "ds_id"):
            return False
        if torch.nn.parallel.DistributedDataParallel._active_ddp_module is not None:
            return False
        if torch._C._current_graph_task_id() == -1:  # not run again by a backward pass
            if self._queued:  # that backward pass ended in an exception
                self._queued, self._collected = False, {}
            if module in self._entered:  # a new pass
                if not self._still_valid(module):
                    self.drop()
                self._entered = set()
        if self._factors is None:
            self._factors = self._compute(dtype)
        self._entered.add(module)
        return self._factors.dtype == dtype

    def _still_valid(self, module: DeftModule) -> bool:
        assert self._factors is not None
        return not (module.training or torch.is_grad_enabled()) and self._factors.versions == self._versions()

    def _versions(self) -> list[int]:
        return [tensor._version for module in self.modules for tensor in (*module.parameters(), module.E0)]

    def of(self, module: DeftModule) -> tuple[Tensor, Tensor]:
        """A layer's up (m, r) and down (r, n) without history, in the compute dtype, scaled by `module.gain`; after
        `enter`. Their gradients go to `receive`."""
        factors = self._factors
        assert factors is not None
        if module not in factors.down:
            with torch.inference_mode(False), torch.no_grad():
                change = factors.changes[module]
                removed = change.mT @ module.weight_in(factors.dtype)
                factors.down[module] = self._down([module], removed.unsqueeze(0), factors.dtype)[0]
        return factors.up[module], factors.down[module]

    def _compute(self, dtype: torch.dtype) -> Factors:
        device = self.modules[0].P.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            up: dict[DeftModule, Tensor] = {}
            changes: dict[DeftModule, Tensor] = {}
            small = FLOAT16_GAIN if dtype == torch.float16 else 1.0
            for group, Q in self._bases(dtype):
                gain = group[0].gain(dtype)
                up.update(zip(group, (Q / gain if gain != 1 else Q).to(dtype).unbind(), strict=True))
                change = (Q - torch.stack([m.E0 for m in group])) * small
                changes.update(zip(group, change.to(dtype).unbind(), strict=True))
            factors = Factors(dtype, up, {}, changes, self._versions())
            # a weight that is not at hand now (block swap) is read when its layer's turn has come, and so are all
            # others then: one that is at hand may be on its way out
            if all(m.org_module.weight.device == m.P.device for m in self.modules):
                for group in _grouped(self.modules, lambda m: (m.target.shape, m.rank, m.R is None, m.R_factor)):
                    first = group[0]
                    removed = changes[first].new_empty(len(group), first.rank, first.target.shape[1])
                    for module, out in zip(group, removed, strict=True):
                        torch.mm(changes[module].mT, module.weight_in(dtype), out=out)
                    factors.down.update(zip(group, self._down(group, removed, dtype).unbind(), strict=True))
                factors.changes = {}
            return factors

    def _bases(self, dtype: torch.dtype) -> Iterator[tuple[list[DeftModule], Tensor]]:
        """Modules of one shape of P, and their Q (modules, m, r), after bases that have degenerated were mended."""
        groups = list(_grouped(self.modules, lambda m: (m.P.shape, m.gain(dtype))))
        found = [deft_math.cholesky_qr(torch.stack([m.P for m in group])) for group in groups]
        self._checked = True
        capturing = self.modules[0].P.is_cuda and torch.cuda.is_current_stream_capturing()
        independence = torch.cat([value for _, value in found])
        if not capturing and not bool((independence > deft_math.LEAST_INDEPENDENCE).all()):  # waits for the GPU
            flat = [module for group in groups for module in group]
            for module, value in zip(flat, independence.tolist(), strict=True):
                if value <= deft_math.LEAST_INDEPENDENCE:
                    module.mend_basis()
            found = [deft_math.cholesky_qr(torch.stack([m.P for m in group])) for group in groups]
        return zip(groups, (Q for Q, _ in found), strict=True)

    @staticmethod
    def _down(group: list[DeftModule], removed: Tensor, dtype: torch.dtype) -> Tensor:
        """down (modules, r, n) of modules alike: s R - (E - E0)^T W."""
        first = group[0]
        down = removed.float()
        if dtype == torch.float16:
            down = down / FLOAT16_GAIN
        down = -down if first.R is None else _injected(group) - down
        gain = first.gain(dtype)
        return (down * gain if gain != 1 else down).to(dtype)

    # --- backward --------------------------------------------------------------------------------------------------

    def _watch_output(self, root: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: the root's output is where a backward pass begins, before any checkpoint's own."""
        if torch.compiler.is_compiling():
            return
        with_history = [tensor for tensor in _tensors_of(output) if tensor.requires_grad]
        for tensor in with_history:
            tensor.register_hook(self._queue)
        if not with_history and any(module.training for module in self.modules):
            self.drop()

    def _queue(self, gradient: Tensor | None = None) -> None:
        """Has the backward pass that is under way call `_finish` at its end."""
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def receive(self, module: DeftModule, d_up: Tensor, d_down: Tensor) -> tuple[Tensor | None, ...]:
        """Takes a layer's gradients of the factors that `of` gave, within a backward pass.

        :returns: the gradients of P, R and g: None each when they come at the pass's end, as they do in `backward()`
        :raises DeftError: for second derivatives
        """
        if torch.is_grad_enabled():
            raise DeftError("second derivatives (create_graph=True): set `batched = False` on the DEFT network first")
        gain = module.gain(d_up.dtype)
        if module.P.requires_grad:
            d_up = _with_removal(module, d_up, d_down, gain)
        if gain != 1:
            d_down = d_down.float() * gain
        if torch._C._will_engine_execute_node(self._probe_node):
            kept = self._collected.get(module)
            if kept is None:
                self._collected[module] = [d_up, d_down]
            else:
                self._collected[module] = [kept[0].float() + d_up, kept[1].float() + d_down]
            self._queue()  # for a backward pass that does not begin at the root's output
            return None, None, None
        outputs, gradients = chain({module: [d_up, d_down]})
        parameters = [p for p in (module.P, module.R, module.g) if p is not None and p.requires_grad]
        found = torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)
        of = dict(zip(parameters, found, strict=True))
        return tuple(None if p is None else of.get(p) for p in (module.P, module.R, module.g))

    def _finish(self) -> None:
        self._queued = False
        collected, self._collected = self._collected, {}
        if not collected:
            return
        for module in self._entered - collected.keys():
            if module.config.module_dropout > 0:  # skipped here, maybe not in another process, which waits for its sum
                m, n = module.target.shape
                collected[module] = [module.P.new_zeros(m, module.rank), module.P.new_zeros(module.rank, n)]
        known = self._factors.up if self._factors is not None and self._factors.dtype == torch.float32 else {}
        self.drop()
        torch.autograd.backward(*chain(collected, known))


def chain(
    collected: Mapping[DeftModule, list[Tensor]], known: Mapping[DeftModule, Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """What P, R and g of all these modules become, with history, for modules of one shape at once; and its gradients.

    :param collected: the gradients of E (m, r), with -W d_down^T in it, and of down (r, n)
    :param known: each module's Q (m, r) in float32, where it is still there
    """
    outputs, gradients = [], []
    modules = list(collected)
    with torch.enable_grad(), torch.autocast(modules[0].P.device.type, enabled=False):
        turning = [module for module in modules if module.P.requires_grad]
        for group in _grouped(turning, lambda m: m.P.shape):
            Q = torch.stack([known[m] for m in group]) if known else None
            outputs.append(deft_math.orthonormal_basis(torch.stack([m.P for m in group]), False, Q))
            gradients.append(torch.stack([collected[m][0] for m in group]).float())
        filled = [m for m in modules if m.R is not None and (m.R.requires_grad or m.g is not None)]
        for group in _grouped(filled, lambda m: (m.target.shape, m.rank, m.R_factor)):
            outputs.append(_injected(group))
            gradients.append(torch.stack([collected[m][1] for m in group]).float())
    return outputs, gradients


def _injected(group: list[DeftModule]) -> Tensor:
    """s R of modules alike (modules, r, n)."""
    injections: list[Tensor] = [m.R for m in group if m.R is not None]
    gates: list[Tensor] = [m.g for m in group if m.g is not None]
    R = torch.stack(injections) * group[0].R_factor
    return R * torch.sigmoid(torch.stack(gates))[:, None, None] if gates else R


class Handover(torch.autograd.Function):
    """up and down without history on their way into a layer's own operations, and their gradients on their way back.

    Inputs: P, R, g, the probe, the batch, the module, up and down.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *_, ctx.batch, ctx.module, up, down = inputs
        return up, down

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grads[0]):
            return *ctx.batch.receive(ctx.module, *grads), *[None] * 5


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A backward pass that is called within autocast would compute in its dtype."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _with_removal(module: DeftModule, d_up: Tensor, d_down: Tensor, gain: float) -> Tensor:
    """The gradient of E: of up, which it is, and -W d_down^T; W is read here, where block swap has it."""
    W = module.weight_in(d_down.dtype)
    if d_down.dtype != torch.float16:
        return torch.addmm(d_up, W, d_down.mT, alpha=-1)
    return d_up.float() / gain - (W @ (d_down / FLOAT16_GAIN).mT).float() * (FLOAT16_GAIN * gain)


def _grouped(modules: Iterable[DeftModule], key: Callable[[DeftModule], Hashable]) -> Iterator[list[DeftModule]]:
    groups: dict[Hashable, list[DeftModule]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    return iter(groups.values())


def _tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: itself, or within tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors_of(part)
