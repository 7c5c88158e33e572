"""All adapted layers of a model at once: their factors before a forward pass, and their gradients after the backward.

A basis and its derivative are a dozen small operations: layer by layer they cost more than the layer's own update. Here
they are done for all layers of one shape together, once a pass. In between, layers work with factors that carry no
history, and so may be run again at any time (gradient checkpointing).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks import deft_math
from networks.deft_autograd import LayerFactors
from networks.deft_compiled import GivenFactors
from networks.deft_config import DeftError
from networks.deft_late import Late
from networks.deft_module import DeftModule, Share

logger = logging.getLogger(__name__)

# E - E0 is of the size of a rate's steps, for float16 a little too small
FLOAT16_GAIN = 64.0
# so many numbers of P or R at a time: a dozen intermediate results of their size are alive
AT_ONCE = 2**24


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
        self._removal = self.modules[0].config.removal
        self.group()
        self._make_probe()
        self._factors: dict[DeftModule | Share, LayerFactors] | None = None  # of modules, and of their shares
        self._dtype = torch.float32
        self._versions_then: list[int] = []
        self._collected: dict[DeftModule, list[Tensor]] = {}
        self._queued = False
        self._checked = self._ahead = False
        self._independence: Late | None = None  # of a pass's bases, not read yet
        self._told_renewal = False
        for module in self.modules:
            module.batch = self
        self._hook = root.register_forward_hook(self._watch_output)
        self._given = GivenFactors(self, root)

    def group(self) -> None:
        """Finds modules that are alike on P's side, and on R's; again where directions to keep have come."""
        self._P_groups = _grouped(self.modules, lambda m: m.P.shape, lambda m: m.P.numel())
        self._R_groups = _grouped(self.modules, _R_likeness, lambda m: m.rank * m.target.shape[1])

    def _make_probe(self) -> None:
        """A leaf that every layer's graph ends in: backward() runs its node, autograd.grad() for P and R does not."""
        self._probe = torch.zeros((), requires_grad=True)
        self._probe_node: Any = torch.autograd.graph.get_gradient_edge(self._probe).node

    def __getstate__(self) -> dict[str, Any]:
        """For copies of an adapted model, between passes."""
        unset = dict.fromkeys(("_probe", "_probe_node", "_factors", "_independence"))
        return self.__dict__ | unset | {"_collected": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_probe()

    def remove(self) -> None:
        """Leaves the model and the modules as they were."""
        self._hook.remove()
        self._given.remove()
        for module in self.modules:
            module.batch = None

    def drop(self) -> None:
        """Forgets the factors, whose parameters may have changed."""
        self._factors = None
        self._given.forget()

    def start_step(self, ahead: bool = False) -> None:
        """Forgets the factors; and looks after bases where passes do without this class, as compiled ones do.

        :param ahead: see `DeftNetwork.runs_ahead`
        """
        self.drop()
        self._given.start_step()
        late, self._independence = self._independence, None
        if ahead and late is not None:
            with torch.no_grad():
                self._mend(late.read())
        self._ahead = False  # parts of the model that form their own bases would not leave a step out
        self.check()
        self._checked, self._ahead = False, ahead

    def check(self) -> None:
        """Looks after bases, unless a pass has done so."""
        if not self._checked:
            with torch.no_grad():
                self._bases()

    # --- forward ---------------------------------------------------------------------------------------------------

    def enter(self, module: DeftModule | Share, dtype: torch.dtype) -> LayerFactors | None:
        """A layer's factors in `dtype`, as its forward begins, or None where it has to form its own.

        That is so in a graph that is being compiled, in another dtype than the other layers', where P is split over
        processes (DeepSpeed's stage 3, FSDP), and within DistributedDataParallel's forward, which counts gradients as
        they come.
        """
        if not self.enabled or torch.compiler.is_compiling():
            return None
        factors = self._factors
        if torch._C._current_graph_task_id() == -1:  # else run again by a backward pass
            if self._queued:  # that backward pass ended in an exception
                self._queued, self._collected = False, {}
            if factors is not None and factors[module].entered:  # a new pass
                factors = factors if self._still_valid(module) else None
        if factors is None:
            if not self._is_possible(module):
                return None
            self._dtype, self._versions_then = dtype, [] if torch.is_grad_enabled() else self.versions()
            factors = self._factors = self.compute(dtype)
        if dtype != self._dtype:
            return None
        found = factors[module]
        found.entered = True
        return found

    @property
    def is_possible(self) -> bool:
        """Whether all factors can be formed here and now."""
        return self.enabled and self._is_possible(self.modules[0])

    @staticmethod
    def _is_possible(module: DeftModule | Share) -> bool:
        """Whether P is all here, and nobody counts gradients."""
        whole = type(module.P) is nn.Parameter and not hasattr(module.P, "ds_id")
        return whole and torch.nn.parallel.DistributedDataParallel._active_ddp_module is None

    def _still_valid(self, module: DeftModule | Share) -> bool:
        """Whether the last pass's factors serve for another one, which then begins."""
        if module.training or torch.is_grad_enabled() or self._versions_then != self.versions():
            return False
        for factors in (self._factors or {}).values():
            factors.entered = False
        return True

    def versions(self) -> list[int]:
        """That change where parameters do, if in one of torch's own ways."""
        tensors = ((m.P, m.R, m.g, m.E0) for m in self.modules)
        return [0 if tensor is None else tensor._version for four in tensors for tensor in four]

    def compute(self, dtype: torch.dtype) -> dict[DeftModule | Share, LayerFactors]:
        """All modules' factors, and those of their shares, from their parameters as they are now."""
        device = self.modules[0].P.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            factors: dict[DeftModule | Share, LayerFactors] = {}
            small = FLOAT16_GAIN if dtype == torch.float16 else 1.0
            for group, Q in zip(self._P_groups, self._bases(), strict=True):
                changes: Iterable[Tensor | None] = [None] * len(group)
                if self._removal:
                    starts = [m.E0 for m in group if m.E0 is not None]
                    change = (Q - torch.stack(starts)) * (small * self._removal)
                    changes = change.to(dtype).unbind()
                _divide_by_gains(Q, group, dtype)
                for module, up, changed in zip(group, Q.to(dtype).unbind(), changes, strict=True):
                    finish = functools.partial(_down_of_one, module, dtype)
                    factors[module] = LayerFactors(module, up, changed, finish, module.gain(dtype), self._probe)
            # a weight that is not at hand now (block swap) is read when its layer's turn has come, and so are all
            # others then: one that is at hand may be on its way out. One that has to be converted is so once, there
            weights = [(place.layer.weight, m.P.device) for m in self.modules for place in m.target.places]
            at_hand = all(W.dtype == dtype and W.device == device for W, device in weights)
            if at_hand or not self._removal:
                for group in self._R_groups:
                    removed = _removed(group, [factors[m].change for m in group]) if self._removal else None
                    for module, down in zip(group, _down(group, dtype, removed).unbind(), strict=True):
                        factors[module].down, factors[module].change = down, None
            for module in self.modules:
                factors |= {share: factors[module].share(module, share.rows) for share in module.shares}
            return factors

    def _bases(self) -> list[Tensor]:
        """Q (modules, m, r) of each group of modules, after bases that have degenerated were mended."""
        bases, independence = self._decomposed()
        self._checked = True
        if self.modules[0].P.is_cuda and torch.cuda.is_current_stream_capturing():
            return bases
        least = deft_math.LEAST_INDEPENDENCE
        if self._ahead and self.modules[0].training:  # read and mended as the next step begins
            self._independence = self._independence or Late(independence)
            # a basis serves a little beyond the limit. Further on its gradients are finite and far too large: the
            # trainer is to leave the step out, also where that layer forms its own
            usable = (independence > least / 2).all()
            return [Q.where(usable, torch.nan) for Q in bases]
        if not bool((independence > least).all()):  # waits for the GPU
            self._mend(independence.tolist())
            bases, _ = self._decomposed()
        return bases

    def _decomposed(self) -> tuple[list[Tensor], Tensor]:
        """Q of each group, and how independent the columns of each module's P are (modules,), group by group."""
        found = [deft_math.cholesky_qr(torch.stack([m.P for m in group])) for group in self._P_groups]
        return [Q for Q, _ in found], torch.cat([value for _, value in found])

    def _mend(self, independence: list[float]) -> None:
        """Renews bases that have degenerated.

        :param independence: of all modules, group by group
        """
        flat = [module for group in self._P_groups for module in group]
        least = deft_math.LEAST_INDEPENDENCE
        weak = [module for module, value in zip(flat, independence, strict=True) if value <= least]
        if weak:
            self._tell_renewal({module: module.mend_basis() for module in weak})

    def _tell_renewal(self, renewed: Mapping[DeftModule, int]) -> None:
        """Says it once: where it happens, it happens in many steps."""
        renewed = {module: number for module, number in renewed.items() if number}
        if renewed and not self._told_renewal:
            self._told_renewal = True
            logger.warning(
                f"{sum(renewed.values())} directions in {len(renewed)} layers had merged with others, in "
                f"{next(iter(renewed)).lora_name} for one; renewed, now and whenever it happens again. A lower rank or "
                f"rate avoids it"
            )

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
        self._given.end()

    def _queue(self, gradient: Tensor | None = None) -> None:
        """Has the backward pass that is under way call `_finish` at its end."""
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def receive(
        self, module: DeftModule | Share, factors: LayerFactors, d_up: Tensor, d_down: Tensor, weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Takes a layer's gradients of `factors`, within a backward pass. Writes over d_up where something is removed.

        :param weight: W (m, n) in the compute dtype, as it is at this moment; None where nothing is
        :returns: the gradients of P, R and g: None each when they come at the pass's end, as they do in `backward()`
        :raises DeftError: for second derivatives
        """
        if torch.is_grad_enabled():
            raise DeftError("second derivatives (create_graph=True): set `batched = False` on the DEFT network first")
        if isinstance(module, Share):  # down depends on all of its layers' weights
            (rows, module), part = (module.rows, module.module), d_up
            d_up = part.new_zeros(module.target.shape[0], module.rank)
            d_up[rows] = part
            weight = None if weight is None else module.weight_in(weight.dtype)
        if weight is not None:  # the gradient of E: up's, and what comes through -E^T W; in both parts scaled as up is
            d_up.addmm_(weight, d_down.t(), alpha=-self._removal * factors.gain**2)
        if torch._C._will_engine_execute_node(self._probe_node):
            kept = self._collected.get(module)
            if kept is None:
                self._collected[module] = [d_up, d_down]
            else:
                self._collected[module] = [kept[0].float() + d_up, kept[1].float() + d_down]
            if not self._queued:  # a backward pass that did not begin at the root's output
                self._queue()
            return None, None, None
        found = self.gradients({module: [d_up, d_down]}, {}, self._dtype)
        return tuple(None if p is None else found.get(p) for p in (module.P, module.R, module.g))

    def _finish(self) -> None:
        self._queued = False
        collected, self._collected = self._collected, {}
        if not collected:
            return
        factors = self._factors or {}
        for module in self.modules if factors else ():
            if factors[module].entered and module not in collected and module.config.module_dropout > 0:
                m, n = module.target.shape  # skipped here, maybe not in another process, which waits for its sum
                collected[module] = [module.P.new_zeros(m, module.rank), module.P.new_zeros(module.rank, n)]
        known = {m: factors[m].up for m in self.modules} if factors and self._dtype == torch.float32 else {}
        del factors  # their memory, before that of the gradients is taken
        self.drop()
        gradients = self.gradients(collected, known, self._dtype)
        with torch.enable_grad():
            delivery = Delivery.apply(gradients, *gradients)
        delivery.backward()

    @torch.no_grad()
    def gradients(
        self, collected: Mapping[DeftModule, list[Tensor]], known: Mapping[DeftModule, Tensor], dtype: torch.dtype
    ) -> dict[Tensor, Tensor]:
        """The gradients of P, R and g of all these modules, where they are trained, for modules alike at once.

        :param collected: the gradients of E (m, r), with -W d_down^T in it, and of down (r, n), scaled as the factors;
            taken out as they are used
        :param known: each module's Q (m, r) in float32, where it is still there
        :param dtype: of the factors
        """
        found: dict[Tensor, Tensor] = {}
        with torch.autocast(self.modules[0].P.device.type, enabled=False):
            for modules in self._P_groups:
                group = [m for m in modules if m in collected and m.P.requires_grad]
                if group:
                    P = torch.stack([m.P for m in group])
                    Q = torch.stack([known[m].mT for m in group]).mT if known else deft_math.cholesky_qr(P)[0]
                    d_Q = torch.stack([collected[m].pop(0) for m in group]).float()
                    _divide_by_gains(d_Q, group, dtype)
                    found.update(zip([m.P for m in group], deft_math.basis_gradient(P, Q, d_Q).unbind(), strict=True))
            for modules in self._R_groups:
                group = [m for m in modules if m in collected and m.R is not None]
                if group:
                    d_injected = torch.stack([collected[m].pop() for m in group]).float()
                    found.update(_injection_gradients(group, d_injected * group[0].gain(dtype)))
        return {parameter: gradient for parameter, gradient in found.items() if parameter.requires_grad}


def _removed(group: list[DeftModule], changes: list[Tensor]) -> Tensor:
    """(E - E0)^T W of modules alike (modules, r, n), in the dtype of E - E0, which is W's."""
    dtype = changes[0].dtype
    removed = changes[0].new_empty(len(group), group[0].rank, group[0].target.shape[1])
    for module, change, out in zip(group, changes, removed.unbind(), strict=True):
        torch.mm(change.t(), module.weight_in(dtype), out=out)
    return removed


def _down(group: list[DeftModule], dtype: torch.dtype, removed: Tensor | None = None) -> Tensor:
    """down (modules, r, n) of modules alike in `dtype`, s R - (E - E0)^T W, of which the last term is given, or 0."""
    if removed is None:
        down = _injected(group)
    else:
        removed = removed.float() / FLOAT16_GAIN if dtype == torch.float16 else removed.float()
        down = -removed if group[0].R is None else _injected(group) - removed
    gain = group[0].gain(dtype)
    return (down * gain if gain != 1 else down).to(dtype)


def _down_of_one(module: DeftModule, dtype: torch.dtype, removed: Tensor) -> Tensor:
    """down (r, n) of one module whose (E - E0)^T W comes later than the others'."""
    return _down([module], dtype, removed.unsqueeze(0))[0]


def _divide_by_gains(stacked: Tensor, group: list[DeftModule], dtype: torch.dtype) -> None:
    """In place, each module's part (modules, m, r) of what `gain` takes from up."""
    if dtype == torch.float16:
        torch._foreach_div_(list(stacked.unbind()), [module.gain(dtype) for module in group])


def _injected(group: list[DeftModule]) -> Tensor:
    """s R of modules alike (modules, r, n)."""
    injections: list[Tensor] = [m.R for m in group if m.R is not None]
    gates: list[Tensor] = [m.g for m in group if m.g is not None]
    injected = _outside(torch.stack(injections).mul_(group[0].R_factor), group)
    return injected.mul_(torch.sigmoid(torch.stack(gates))[:, None, None]) if gates else injected


def _injection_gradients(group: list[DeftModule], d_injected: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """R's and g's of modules alike, from that of s R (modules, r, n), which is written over."""
    injections: list[Tensor] = [m.R for m in group if m.R is not None]
    gates: list[Tensor] = [m.g for m in group if m.g is not None]
    d_R = _outside(d_injected.mul_(group[0].R_factor), group)
    if gates:
        share = torch.sigmoid(torch.stack(gates))
        d_share = (d_R * torch.stack(injections)).sum((1, 2))
        yield from zip(gates, (d_share * share * (1 - share)).unbind(), strict=True)
        d_R.mul_(share[:, None, None])
    yield from zip(injections, d_R.unbind(), strict=True)


def _outside(R: Tensor, group: list[DeftModule]) -> Tensor:
    """R (modules, r, n) without its part in the directions to keep; a gradient of R likewise."""
    kept = [m.kept for m in group if m.kept is not None]
    return deft_math.outside(R, torch.stack(kept)) if kept else R


def _R_likeness(module: DeftModule) -> Hashable:
    """What modules whose R is treated together have in common."""
    kept = None if module.kept is None else module.kept.shape
    return module.target.shape, module.rank, module.R is None, module.R_factor, kept


class Delivery(torch.autograd.Function):
    """Takes gradients that are there to their parameters, which get them like any others, hooks and all.

    Inputs: a dictionary of parameters and gradients, and the parameters. Output: what to call backward() on.
    """

    @staticmethod
    def forward(ctx: Any, found: dict[Tensor, Tensor], *parameters: Tensor) -> Tensor:
        ctx.found = found
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.found  # emptied here: a gradient that nobody else holds becomes `.grad` without a copy
        return None, *(found.pop(parameter) for parameter in list(found))


def _grouped(
    modules: Iterable[DeftModule], key: Callable[[DeftModule], Hashable], size: Callable[[DeftModule], int]
) -> list[list[DeftModule]]:
    """Modules with the same key, in parts of about `AT_ONCE` numbers."""
    groups: dict[Hashable, list[DeftModule]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    found = []
    for group in groups.values():
        number = max(1, AT_ONCE // size(group[0]))
        found += [group[i : i + number] for i in range(0, len(group), number)]
    return found


def _tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: itself, or within tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors_of(part)
