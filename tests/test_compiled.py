"""--torch_compile: compiled blocks compute what they compute without, in as few graphs as without an adapter."""

from __future__ import annotations

import copy
import functools
import zlib
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import train_network_deft
from benchmarks.train_step import Lora, layers_of
from library.models import compiling
from library.models.loading import load
from library.options.parse import parse
from networks import deft
from networks.deft_config import DeftError
from networks.deft_module import DeftModule
from tests import small_flux, small_models, small_omnigen
from tests.conftest import arguments, relative_error, reset_accelerator
from tests.test_loop_options import logged

WAYS: dict[str, Any] = {
    "plain": None,
    "checkpoints": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
}
GRAPHS = 2  # of single blocks: the first one's input has no gradients, and lies in memory in another way
OPTIONS: list[dict[str, str]] = [
    {},
    {"removal": "1"},
    {"gate": "true", "removal": "0.5"},
    {"para": "true"},
    {"freeze_basis": "true"},
    {"fuse_qkv": "true", "removal": "1"},
    {"keep": "random"},
    {"neuron_dropout": "0.3", "rank_dropout": "0.3"},
    {"module_dropout": "0.4", "removal": "1"},
    {"basis": "relu"},
]


@pytest.fixture(autouse=True)
def _dynamo_as_it_is_at_first():
    config = torch._dynamo.config
    before = config.suppress_errors, config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    config.suppress_errors, config.recompile_limit = before


def flux(double: int = 0, single: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        num_layers=double, num_single_layers=single, attention_head_dim=16, num_attention_heads=2, in_channels=8,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ).requires_grad_(False)  # fmt: skip


def inputs(tokens: int = 9, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = torch.Generator().manual_seed(1)
    ids = torch.zeros(tokens + 4, 3)
    ids[4:, 1] = torch.arange(tokens)
    sizes = {"hidden_states": (tokens, 8), "encoder_hidden_states": (4, 12), "pooled_projections": (10,),
             "timestep": (), "guidance": ()}  # fmt: skip
    made = {name: torch.randn(2, *size, generator=found).to(dtype) for name, size in sizes.items()}
    return made | {"img_ids": ids[4:], "txt_ids": ids[:4]}


def adapted(model: nn.Module, **options: str) -> deft.DeftNetwork:
    keeps = options.pop("keep", None)
    net = deft.create_network(1.0, 4, 4, None, [], model, **options)
    generator = torch.Generator().manual_seed(2)
    for module in net.all_modules:
        if keeps:
            n = module.target.shape[1]
            module.kept = torch.linalg.qr(torch.randn(n, 3, generator=generator))[0]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1:].numel()
    net.apply_to([], model)
    return net.train()


def made(
    options: dict[str, str], compiled: bool, backend: str = "eager", **blocks: int
) -> tuple[nn.Module, deft.DeftNetwork]:
    model = flux(**blocks)
    net = adapted(model, **options)
    if compiled:
        model.compile_repeated_blocks(backend=backend)
    return model, net


@dataclass
class Steps:
    """Answers and gradients of some steps, between which the parameters move; and graphs made until then."""

    tensors: list[Tensor] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)


