"""What a training step costs with DEFT and with its peers, on real architectures with random weights; no download.

    python benchmarks/train_step.py --model sdxl --batch 1 4 --checkpointing no yes
    python benchmarks/train_step.py --model flux --adapters lora deft peft-deft --steps 20

All adapters are alive in one process, on the same base weights; their steps are taken in turn, and ratios are of steps
that followed one another. A step is: forward, backward, clipping, fused AdamW; bfloat16 base, float32 adapters and
autocast, as sd-scripts trains with --mixed_precision bf16. Peak memory is of whole steps with one adapter alone. Prints
tables and writes them as JSON under benchmarks/results/. sd-scripts' own LoRA takes part with SD_SCRIPTS_DIR set, in
a Python that has its requirements.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from networks import deft  # noqa: E402

# deft-keep: out of KEPT directions a layer; deft-paper: removal=1, the paper's form; deft-alone: layer by layer
ADAPTERS = ("none", "lora", "deft", "deft-keep", "deft-paper", "deft-alone", "peft-lora", "peft-deft", "sd-scripts")
KEPT = 64
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
FLUX = {"guidance_embeds": True}
SMALL_FLUX = FLUX | {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 2}  # 256 wide
OMNIGEN = {"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}}  # their values cost nothing
OMNIGEN_TEXT = 63  # tokens of an instruction with its prefix; with the time token a multiple of 8, as masks like it


# --- models ----------------------------------------------------------------------------------------------------------


def random_model(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """With weights of the usual size, drawn where they are to be."""
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device=device).to(dtype).requires_grad_(False)
    for name, tensor in model.state_dict().items():
        size = math.prod(tensor.shape[1:])
        if "norm" in name and name.endswith(("weight", "scale")):
            tensor.fill_(1.0)
        elif tensor.dim() > 1:
            tensor.normal_(0, size**-0.5)
        else:
            tensor.zero_()
    return model


def build(name: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[int, int], dict[str, Any]]]:
    """The denoiser, and what makes its inputs for a batch of pictures of so many pixels a side."""
    if name in ("sd15", "small"):
        folder = ROOT / "library" / ("models/configs/sd15" if name == "sd15" else "world/model")
        config = json.loads((folder / "unet" / "config.json").read_text())
        model = random_model(lambda: diffusers.UNet2DConditionModel.from_config(config), device, dtype)
    elif name == "sdxl":
        model = random_model(lambda: diffusers.UNet2DConditionModel(**SDXL), device, dtype)
    elif name in ("flux", "small-flux"):
        config = FLUX if name == "flux" else SMALL_FLUX
        model = random_model(lambda: diffusers.FluxTransformer2DModel(**config), device, dtype)
    else:
        model = random_model(lambda: diffusers.OmniGenTransformer2DModel(**OMNIGEN), device, dtype)

    def inputs(batch: int, resolution: int) -> dict[str, Any]:
        def noise(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device, dtype=dtype)

        side = resolution // 8
        if name in ("flux", "small-flux"):
            tokens = (side // 2) ** 2
            ids = torch.zeros(tokens + 512, 3, device=device)
            return {
                "hidden_states": noise(tokens, 64), "encoder_hidden_states": noise(512, 4096),
                "pooled_projections": noise(768), "timestep": noise().abs(), "guidance": noise().abs(),
                "img_ids": ids[512:], "txt_ids": ids[:512],
            }  # fmt: skip
        if name == "omnigen":  # a prompt alone: causal text, a time token, a picture that sees all
            length = OMNIGEN_TEXT + 1 + (side // 2) ** 2
            mask = torch.ones(length, length, device=device).tril()
            mask[OMNIGEN_TEXT + 1 :] = 1
            return {
                "hidden_states": noise(4, side, side), "timestep": torch.rand(batch, device=device),
                "input_ids": torch.randint(1, 32000, (batch, OMNIGEN_TEXT), device=device),
                "input_img_latents": [], "input_image_sizes": {}, "attention_mask": mask.expand(batch, -1, -1),
                "position_ids": torch.arange(length, device=device).expand(batch, -1),
            }  # fmt: skip
        found = {
            "sample": noise(model.config.in_channels, side, side), "timestep": torch.tensor(500, device=device),
            "encoder_hidden_states": noise(77, model.config.cross_attention_dim),
        }  # fmt: skip
        if name == "sdxl":
            found["added_cond_kwargs"] = {"text_embeds": noise(1280), "time_ids": noise(6)}
        return found

    return model, inputs


def start_up(model: nn.Module, rank: int, device: str) -> dict[str, float]:
    """Seconds to make a network of all layers, with each of the starts."""
    seconds = {}
    for init in ("identity", "svd"):
        synchronize(device)
        start = time.perf_counter()
        network = deft.create_network(1.0, rank, rank, None, [], model, init=init)
        network.to(device)
        synchronize(device)
        seconds[init] = time.perf_counter() - start
    return seconds


def twin(model: nn.Module) -> nn.Module:
    """Another model with the same weights, not copies of them."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


