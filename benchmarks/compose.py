"""Several concepts in one file: what `compose_deft.py` and `keep=OTHER.safetensors` do, on the shipped model.

    python benchmarks/compose.py --device cuda --seeds 0 1   #   a GPU, minutes
    python benchmarks/compose.py --quick                        # a CPU: the code path only
    python benchmarks/compose.py --table                        # of the results that are there
    python benchmarks/compose.py --sheet docs/tools_compose.png # pictures of the first two creatures, each way

Creatures that the model has never seen are trained one adapter each, each by a word of its own, as in
`personalization.py`. Then two or four of them are put together in every way, merged into the weights, and judged:

  likeness  of a word's pictures to its creature, as a share of what renders of it have to each other
  right     share of these pictures with the creature in it, and no other one that is more like it
  both      of pictures with two of the words: the share of creatures that are there
  old       colour, shape and background of single things of the model's own world
  drift     of predictions for them, from the base model's

A run that is in the results is not repeated, nor is an adapter trained again that is in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import personalization_adapters as adapters  # noqa: E402
import personalization_measure as measuring  # noqa: E402
import personalization_train as training  # noqa: E402
from personalization_adapters import Adapter  # noqa: E402
from personalization_train import DataSet, Lane  # noqa: E402

from library.world import measure, scenes  # noqa: E402
from library.world.scenes import BACKGROUNDS  # noqa: E402
from networks import compose_deft, deft, deft_io, deft_keep, deft_load  # noqa: E402
from networks.deft_factors import Factors  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "compose.json"
WORDS = ("sks", "vtq", "ojm", "ruz")  # of a group's concepts; the tokenizer spells them out
RANK = 8
# label -> rate (the best of personalization.py's), and network_args or None for peft's LoRA
KINDS: dict[str, tuple[float, dict[str, str] | None]] = {
    "deft": (2e-2, {}),
    "deft keep=world": (2e-2, {"keep": "world"}),
    "lora": (5e-3, None),
    "deft removal=1": (1e-2, {"removal": "1", "save_format": "deft"}),
}
MODES = {
    "sum": ["--mode", "sum"],
    "projected": ["--mode", "projected"],
    "projected, symmetric": ["--mode", "projected", "--symmetric"],
}
SEQUENCE = {"sequence": ["--mode", "sequence", "--base", str(measure.MODEL)]}
FIXED = ("steps", "pictures", "sampling")

Build = Callable[[UNet2DConditionModel], Adapter]


# --- training --------------------------------------------------------------------------------------------------------


def deft_on(unet: UNet2DConditionModel, rate: float, args: dict[str, str], rank: int = RANK) -> Adapter:
    """networks.deft with its default options but these."""
    options: dict[str, Any] = {"conv_dim": str(rank), "conv_alpha": str(rank)} | args
    network = deft.create_network(1.0, rank, float(rank), None, [], unet, **options)
    network.apply_to([], unet, False, True)
    groups, _ = network.prepare_optimizer_params(rate, rate)
    return Adapter(unet, groups, dict, network.to(unet.device), lambda: network.on_step_start(None, unet))


def build_of(kind: str, more: dict[str, str], rank: int = RANK) -> Build:
    """How an adapter of a kind is put on a U-Net, with further network_args."""
    rate, args = KINDS[kind]
    if args is None:
        return lambda unet: adapters.adapter_of("lora")[0](unet, rank, rate)
    kept = [str(adapters.kept(deft_keep.DIRECTIONS, len(scenes.SHAPES)))] if args.get("keep") == "world" else []
    kept += [more["keep"]] if "keep" in more else []
    options = args | more | ({"keep": ",".join(kept)} if kept else {})
    return lambda unet: deft_on(unet, rate, options, rank)


def trained(
    builds: Sequence[Build], bases: Sequence[UNet2DConditionModel], sets: Sequence[DataSet], seeds: Sequence[int]
) -> list[Lane]:
    """An adapter on each U-Net and data set, side by side.

    :param seeds: of each one's start: adapters that start alike share most of their output directions
    """
    lanes = []
    for i, (build, base, data, seed) in enumerate(zip(builds, bases, sets, seeds, strict=True)):
        lane = Lane(build(copy.deepcopy(base)), data)
        lane.record(warm_up=1 if i else 3)
        torch.manual_seed(seed)
        lane.restart(build(copy.deepcopy(base)), data)
        lanes.append(lane)
    if lanes and lanes[0].on_gpu:
        torch.cuda.synchronize()
    for _ in range(len(sets[0].noisy)):
        for lane in lanes:
            lane.step()
    if lanes and lanes[0].on_gpu:
        torch.cuda.synchronize()
    return lanes


def write(lane: Lane, file: Path) -> None:
    """A trained adapter as a file, by networks.deft itself or, of peft's LoRA, of its deltas."""
    file.parent.mkdir(parents=True, exist_ok=True)
    adapter = lane.adapter
    adapter.unet.eval()
    adapter.begin()
    if isinstance(adapter.extra, deft.DeftNetwork):
        adapter.extra.eval()
        adapter.extra.save_weights(str(file), torch.float32, {})
        return
    layers, peft_layers = {}, dict(adapter.unet.named_modules())
    for key, name in names_of(adapter.unet).items():  # alpha is the rank: scale 1
        up, down = (peft_layers[f"{name}.{side}.default"].weight.detach().cpu() for side in ("lora_B", "lora_A"))
        layers[key] = Factors(up.flatten(1), down.flatten(1), tuple(down.shape[1:]))
    told = {"ss_base_model_version": "sd_v1"}
    deft_io.write_safetensors(deft_io.lora_tensors(layers, torch.float32, True)[0], file, told)