def steps(model: nn.Module, net: deft.DeftNetwork, way: str = "plain") -> Steps:
    if WAYS[way]:
        model.train().enable_gradient_checkpointing(WAYS[way])
    target = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(3))
    optimizer, found = torch.optim.SGD(net.parameters(), lr=0.1), Steps()
    torch.manual_seed(4)  # dropout
    for _ in range(3):
        net.on_step_start(None, model)
        given = inputs()
        if way == "reentrant":
            given["hidden_states"].requires_grad_()
        answer = model(**given, return_dict=False)[0]
        (answer - target).square().mean().backward()
        found.tensors += [answer.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
        found.graphs.append(graphs())
    return found


def graphs() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert len(found) == len(wanted)
    return max(relative_error(a, b) if b.any() else float(a.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_those_of_the_model_as_it_is(options, monkeypatch):
    """And a graph for each form of a block's input, no more in later steps."""
    if "module_dropout" in options:  # which draws in another order
        monkeypatch.setattr(
            DeftModule, "is_left_out", lambda m: m.training and zlib.crc32(m.lora_name.encode()) % 3 == 0
        )
    wanted, found = steps(*made(options, False)), steps(*made(options, True))
    assert apart(found.tensors, wanted.tensors) < 1e-4
    assert found.graphs == [GRAPHS] * 3


def test_graphs_are_as_many_as_a_loras_and_differentiated_by_aot():
    """Of both kinds of blocks."""
    blocks = {"double": 1, "single": 1}
    wanted = steps(*made({"removal": "1"}, False, **blocks))
    found = steps(*made({"removal": "1"}, True, "aot_eager", **blocks))
    assert apart(found.tensors, wanted.tensors) < 1e-4
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = flux(**blocks)
    for layer in layers_of(model, 4).values():
        layer.lora = [Lora(layer, 4)]
    model.compile_repeated_blocks(backend="eager")
    model(**inputs(), return_dict=False)
    assert found.graphs == [graphs()] * 3


@pytest.mark.parametrize(
    ("way", "options"),
    [("checkpoints", {"neuron_dropout": "0.3"}), ("reentrant", {"removal": "1"})],
    ids=str,
)
def test_with_checkpoints(way, options):
    wanted, found = steps(*made(options, False), way), steps(*made(options, True), way)
    assert apart(found.tensors, wanted.tensors) < 1e-4
    assert len(set(found.graphs)) == 1
    assert way == "reentrant" or found.graphs[0] == GRAPHS


def test_a_pass_without_the_adapter_in_the_middle_of_a_step():
    """As prior preservation has it: the base model's answer, and the same gradients in the end."""
    base = flux()(**inputs(), return_dict=False)[0]
    found = []
    for compiled in (False, True):
        model, net = made({"removal": "1"}, compiled)
        model.train().enable_gradient_checkpointing(WAYS["checkpoints"])
        answer = model(**inputs(), return_dict=False)[0]
        net.set_multiplier(0.0)
        with torch.no_grad():
            assert relative_error(model(**inputs(), return_dict=False)[0], base) < 1e-6
        net.set_multiplier(1.0)
        answer.square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    assert apart(*found) < 1e-4


def test_answers_without_gradients_follow_the_parameters():
    """Those that do not change serve again; a change, seen or unseen by torch, is followed after a step's start."""
    model, net = made({}, True)
    plain, other = made({}, False)
    for network in (net, other):
        network.eval()
    with torch.no_grad():
        for size in (0.0, 0.1):
            for network in (net, other):
                network.all_modules[0].R += size
            answers = [one(**inputs(), return_dict=False)[0] for one in (model, model, plain)]
            assert torch.equal(answers[0], answers[1])
            assert relative_error(answers[0], answers[2]) < 1e-5
    assert net.all_modules[0].given is not None


def test_in_two_precisions():
    """The graphs compute in the dtype of the pass, with autocast and without."""
    for autocast in (False, True):
        found = []
        for compiled in (False, True):
            model, net = made({"removal": "1"}, compiled)
            given = inputs(dtype=torch.float32 if autocast else torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                answer = (model if autocast else model.bfloat16())(**given, return_dict=False)[0]
            answer.float().square().mean().backward()
            found.append([p.grad for p in net.parameters()])
        assert apart(*found) < 0.05
        assert graphs() == GRAPHS
        torch._dynamo.utils.counters.clear()
        torch._dynamo.reset()


def test_a_unet_with_convolutions_and_layers_outside_of_the_blocks():
    config = small_models.config_of("sdxl", "unet")
    config |= {"block_out_channels": [16], "attention_head_dim": [1], "transformer_layers_per_block": [1],
               "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"],
               "layers_per_block": 1}  # fmt: skip
    found = []
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 48, generator=generator)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.ones(2, 6)}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = diffusers.UNet2DConditionModel.from_config(config).requires_grad_(False)
        net = adapted(model, conv_dim="2", removal="1")
        if compiled:
            model.compile_repeated_blocks(backend="eager")
        for _ in range(2):
            net.on_step_start(None, model)
            net.zero_grad()
            model(sample, 7, text, added_cond_kwargs=added, return_dict=False)[0].square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    assert apart(*found) < 1e-4


def test_copies_and_what_is_left_behind():
    model, net = made({}, True)
    model(**inputs(), return_dict=False)[0].mean()
    assert copy.deepcopy(net).all_modules[0].given is None
    net.remove()
    assert net.all_modules[0].given is None


# --- the trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_accelerator")
def test_trains_beside_everything_else(photos, tmp_path, caplog):
    """Samples of another size, a validation and meters: all losses are those of the plain training."""
    folder = small_flux.build(tmp_path).folder
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 96 --s 1\n")
    common = {"learning_rate": 1e-3, "max_train_steps": 2, "meter_every_n_steps": 2, "network_train_unet_only": True,
              "sample_every_n_steps": 2, "sample_prompts": tmp_path / "p.txt", "gradient_checkpointing": True,
              "validation_split": 0.4, "validate_every_n_steps": 2, "t5xxl_max_token_length": 12}  # fmt: skip
    curves = []
    for name, compiled in (("plain", {}), ("compiled", {"torch_compile": True, "dynamo_backend": "eager"})):
        reset_accelerator()
        logs = tmp_path / name
        given = arguments(folder, photos, tmp_path, output_name=name, logging_dir=logs, **common, **compiled)
        with caplog.at_level("INFO"):
            assert train_network_deft.main(given) == 0
        told = logged(logs)
        curves.append({tag: [event.value for event in told.Scalars(tag)] for tag in told.Tags()["scalars"]
                       if tag.startswith(("loss/", "meter/"))})  # fmt: skip
    assert len(list((tmp_path / "out" / "sample").iterdir())) == 2
    assert curves[0].keys() == curves[1].keys()
    for tag, values in curves[0].items():
        assert curves[1][tag] == pytest.approx(values, rel=2e-3, abs=1e-5), tag
    assert "eager compiles the model's blocks" in caplog.text
    assert graphs() > 0


@pytest.mark.parametrize("more", [["--fp8_base", "--mixed_precision", "bf16"], ["--quantize_base", "int8"]], ids=str)
def test_weights_in_fewer_bits_are_not_compiled(more):
    given = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o"]
    with pytest.raises(DeftError, match=f"--torch_compile and {more[0]} do not go together"):
        parse([*given, "--torch_compile", *more])
    assert parse([*given, *more, "--torch_compile", "--dynamo_backend", "no"]).model.torch_compile is None
    for backend, found in ((["--dynamo_backend", "no"], "inductor"), (["--dynamo_backend", "eager"], "eager")):
        assert parse([*given, "--compile", *backend]).model.torch_compile == found  # as in sd-scripts


def test_a_model_without_repeated_blocks_is_told(tmp_path):
    model = load(parse(["--pretrained_model_name_or_path", str(small_omnigen.build(tmp_path)), "--train_data_dir", "d",
                        "--output_dir", "o"]).model, torch.float32)  # fmt: skip
    with pytest.raises(DeftError, match="--torch_compile: nothing of OmniGenTransformer2DModel is compiled"):
        compiling.check(model.denoiser, "eager", torch.device("cpu"))


def failing(graph: Any, given: Any) -> Any:
    raise RuntimeError("no compiler\nand more lines")


def test_a_backend_that_does_not_work_here_is_told_in_a_line():
    with pytest.raises(DeftError, match=r"does not work here \(.*no compiler.*\)") as error:
        compiling.check(flux(), failing, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_what_cannot_be_compiled_ends_the_first_step_and_no_later_one():
    model, _ = made({}, False, single=1)
    wanted = model(**inputs(), return_dict=False)[0]
    compiling.compile_blocks(model, failing)
    failed = pytest.raises(DeftError, match=r"--torch_compile: it fails on this model \(.*no compiler")
    with failed as error, compiling.told(lambda: "nothing is trained yet"):
        model(**inputs(), return_dict=False)
    assert "\n" not in str(error.value)
    assert torch.equal(model(**inputs(), return_dict=False)[0], wanted)