# --- adapters --------------------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """A LoRA as kohya's networks compute it: another forward in the layer's place."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            make = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding, "bias": False}
            self.down: nn.Module = nn.Conv2d(layer.in_channels, rank, **make)
            self.up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.scale = self.multiplier = 1.0
        self.original = layer.forward
        layer.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) + self.up(self.down(x)) * self.multiplier * self.scale


def layers_of(model: nn.Module, rank: int) -> dict[str, nn.Module]:
    """Path -> layer of those that networks.deft adapts, which sd-scripts' networks adapt as well."""
    network = deft.create_network(1.0, rank, rank, None, [], model)
    adapted = {module.org_module for module in network.all_modules}
    return {path: layer for path, layer in model.named_modules() if layer in adapted}


def adapt(name: str, model: nn.Module, rank: int, device: str) -> tuple[list[nn.Parameter], Callable[[], None]]:
    """Adapts a model in place; returns what is trained, and what a trainer calls at the start of a step."""
    if name == "none":
        return [], lambda: None
    if name.startswith("deft"):
        options = {"removal": "1"} if name == "deft-paper" else {}
        network = deft.create_network(1.0, rank, rank, None, [], model, **options)
        for module in network.all_modules if name == "deft-keep" else ():  # any orthonormal directions cost the same
            n = module.target.shape[1]
            module.kept = torch.linalg.qr(torch.randn(n, min(KEPT, max(1, n // 4)), device=device))[0].cpu()
        network.apply_to([], model, False, True)
        network.to(device).train()
        network.batched = name != "deft-alone"
        model.network = [network]
        return list(network.parameters()), lambda: network.on_step_start(None, model)
    layers = layers_of(model, rank)
    if name.startswith("peft"):
        import peft

        targets = list(layers)
        if name == "peft-lora":
            config: Any = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        else:  # which takes no convolutions
            targets = [path for path, layer in layers.items() if isinstance(layer, nn.Linear)]
            config = peft.DeftConfig(r=rank, alpha=rank, target_modules=targets)
        peft.inject_adapter_in_model(config, model)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        return trained, lambda: None
    if name == "lora":
        modules = nn.ModuleList(Lora(layer, rank) for layer in layers.values()).to(device)
    else:
        lora = sd_scripts_lora()
        modules = nn.ModuleList(lora.LoRAModule(path, layer, 1.0, rank, rank) for path, layer in layers.items())
        for module in modules:
            module.apply_to()
        modules.to(device)
    return list(modules.parameters()), lambda: None


def sd_scripts_lora() -> Any:
    """sd-scripts' own networks/lora.py."""
    folder = Path(os.environ["SD_SCRIPTS_DIR"])
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "library"}
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("sd_scripts_lora", folder / "networks" / "lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    sys.modules.update(saved)
    return module


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What a step is taken with: the adapters' rank, pictures of so many pixels a side, and how many."""

    rank: int
    resolution: int
    batch: int
    checkpointing: bool


class Contestant:
    """One adapter on its own twin of the model, put there by `adapt`."""

    def __init__(
        self, name: str, base: nn.Module, inputs: Callable[[int, int], dict], case: Case, args, adapt=adapt
    ) -> None:
        self.device, self.inputs = args.device, lambda: inputs(case.batch, case.resolution)
        self.dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
        self.model = twin(base)
        torch.manual_seed(0)
        synchronize(self.device)
        start = time.perf_counter()
        self.parameters, self.begin = adapt(name, self.model, case.rank, self.device)
        synchronize(self.device)
        self.start_up = time.perf_counter() - start
        self.optimizer = torch.optim.AdamW(self.parameters or [torch.zeros(1, device=self.device)], lr=1e-5, fused=True)
        getattr(self.model, f"{'en' if case.checkpointing else 'dis'}able_gradient_checkpointing")()
        self.model.train()

    def forward(self) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            found = self.inputs()
            if not self.parameters:  # so that there is something to take the gradient of
                first = "sample" if "sample" in found else "hidden_states"
                found[first] = found[first].requires_grad_()
            return self.model(**found, return_dict=False)[0]

    def step(self) -> None:
        self.begin()
        loss = self.forward().float().square().mean()
        loss.backward()
        if self.parameters:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds of wall time that a call takes, until the device has finished."""
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def busy(contestant: Contestant) -> float:
    """Seconds in which the GPU ran some kernel during a step."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        contestant.step()
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in profile.events() if "CUDA" in str(e.device_type))
    total, reached = 0.0, -math.inf
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def peak_memory(name: str, base: nn.Module, inputs: Callable, case: Case, args, adapt=adapt) -> dict[str, float]:
    """MiB that whole steps with this adapter alone take at most, and that remain between them."""
    contestant = Contestant(name, base, inputs, case, args, adapt)
    contestant.step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        contestant.step()
    torch.cuda.synchronize()
    found = {
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
        "between_mib": torch.cuda.memory_allocated() / 2**20,
    }
    return found | {"parameters": sum(p.numel() for p in contestant.parameters)}


def ratio_of(values: list[float], others: list[float]) -> dict[str, float]:
    """Median of the ratios of steps taken one after the other, with a 95% interval by bootstrap."""
    ratios = torch.tensor([a / b for a, b in zip(values, others, strict=True)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(ratios), (2000, len(ratios)), generator=generator)
    medians = ratios[draws].median(dim=1).values.sort().values
    return {"median": float(ratios.median()), "low": float(medians[50]), "high": float(medians[-51])}


def in_turn(contestants: dict[str, Contestant], steps: int, call: str) -> dict[str, list[float]]:
    """Times of each one's steps; the order changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in range(steps + 2):
        for name in names if i % 2 else reversed(names):
            seconds = contestants[name].timed(getattr(contestants[name], call))
            if i >= 2:  # the first rounds set libraries up
                times[name].append(seconds)
    return times


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Gives the device's memory back afterwards."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(base: nn.Module, inputs: Callable, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Memory of each adapter alone, then times of all in turn."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in args.adapters}
    for name in args.adapters if args.device == "cuda" else ():
        with released():
            try:
                rows[name] |= peak_memory(name, base, inputs, case, args)
            except torch.OutOfMemoryError:
                rows[name]["error"] = "out of memory"
    names = [name for name in args.adapters if "error" not in rows[name]]
    contestants = {name: Contestant(name, base, inputs, case, args) for name in names}
    fast = {name: c for name, c in contestants.items() if name in ("lora", "deft")}
    times = in_turn(fast, args.steps, "step")
    if len(fast) < len(contestants):  # the others, and these once more beside them
        others = in_turn(contestants, args.other_steps, "step")
    for name, contestant in contestants.items():
        seconds = times.get(name) or others[name]
        row = rows[name]
        row |= {"start_up_s": contestant.start_up, "median_ms": 1e3 * statistics.median(seconds)}
        row["quartiles_ms"] = [1e3 * q for q in statistics.quantiles(seconds, n=4)[::2]]
        if name != "lora" and "lora" in contestants:
            pairs = (times[name], times["lora"]) if name in fast else (others[name], others["lora"])
            row["of_lora"] = ratio_of(*pairs)
        if name not in fast and "deft" in contestants:
            row["of_deft"] = ratio_of(others[name], others["deft"])
        if args.device == "cuda":
            row["busy_ms"] = 1e3 * busy(contestant)
    if args.inference:
        for contestant in contestants.values():
            contestant.model.eval()
            for network in getattr(contestant.model, "network", []):
                network.eval()
        with torch.no_grad():
            drawn = in_turn(contestants, args.other_steps, "forward")
        for name, seconds in drawn.items():
            rows[name]["inference_ms"] = 1e3 * statistics.median(seconds)
            rows[name]["inference_of_none"] = ratio_of(seconds, drawn["none"]) if "none" in drawn else None
    return asdict(case) | {"steps": args.steps, "rows": rows}


def show(found: dict[str, Any]) -> None:
    """Prints one case as a table."""
    checkpointing = "with" if found["checkpointing"] else "without"
    print(
        f"\nrank {found['rank']}, {found['resolution']} pixels, batch {found['batch']}, {checkpointing} checkpointing\n"
    )
    print("| adapter | step, ms (quartiles) | of LoRA's time (95%) | GPU busy, ms | peak, MiB | inference, ms |")
    print("|---|---|---|---|---|---|")
    for name, row in found["rows"].items():
        if "median_ms" not in row:
            print(f"| {name} | {row.get('error')} | | | | |")
            continue
        low, high = row["quartiles_ms"]
        ratio = row.get("of_lora")
        cells = [f"{row['median_ms']:.0f} ({low:.0f} to {high:.0f})"]
        cells.append(f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else "")
        cells += [f"{row[key]:.0f}" if key in row else "" for key in ("busy_ms", "peak_mib", "inference_ms")]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["small", "sd15", "sdxl", "flux", "omnigen"], required=True)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=["lora", "deft"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--resolution", type=int, nargs="+", default=[1024])
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--steps", type=int, default=20, help="of LoRA and DEFT, in turn")
    parser.add_argument("--other_steps", type=int, default=5, help="of all adapters, in turn, where there are others")
    parser.add_argument("--inference", action="store_true", help="time forward passes without gradients as well")
    parser.add_argument("--start_up", action="store_true", help="time the making of a network, with init svd too")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/train_step-MODEL.json")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails in FLUX with torch 2.11 on an H100
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    base, inputs = build(args.model, args.device, dtype)
    result = {
        "model": args.model, "layers": len(layers_of(base, args.rank[0])), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "configurations": [],
    }  # fmt: skip
    output = args.output or Path(__file__).parent / "results" / f"train_step-{args.model}.json"
    output.parent.mkdir(exist_ok=True, parents=True)
    print(f"{args.model}: {result['layers']} layers, {result['device']}")
    if args.start_up:
        result["start_up_s"] = start_up(base, args.rank[0], args.device)
        print("seconds to make the network:", {init: round(s, 1) for init, s in result["start_up_s"].items()})
    for rank, resolution, ckpt, batch in itertools.product(args.rank, args.resolution, args.checkpointing, args.batch):
        with released():
            found = measure(base, inputs, Case(rank, resolution, batch, ckpt == "yes"), args)
        show(found)
        result["configurations"].append(found)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