_names: dict[str, str] = {}


def names_of(unet: UNet2DConditionModel) -> dict[str, str]:
    """Files' key name -> the layer's name in a U-Net."""
    if not _names:
        plain = UNet2DConditionModel.from_config(unet.config)
        network = deft.create_network(1.0, 1, 1.0, None, [], plain, conv_dim="1", conv_alpha="1")
        paths = {id(layer): name for name, layer in plain.named_modules()}
        _names.update({m.target.file_name: paths[id(m.target.layer)] for m in network.unet_modules})
    return _names


def both_sets(sets: Sequence[DataSet]) -> DataSet:
    """All pictures of several concepts, in every step."""
    parts = [torch.cat([getattr(s, name) for s in sets], 1) for name in ("noisy", "timesteps", "target", "weights")]
    return DataSet(*parts, torch.cat([s.text for s in sets]), sets[0].seed)


# --- what is put together --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainings:
    """The adapters of one seed, in a folder; made where they are not there."""

    bench: measuring.Bench
    folder: Path
    seed: int
    steps: int

    def file(self, kind: str, what: str) -> Path:
        """Of a kind: "100" of the concept, "101 keep 100", "100+101"."""
        return self.folder / f"{kind} {what} seed {self.seed} steps {self.steps}.safetensors"

    def set_of(self, concept: int, word: str) -> DataSet:
        return training.data_set(self.bench.model, concept, word, self.seed, self.steps)

    def make(self, wanted: Iterable[tuple[Path, Build, Sequence[Path], Sequence[tuple[int, str]]]]) -> None:
        """Trains what is missing, side by side.

        :param wanted: file, how to build it, what is merged below it, and the concepts and their words
        """
        missing = [one for one in wanted if not one[0].is_file()]
        if not missing:
            return
        start = time.time()
        bases = []
        for _, _, below, _ in missing:
            unet = copy.deepcopy(self.bench.unet)
            with torch.no_grad():
                for name, delta in itertools.chain.from_iterable(deltas_of(unet, f).items() for f in below):
                    unet.get_parameter(name).add_(delta.to(unet.device))
            bases.append(unet)
        sets = [both_sets([self.set_of(*one) for one in concepts]) for _, _, _, concepts in missing]
        starts = [1000 * concepts[0][0] + self.seed for *_, concepts in missing]
        for (file, *_), lane in zip(missing, trained([m[1] for m in missing], bases, sets, starts), strict=True):
            write(lane, file)
        print(f"[{time.time() - start:.0f} s] {len(missing)} trained, {missing[0][0].name} for one", flush=True)


def deltas_of(unet: UNet2DConditionModel, file: Path) -> dict[str, Tensor]:
    """What a plain LoRA file adds to the weights, by name."""
    names, found = names_of(unet), {}
    for key, layer in deft_io.read_adapter(file).layers.items():
        weight = unet.get_parameter(f"{names[key]}.weight")
        up, down = (layer.up, layer.down) if isinstance(layer, deft_io.LoraLayer) else _on_base(layer, weight)
        found[f"{names[key]}.weight"] = (up @ down).view(weight.shape)
    return found


def _on_base(layer: deft_io.DeftLayer, weight: Tensor) -> tuple[Tensor, Tensor]:
    return deft_load.factors_of(layer, lambda: weight.detach().flatten(1).cpu())


