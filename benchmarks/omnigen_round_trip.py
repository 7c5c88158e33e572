"""OmniGen at its real size: trained, saved, loaded into diffusers' pipeline, merged, and taken out again.

    python benchmarks/omnigen_round_trip.py    # a GPU with 48 GB; random weights, nothing is downloaded

Answers of the transformer to one prompt are compared, in float32: beside the trained network's own, those of its file
in a pipeline, and of the file merged into the weights; and what is left when it has been taken out. Prints one
line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, OmniGenPipeline
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import adapt, build  # noqa: E402
from networks import deft  # noqa: E402
from tests import small_omnigen  # noqa: E402

RANK, STEPS, RATE = 16, 3, 1e-3


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = build("omnigen", device, torch.float32)
    torch.manual_seed(0)
    prompt = inputs(1, 512)

    @torch.no_grad()
    def answer() -> Tensor:
        return model(**prompt, return_dict=False)[0]

    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "self_attn" in name}
    base = answer()
    parameters, begin = adapt("deft", model, RANK, device)
    network = model.network[0]
    optimizer = torch.optim.AdamW(parameters, RATE)
    for _ in range(STEPS):
        begin()
        model(**prompt, return_dict=False)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    network.eval()
    trained = answer()
    found = {"layers": len(network.all_modules), "learnt": apart(trained, base)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "trained.safetensors"
        network.save_weights(str(file), torch.float32, {})
        network.remove()
        del model.network
        found["removed"] = apart(answer(), base)

        made = small_omnigen.build(folder)
        pipeline = OmniGenPipeline(
            model,
            FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
            AutoencoderKL.from_pretrained(made / "vae"),
            small_omnigen.tokenizer(folder / "tokenizer"),
        )
        lora, _ = deft.create_network_from_weights(1.0, str(file), None, [], pipeline.transformer, for_inference=True)
        lora.apply_to([], pipeline.transformer)
        lora.load_weights(str(file))
        lora.to(device).eval()
        found["in the pipeline"] = apart(answer(), trained)
        lora.remove()
        found["taken out of it"] = apart(answer(), base)

        lora.backup_weights()
        lora.pre_calculation()
        found["merged"] = apart(answer(), trained)
        lora.restore_weights()
        found["weights behind it that differ"] = sum(
            not torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights
        )
        found["mib"] = round(file.stat().st_size / 2**20, 1)
    found |= {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
