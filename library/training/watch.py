"""Says while a training runs that it learns nothing, or too much, and why that may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from library.options.rooms import DatasetOptions, NetworkOptions, OptimizerOptions
from library.training import optimizers
from library.training.record import Reading

NOTHING = 0.005  # of the base model's loss: what is learnt is not told from nothing
FAIR = 0.25  # of the steps, behind which something should have been learnt
FAR = 0.2  # of drift: a warning's; docs/trainer.md says where it comes from
SOME = 0.05  # of drift, that is too much where less than that has been learnt
USUAL = {"Lion": 2e-5}  # rates of published models, twice a LoRA's
USUAL_ELSE = 2e-4
LOW, HIGH = 0.1, 5.0  # of the usual rate


@dataclass
class Watch:
    """:param steps: of the whole training
    :param nothing: why nothing may be learnt
    :param much: why the model may drift away
    """

    steps: int
    nothing: Sequence[str]
    much: Sequence[str]
    told: set[str] = field(default_factory=set)

    def lines(self, reading: Reading) -> Iterator[str]:
        """What there is to say now and has not been said yet."""
        step, drift, learnt = reading
        if learnt < NOTHING and step >= FAIR * self.steps:
            yield from self._once(reading, "nothing has been learnt so far", self.nothing)
        if drift >= FAR or drift >= max(SOME, learnt):
            yield from self._once(reading, "the model drifts away from what it could do", self.much)

    def _once(self, reading: Reading, what: str, causes: Sequence[str]) -> Iterator[str]:
        if what not in self.told:
            self.told.add(what)
            step, drift, learnt = reading
            yield f"step {step}: {what} (learnt {learnt:.4f}, drift {drift:.3f}). Likely: {'; '.join(causes)}"


def watch_of(
    datasets: Sequence[DatasetOptions], network: NetworkOptions, rates: OptimizerOptions, steps: int, has_loss: bool
) -> Watch:
    """:param steps: of the whole training
    :param has_loss: whether the model has one on the pictures, without the adapter
    """
    return Watch(steps, list(_of_nothing(datasets, network, rates, has_loss)), list(_of_much(network, rates)))


def _of_nothing(
    datasets: Sequence[DatasetOptions], network: NetworkOptions, rates: OptimizerOptions, has_loss: bool
) -> Iterator[str]:
    subsets = [subset for dataset in datasets for subset in dataset.subsets if not (subset.is_reg or subset.preserved)]
    if not has_loss:
        yield "the masks are black, so that nothing of the pictures is trained on"
    if all(subset.captions.caption_dropout_rate >= 0.9 for subset in subsets):
        yield "nearly every caption is left out (caption_dropout_rate)"
    weakest = min(abs(dataset.network_multiplier) for dataset in datasets)
    if weakest < 0.1:
        yield f"the adapter has a network_multiplier of {weakest:g}"
    if network.network_train_text_encoder_only:
        yield "--network_train_text_encoder_only: the denoiser, which draws, learns nothing"
    if network.scale_weight_norms is not None and network.scale_weight_norms < 0.1:
        yield f"--scale_weight_norms {network.scale_weight_norms:g} keeps every layer from changing"
    rate, usual = _rate(rates, network), _usual(rates)
    if usual and rate < LOW * usual:
        yield f"a learning rate of {rate:g} is low: {usual:g} is usual"
    elif usual and rate > HIGH * usual:
        yield f"a learning rate of {rate:g} is high, which unlearns as much: {usual:g} is usual"
    else:
        yield f"a learning rate of {rate:g} is too low for this model and these pictures, or the steps are too few"


def _of_much(network: NetworkOptions, rates: OptimizerOptions) -> Iterator[str]:
    rate, usual = _rate(rates, network), _usual(rates)
    if usual and rate > HIGH * usual:
        yield f"a learning rate of {rate:g} is high: {usual:g} is usual"
    else:
        yield f"a learning rate of {rate:g} is too high for this model, or the steps are too many"
    if not network.network_args.get("keep"):
        yield "nothing holds it: --network_args keep=configs/keep.txt does, and regularisation pictures do"
    yield "an earlier file may be the better one; --stop_at_drift ends a training by itself"


def _rate(rates: OptimizerOptions, network: NetworkOptions) -> float:
    """The highest that trains something."""
    denoiser = [] if network.network_train_text_encoder_only else [rates.unet_lr]
    encoders = [] if network.network_train_unet_only else [*rates.text_encoder_lr]
    return max(rates.learning_rate if rate is None else rate for rate in (denoiser + encoders or [None]))


def _usual(rates: OptimizerOptions) -> float | None:
    """None for optimizers that find their own rate."""
    kind = optimizers.kind_of(rates.optimizer_type)
    if kind.own_rate or optimizers.sets_own_rates(rates):
        return None
    return next((usual for name, usual in USUAL.items() if name in kind.class_name), USUAL_ELSE)