def groups_of(concepts: Sequence[int]) -> list[tuple[int, ...]]:
    """Two by two, and four by four."""
    return [tuple(concepts[i : i + size]) for size in (2, 4) for i in range(0, len(concepts) - size + 1, size)]


def word_of(concepts: Sequence[int], concept: int) -> str:
    return WORDS[concepts.index(concept) % len(WORDS)]


def composed(mode: list[str], files: Sequence[Path], output: Path) -> Path:
    """By the tool."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = compose_deft.main(["--models", *map(str, files), "--save_to", str(output), *mode])
    assert code == 0, f"{mode} {files}"
    return output


# --- what is measured ------------------------------------------------------------------------------------------------


def judged(bench: measuring.Bench, group: Sequence[int], words: Sequence[str], seed: int, number: int) -> dict:
    """Of what is merged: all figures of the module's docstring, and each concept's likeness and right."""
    eyes = [bench.eye(concept) for concept in group]
    alone = [measure.concept_prompts(word, number) for word in words]
    two = [list(pair) for pair in itertools.combinations(range(len(group)), 2)]
    both = []
    for i in range(number if two else 0):
        pair = two[i % len(two)]
        first, second = (words[k] for k in (pair if i % 2 else pair[::-1]))
        form = (f"{first} left of {second}", f"{first} above {second}", f"{first} and {second}")[i % 3]
        both.append((pair, f"{form} on a {BACKGROUNDS[i % len(BACKGROUNDS)]} background"))
    rng = random.Random(f"compose {seed}")
    known = [scenes.draw_scene(rng, "single") for _ in range(2 * number)]
    captions = [scenes.caption(scene, rng, background=True) for scene in known]
    prompts = [*itertools.chain(*alone), *(text for _, text in both), *captions]
    readings, _ = bench.read(prompts, 10_000 * (group[0] % 1000) + 1000 * seed + 500)
    figures: dict[str, Any] = {"likeness each": [], "right each": []}
    for i, eye in enumerate(eyes):
        mine = readings[i * number : (i + 1) * number]
        own = [eye.like(r) / eye.of_renders for r in mine]
        others = [max((e.like(r) / e.of_renders for j, e in enumerate(eyes) if j != i), default=0.0) for r in mine]
        figures["likeness each"].append(_mean(own))
        right = [o >= measuring.HALF and o > other for o, other in zip(own, others, strict=True)]
        figures["right each"].append(_mean(list(map(float, right))))
    rest = readings[len(group) * number :]
    there = [float(any(eyes[k].is_it(t) for t in r.things)) for (pair, _), r in zip(both, rest, strict=False)
             for k in pair]  # fmt: skip
    off = bench._predict() - bench.base_predictions
    old = bench._of_old_world(known, captions, rest[len(both) :])["old"]
    return figures | {
        "likeness": _mean(figures["likeness each"]),
        "right": _mean(figures["right each"]),
        "both": _mean(there) if len(group) > 1 else 0.0,
        "old": old,
        "drift": float(off.square().sum() / bench.base_predictions.square().sum()),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# --- the bench -------------------------------------------------------------------------------------------------------


def ways(kind: str, group: Sequence[int], there: Trainings) -> Iterator[tuple[str, list[str] | None, list[Path]]]:
    """How a group is put together: name, the tool's options or None (merged as they are), and the files."""
    alone = [there.file(kind, str(concept)) for concept in group]
    modes = SEQUENCE | {"sum": MODES["sum"] + SEQUENCE["sequence"][2:]} if "removal" in kind else MODES
    for name, mode in modes.items():
        yield name, mode, alone
    if "removal" in kind or kind == "lora":
        if len(group) == 2:
            yield "trained together", None, [there.file(kind, "+".join(map(str, group)))]
        return
    kept = [alone[0]] + [
        there.file(kind, f"{c} keep {'+'.join(map(str, group[:i]))}") for i, c in enumerate(group) if i
    ]
    yield "keep=earlier ones", MODES["sum"], kept
    if len(group) == 2:
        yield "trained on the first", None, [alone[0], there.file(kind, f"{group[1]} on {group[0]}")]
        yield "on the first, keep=first", None, [alone[0], there.file(kind, f"{group[1]} on and keep {group[0]}")]
        yield "trained together", None, [there.file(kind, "+".join(map(str, group)))]


def train_all(kind: str, concepts: Sequence[int], there: Trainings) -> None:
    """Every file that `ways` asks for."""
    words = {c: word_of(concepts, c) for c in concepts}
    there.make((there.file(kind, str(c)), build_of(kind, {}), [], [(c, words[c])]) for c in concepts)
    pairs = [g for g in groups_of(concepts) if len(g) == 2]
    together = [
        (there.file(kind, f"{a}+{b}"), build_of(kind, {}, 2 * RANK), [], [(a, words[a]), (b, words[b])])
        for a, b in pairs
    ]
    there.make(together)
    if "removal" in kind or kind == "lora":
        return
    for place in (1, 2, 3):  # a later one keeps free of earlier ones that have to be there
        jobs = {}
        for group in groups_of(concepts):
            if place >= len(group):
                continue
            c, before = group[place], group[:place]
            earlier = [there.file(kind, str(before[0]))]
            earlier += [
                there.file(kind, f"{b} keep {'+'.join(map(str, before[:i]))}") for i, b in enumerate(before) if i
            ]
            file = there.file(kind, f"{c} keep {'+'.join(map(str, before))}")
            jobs[file] = (file, build_of(kind, {"keep": ",".join(map(str, earlier))}), [], [(c, words[c])])
        there.make(jobs.values())
    for name, more in (("on", False), ("on and keep", True)):
        there.make(
            (there.file(kind, f"{b} {name} {a}"),
             build_of(kind, {"keep": str(there.file(kind, str(a)))} if more else {}),
             [there.file(kind, str(a))], [(b, words[b])])
            for a, b in pairs
        )  # fmt: skip


def run(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """All that is missing in the results."""
    bench = measuring.Bench(args.device, args.sampling)
    _, concepts = measuring.concept_seeds(0, args.concepts)
    data["concepts"] = concepts
    data["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    scratch = args.folder / f"composed-{os.getpid()}.safetensors"
    for kind, seed in itertools.product(args.kinds, args.seeds):
        there = Trainings(bench, args.folder, seed, args.steps)
        start = time.time()
        train_all(kind, concepts, there)
        for group in groups_of(concepts):
            words = [word_of(concepts, c) for c in group]
            todo = [(way, mode, files) for way, mode, files in ways(kind, group, there)]
            for way, mode, files in todo:
                key = f"{kind}|{way}|{'+'.join(map(str, group))}|{seed}"
                if key not in data["runs"]:
                    merged = [composed(mode, files, scratch)] if mode else files
                    bench.merge(*(_on(bench, deltas_of(bench.unet, file)) for file in merged))
                    data["runs"][key] = judged(bench, group, words, seed, args.pictures)
            for concept, word in zip(group, words, strict=True):
                key = f"{kind}|alone|{concept}|{seed}"
                if key not in data["runs"]:
                    bench.merge(_on(bench, deltas_of(bench.unet, there.file(kind, str(concept)))))
                    data["runs"][key] = judged(bench, [concept], [word], seed, args.pictures)
            save(args.output, data)
        print(f"[{time.time() - start:.0f} s] {kind}, seed {seed}: {len(data['runs'])} runs", flush=True)


def _on(bench: measuring.Bench, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: delta.to(bench.device) for name, delta in deltas.items()}


def save(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


# --- the table -------------------------------------------------------------------------------------------------------


def table(data: dict[str, Any]) -> Iterator[str]:
    """A row a way: means over groups and seeds; and the change from the sum, paired, with its 95% interval, a group's
    mean over seeds being one observation."""
    names = ("likeness", "right", "both", "old", "drift")
    found: dict[tuple[str, int, str], dict[str, list[dict]]] = {}
    for key, figures in data["runs"].items():
        kind, way, group, _ = key.split("|")
        size = group.count("+") + 1
        found.setdefault((kind, size, way), {}).setdefault(group, []).append(figures)
    for (kind, size, way), groups in found.items():
        means = {n: {g: _mean([f[n] for f in figures]) for g, figures in groups.items()} for n in names}
        base = found.get((kind, size, "sum"), {})
        cells = []
        for n in names:
            cell = f"{_mean(list(means[n].values())):.3f}"
            if way != "sum" and base:
                off = [means[n][g] - _mean([f[n] for f in base[g]]) for g in groups if g in base]
                share = measure.share(off)
                cell += f" ({share['share']:+.3f} ± {share['interval']:.3f})"
            cells.append(cell)
        yield f"| {kind} | {size} | {way} | " + " | ".join(cells) + f" | {len(groups)} |"


SHOWN = ("alone", "sum", "projected", "projected, symmetric", "trained together")  # on the contact sheet
SHOWN_PICTURES = 5  # of each word, and of both


def draw_sheet(args: argparse.Namespace, file: Path) -> None:
    """Pictures of the first pair, kind and seed: a row a way, with the first word, the second, and both."""
    bench = measuring.Bench(args.device, args.sampling)
    _, concepts = measuring.concept_seeds(0, args.concepts)
    kind, group = args.kinds[0], tuple(concepts[:2])
    there = Trainings(bench, args.folder, args.seeds[0], args.steps)
    words = [word_of(concepts, c) for c in group]
    jobs = [(there.file(kind, str(c)), build_of(kind, {}), [], [(c, w)]) for c, w in zip(group, words, strict=True)]
    both = (there.file(kind, "+".join(map(str, group))), build_of(kind, {}, 2 * RANK), [],
            list(zip(group, words, strict=True)))  # fmt: skip
    there.make([*jobs, both][:2])
    there.make([both])
    alone = [job[0] for job in jobs]
    two = [f"{words[0]} left of {words[1]}", f"{words[1]} above {words[0]}", f"{words[0]} and {words[1]}"]
    prompts = [text for word in words for text in measure.concept_prompts(word, SHOWN_PICTURES)]
    prompts += [f"{two[i % 3]} on a {BACKGROUNDS[i % len(BACKGROUNDS)]} background" for i in range(SHOWN_PICTURES)]
    size, gap, left, top = 80, 4, 150, 24
    height, width = top + len(SHOWN) * (size + gap), left + len(prompts) * (size + gap) + 2 * size // 4
    sheet = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(sheet)
    for part, name in enumerate((*words, f"{words[0]} and {words[1]}")):
        canvas.text((left + part * (SHOWN_PICTURES * (size + gap) + size // 4), 6), name, "black")
    for row, way in enumerate(SHOWN):
        if way == "alone":  # each word by its own file; both words by the first's
            pixels = []
            for k, files in enumerate(([alone[0]], [alone[1]], [alone[0]])):
                bench.merge(_on(bench, deltas_of(bench.unet, files[0])))
                pixels.append(bench.read(prompts[k * SHOWN_PICTURES : (k + 1) * SHOWN_PICTURES], 40 * k)[1])
            pictures = torch.cat(pixels)
        else:
            scratch = args.folder / f"composed-{os.getpid()}.safetensors"
            merged = both[0] if way == "trained together" else composed(MODES[way], alone, scratch)
            bench.merge(_on(bench, deltas_of(bench.unet, merged)))
            parts = [bench.read(prompts[k * SHOWN_PICTURES : (k + 1) * SHOWN_PICTURES], 40 * k)[1] for k in range(3)]
            pictures = torch.cat(parts)
        y = top + row * (size + gap)
        canvas.text((4, y + size // 2 - 6), way, "black")
        for i, picture in enumerate(pictures):
            image = Image.fromarray(((picture.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy())
            x = left + i * (size + gap) + (i // SHOWN_PICTURES) * (size // 4)
            sheet.paste(image.resize((size, size), Image.Resampling.NEAREST), (x, y))
    sheet.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two steps of everything: the code path only")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--concepts", type=int, default=16)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--pictures", type=int, default=16, help="of each kind of prompt")
    parser.add_argument("--sampling", type=int, default=25)
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "compose")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--sheet", type=Path, help="draws this picture, and nothing else")
    parser.add_argument("--add", nargs="+", type=Path, default=[], help="results of other machines, taken over")
    args = parser.parse_args()
    if args.quick:
        args.concepts, args.steps, args.pictures, args.sampling = 4, 2, 2, 2
        args.folder, args.output = args.folder / "quick", args.folder / "quick" / "compose.json"
    if args.sheet:
        draw_sheet(args, args.sheet)
        return
    settings = {name: getattr(args, name) for name in FIXED}
    data: dict[str, Any] = {"settings": settings, "runs": {}}
    for path in [args.output, *args.add]:
        if path.is_file():
            other = json.loads(path.read_text(encoding="utf-8"))
            if other["settings"] != settings:
                sys.exit(f"error: {path} is of {other['settings']}, not {settings}")
            data = other | {"runs": data["runs"] | other["runs"]}
    if args.table or args.add:
        save(args.output, data)
    else:
        run(args, data)
    print("\n".join(table(data)))


if __name__ == "__main__":
    main()
