"""Adapter files of other programs: their key names and kinds of adapter, to and from changes by layer.

`FORMATS` has how programs name layers, `deft_kinds.KINDS` what a layer's tensors are; every name goes with every kind.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from networks import deft_factors, deft_io, deft_names
from networks.deft_config import DeftError, reason_of
from networks.deft_factors import Factors
from networks.deft_kinds import Change, Dense, Facts, OnBase, change_of
from networks.deft_names import DENOISER, FORMATS, Format
from networks.deft_targets import TOGETHER

__all__ = [
    "FORMATS",
    "Adapter",
    "Change",
    "Dense",
    "Format",
    "OnBase",
    "parse",
    "peft_config",
    "read",
    "tensors_as",
    "to_factors",
]

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
AUTHORS_FILE, AUTHORS_CONFIG = "knowledge_injection_state.bin", "knowledge_injection_config"
PEFT_KEY = deft_io.PEFT_KEY


# The end of a key -> the tensor's name in `deft_kinds`; adapters of peft have a name of their own in states.
_TENSORS = (
    (r"\.lora_(?:up|B)(?:\.default)?\.weight$", "lora_up.weight"),
    (r"\.lora_(?:down|A)(?:\.default)?\.weight$", "lora_down.weight"),
    (r"\.lora_mid\.weight$", "lora_mid.weight"),
    (r"(?:\.|_)lora(?:_linear_layer)?\.(up|down)\.weight$", r"lora_\1.weight"),
    (r"(?<=lora[12])\.(up|down)\.weight$", r"lora_\1.weight"),  # XLabs
    (r"\.(?:alpha|lora_alpha|network_alpha)$", "alpha"),
    (r"\.dora_scale$", "dora_scale"),
    (r"\.(?:lora_magnitude_vector(?:\.default)?(?:\.weight)?|magnitude)$", "magnitude"),
    (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.default)?$", r"\1"),
    (r"\.(oft_blocks|rescale|on_input|ia3_l|diff|set_weight)(?:\.default)?$", r"\1"),
    (r"\.oft_diag$", "oft_blocks"),
    (r"\.oft_R(?:\.default)?(?:\.weight)?$", "oft_R"),
    (r"\.oft_R\.scaled_oft$", "scaled_oft"),
    (r"\.((?:a1|a2|b1|b2|bm)\.weight)$", r"\1"),
    (r"\.(deft_(?:P(?:_\w+)?|R|E0|g|Q))(?:\.default)?$", r"\1"),
    (r"\.(diff_b|w_norm|b_norm)$", r"\1"),
    (r"\.(lora_[AB]|lora_up|lora_down)(?:\.default)?\.bias$", "lora_bias"),
    (r"\.(weight|bias)$", r"\1"),
)
_LEFT = {
    "diff_b": "a bias: no change of a weight",
    "lora_bias": "a bias: no change of a weight",
    "bias": "a bias: no change of a weight",
    "w_norm": "a norm's weight: no layer that LoRAs adapt",
    "b_norm": "a norm's bias: no layer that LoRAs adapt",
}
_EMBEDDING = "an embedding (textual inversion): no change of a weight"
# convolutions of U-Nets by their key names; proj_in and proj_out are linear in SD 2.x and SDXL
_K3 = re.compile(r"_(conv[12]?|conv_in|conv_out|in_layers_2|out_layers_3|op)$")
_K1 = re.compile(r"_(conv_shortcut|skip_connection)$")
_K1_OF_SD1 = re.compile(r"_attentions_\d+_proj_(in|out)$")


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds, whatever wrote it.

    :param format: of `FORMATS`
    :param architecture: name of a row of `deft_architectures.ARCHITECTURES`, "" if it cannot be seen
    :param changes: by kohya's key name of the whole weight, as sd-scripts' LoRA has it; made when they are asked for
    :param left: key -> why it is no change of a weight (embeddings, biases, norms)
    :param dtype: that of most of its tensors
    """

    source: str
    format: str
    architecture: str
    changes: Mapping[str, Change]
    metadata: Mapping[str, str]
    left: Mapping[str, str]
    dtype: torch.dtype


class _Made(Mapping[str, Change]):
    """Changes that are made anew each time, from what the file holds: no second copy of it stays in memory."""

    def __init__(self, makers: Mapping[str, Callable[[], Change]], source: str) -> None:
        self._makers, self._source = makers, source

    def __getitem__(self, name: str) -> Change:
        change = self._makers[name]()
        if isinstance(change, Factors):
            return change
        place = f"{self._source}: {name}"
        if isinstance(change, Dense):
            return replace(change, delta=_checked(change.delta, place))
        of_all = None if change.of_all is None else _checked(change.of_all, place)
        return replace(change, delta=_checked(change.delta, place), of_all=of_all)

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _checked(delta: Callable[..., Tensor], place: str) -> Callable[..., Tensor]:
    """`delta`, with a user's error instead of torch's where shapes in a damaged file do not fit each other."""

    def checked(*weight: Tensor) -> Tensor:
        try:
            return delta(*weight)
        except DeftError:
            raise
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
            raise DeftError(f"{place} is damaged, or is no change of this weight ({reason_of(error)})") from None

    return checked


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> Adapter:
    """An adapter file of any known format, or a folder of peft's (of one model, or with a folder for each), or of the
    DEFT paper's authors' code.

    :raises DeftError: when it cannot be read, is damaged, or is of no known format
    """
    path = Path(path)
    authors = path if path.is_dir() else path.parent
    if (authors / AUTHORS_FILE).is_file() and (path.is_dir() or path.name == AUTHORS_FILE):
        return _read_authors(authors)
    folders = _peft_folders(path)
    if not folders:
        return parse(*deft_io.read_tensors(path), str(path))
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    configs: dict[str, object] = {}
    for model, folder in folders:
        found, metadata = deft_io.read_tensors(folder / PEFT_FILE if folder.is_dir() else folder)
        config = _read_config((folder if folder.is_dir() else folder.parent) / PEFT_CONFIG)
        model = model or _peft_model(found, str(path))
        tensors |= {re.sub(r"^base_model\.model\.", f"{model}.", key): value for key, value in found.items()}
        configs |= {f"{model}.{key}": value for key, value in config.items()}
    adapter = parse(tensors, {**metadata, PEFT_KEY: json.dumps(configs)}, str(path))
    return replace(adapter, format="peft", metadata=metadata)


def _peft_folders(path: Path) -> list[tuple[str, Path]]:
    """(Diffusers' name of the model, "" if it is not in the folder's; folder or file) of each model's adapter."""
    if not path.is_dir():
        beside = (path.parent / PEFT_CONFIG).is_file() and path.name.startswith("adapter_model")
        return [(_model_in(path.parent.name), path)] if beside else []
    if (path / PEFT_CONFIG).is_file():
        return [(_model_in(path.name), path)]
    found = [(_model_in(folder.name), folder) for folder in sorted(path.iterdir()) if (folder / PEFT_CONFIG).is_file()]
    if not found:
        raise no_adapter_in(path)
    return found


def no_adapter_in(folder: Path) -> DeftError:
    """What to say of a folder without one."""
    models = ("model_index.json", "diffusion_pytorch_model*", "model*.safetensors")
    if any(next(folder.glob(name), None) for name in models):
        return DeftError(f"{folder}: this is a model in Diffusers' form, where an adapter is to be given")
    return DeftError(f"{folder}: a folder without {PEFT_CONFIG}; give a file, or a folder that peft has written")


def _model_in(folder: str) -> str:
    return folder if re.match(r"(unet|transformer|text_encoder(_[23])?)$", folder) else ""


def _read_config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {key: value for key, value in dict(config).items() if value is not None}
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise DeftError(f"{path}: cannot be read ({reason_of(error)})") from None


def _peft_model(tensors: Mapping[str, Tensor], source: str) -> str:
    """The model of a peft folder, by its layers."""
    path = next(iter(tensors), "").removeprefix("base_model.model.")
    if re.match(r"(text_model\.)?encoder\.layers\.|text_projection", path):
        second = any(w in t.shape for w in (1280,) for t in tensors.values()) or "text_encoder_2" in source
        return "text_encoder_2" if second else "text_encoder"
    return "text_encoder_2" if re.match(r"encoder\.block\.", path) else "unet"


def _read_authors(folder: Path) -> Adapter:
    """What deft/deft.py of MAXNORM8650/DEFT (commit 06805df) saves; its forward pass is in deft/injection.py.

    :raises DeftError: when it cannot be read without running code, or is damaged
    """
    source = str(folder / AUTHORS_FILE)
    state = _unpickled(folder / AUTHORS_FILE)
    as_json = folder / f"{AUTHORS_CONFIG}.json"
    config = _read_config(as_json) if as_json.is_file() else _unpickled(folder / f"{AUTHORS_CONFIG}.bin")
    layers = config.get("layer_configs")
    found = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    if not isinstance(layers, dict) or len(found) < len(state):
        raise DeftError(f"{source}: damaged, or not what the authors' code saves")
    tensors: dict[str, Tensor] = {}
    methods = set()
    for key, tensor in found.items():
        layer, _, name = str(key).rpartition(".")
        of_layer = layers.get(layer)
        if not isinstance(of_layer, dict):
            raise DeftError(f"{source}: {layer} is not in {AUTHORS_CONFIG}")
        additive = of_layer.get("injection_method") == "additive_update"
        method = str(of_layer.get("decomposition_method"))
        methods.add(method if not additive else "")
        new = _AUTHORS_NAMES[additive].get(name)
        if new is not None:
            tensors[f"diffusion_model.{layer}.{new}"] = tensor
        if additive and name == "lora_A":  # its alpha / r; the other methods have none
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(of_layer.get("lora_alpha", 8.0)))
    if len(methods - {""}) > 1:
        raise DeftError(f"{source}: layers of several decomposition methods, {', '.join(sorted(methods))}")
    method = next(iter(methods - {""}), "qr")
    peft = json.dumps({"unet.decomposition_method": "relu" if method == "None" else method})
    return replace(parse(tensors, {PEFT_KEY: peft}, source), format="authors", metadata={})


_AUTHORS_NAMES = (
    {"P": "deft_P", "R_new": "deft_R", "gate": "deft_g", "Q_P_cached": "deft_Q"},
    {"lora_A": "lora_up.weight", "lora_B": "lora_down.weight", "gate": "deft_g"},
)


def _unpickled(path: Path) -> dict[str, object]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a pickle of anything may raise; nothing of it was run
        raise DeftError(f"{path}: cannot be read without running code of its own ({reason_of(error)})") from None


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Adapter:
    """An adapter of any known format, by its tensors.

    :raises DeftError: when it is damaged or of no known format
    """
    layers, left = _by_layer(tensors, source)
    if not layers:
        raise DeftError(f"{source}: holds no adapter layers")
    models = {layer: deft_names.model_of(layer.partition(TOGETHER)[0]) for layer in layers}
    widths = {
        parts["lora_down.weight"].shape[1]
        for layer, parts in layers.items()
        if "lora_down.weight" in parts and re.search(r"attn2[._]to_k$", layer) and parts["lora_down.weight"].dim() > 1
    }
    seen = [(model, path) for _, model, path in models.values()]
    architecture = deft_names.recognised(seen, widths, metadata)
    makers = _makers(layers, models, architecture, metadata, source)
    formats = Counter(format.name for format, _, _ in models.values())
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel()
    format, dtype = formats.most_common(1)[0][0], sizes.most_common(1)[0][0]
    return Adapter(source, format, architecture, _Made(makers, source), metadata, left, dtype)


def _by_layer(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """A layer's key -> its tensors by their names in `deft_kinds`, and the keys that are left with the reason."""
    layers: dict[str, dict[str, Tensor]] = {}
    left: dict[str, str] = {}
    for key, tensor in tensors.items():
        if key.startswith(deft_io.EMBEDDINGS) or key in ("clip_l", "clip_g", "t5xxl"):
            left[key] = _EMBEDDING
            continue
        layer, name = _split(key)
        if name in _LEFT or (name == "diff" and tensor.dim() < 2):
            left[key] = _LEFT.get(name, "a norm's or bias's: no layer that LoRAs adapt")
            continue
        if not name or not layer:
            raise DeftError(f"{source}: {key} is of no kind of adapter that is known here")
        if name == "magnitude":  # one length an output, whatever its shape
            name, tensor = "dora_scale", tensor.reshape(-1, 1)
        parts = layers.setdefault(layer, {})
        if name in parts:
            raise DeftError(f"{source}: {layer} has two tensors for {name}, {key} for one")
        parts[name] = tensor
        if name == "ia3_l" and tensor.shape[0] > 1:
            left[f"{layer}.bias"] = "where there is one, peft's (IA)^3 scales it with the weight; a bias is no weight"
    for layer in [layer for layer, parts in layers.items() if parts.keys() == {"weight"}]:
        raise DeftError(f"{source}: {layer}.weight is of no kind of adapter that is known here")
    return layers, left


def _split(key: str) -> tuple[str, str]:
    for pattern, name in _TENSORS:
        found = re.search(pattern, key)
        if found:
            return key[: found.start()], found.expand(name) if "\\" in name else name
    return key, ""


def _makers(
    layers: Mapping[str, Mapping[str, Tensor]],
    models: Mapping[str, tuple[Format, str, str]],
    architecture: str,
    metadata: Mapping[str, str],
    source: str,
) -> dict[str, Callable[[], Change]]:
    """Kohya's key name -> what makes the change of the whole weight.

    :raises DeftError: for a layer that is damaged, of no known kind, or that the architecture does not have
    """
    row = deft_names.named(architecture)
    configs = _configs(metadata, source)
    recorded = deft_io.parse_metadata(metadata, source)[1]
    first_generation = architecture.startswith("Stable Diffusion 1") and not _is_second(layers, metadata)
    pieces: dict[str, dict[str, Callable[[], Change]]] = {}
    for layer, parts in layers.items():
        format, model, path = models[layer]
        path, _, given = re.sub(r"-(\d+)$", r"#\1", path).partition("#")  # a part by our own files' names
        several = [deft_names.model_of(one)[2] for one in layer.split(TOGETHER)] if TOGETHER in layer else []
        several = several or deft_names.layers_in(row, model, path)
        try:
            names = [deft_names.key_name(row, model, one) for one in several or (path,)]
            name, piece = (layer, "") if model == "kept" else names[0]
        except KeyError:
            raise DeftError(f"{source}: {layer} is no layer of {architecture}, whose names the others are") from None
        if row is None and format.name in ("diffusers", "bare"):
            raise DeftError(f"{source}: {layer} is of a model whose names are not known here")
        config = configs.get(model, {})
        kernel = _kernel(name, first_generation)
        said = _pattern_value(config, "rank_pattern", "r", path)
        rank = None if said is None else int(said)
        record = recorded.get(layer) or recorded.get(name)
        facts = Facts(config, path, rank, str(metadata.get("ss_network_module", "")), record, kernel)
        make = _maker(layer, _with_alpha(parts, config, rank, path), facts, source)
        make()  # which finds what is wrong with it
        made = [(name, given or piece, make)]
        if several:
            of = [name for name, _ in names]
            made = [(name, piece, _share(make, k, of, layer, source)) for k, (name, piece) in enumerate(names)]
        for name, piece, one in made:
            if piece in pieces.setdefault(name, {}) or (pieces[name] and "" in (piece, *pieces[name])):
                raise DeftError(f"{source}: {layer} is there twice, under another name also")
            pieces[name][piece] = one
    return _wholes(pieces, source)


def _share(make: Callable[[], Change], k: int, names: Sequence[str], layer: str, source: str) -> Callable[[], Change]:
    """What makes the k-th of so many equal parts of a change, row by row.

    :param names: key names of the layers that are in one
    :raises DeftError: where it has no such parts
    """

    def share() -> Change:
        change = make()
        rows = change.shape[0] // len(names)
        if rows * len(names) != change.shape[0]:
            raise DeftError(f"{source}: {layer} is of {len(names)} layers in one, which are not of one size")
        if isinstance(change, Factors):
            return deft_factors.rows_of(change, k * rows, rows)
        shape = (rows, *change.shape[1:])
        if isinstance(change, Dense):
            whole = change.delta
            return replace(change, shape=shape, delta=lambda: whole()[k * rows : (k + 1) * rows])
        of_all = change.delta
        refused = functools.partial(_refuse_apart, layer, source)
        return OnBase(change.kind, shape, refused, tuple(names), lambda W: of_all(W).chunk(len(names))[k])

    share()  # which finds what is wrong with it
    return share


def _refuse_apart(layer: str, source: str, W: Tensor) -> Tensor:
    raise DeftError(
        f"{source}: {layer} is of several layers in one and depends on all their weights; make a LoRA of it with "
        f"convert_deft.py --base MODEL first"
    )


def _wholes(pieces: Mapping[str, Mapping[str, Callable[[], Change]]], source: str) -> dict[str, Callable[[], Change]]:
    """:raises DeftError: when pieces of one weight do not fit each other"""
    behind = [found["3"]().shape[0] for found in pieces.values() if "3" in found]
    makers: dict[str, Callable[[], Change]] = {}
    for name, found in pieces.items():
        makers[name] = found.get("") or _assembling(found, name.endswith("_linear1"), max(behind, default=None))
        if "" not in found:
            try:
                makers[name]()
            except (ValueError, RuntimeError) as error:
                raise DeftError(f"{source}: {name} is damaged ({reason_of(error)})") from None
    return makers


def _is_second(layers: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> bool:
    """Whether a Stable Diffusion is 2.x, by its text's width or metadata."""
    said = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}"
    downs = [p["lora_down.weight"] for layer, p in layers.items() if layer.endswith("to_k") and "lora_down.weight" in p]
    return "v2" in said or metadata.get("ss_v2") == "True" or any(down.shape[1:2] == (1024,) for down in downs)


def _kernel(name: str, first_generation: bool) -> tuple[int, int] | None:
    if not name.startswith("lora_unet"):
        return None
    pointwise = _K1.search(name) or (first_generation and _K1_OF_SD1.search(name))
    return (3, 3) if _K3.search(name) else (1, 1) if pointwise else None


def _maker(layer: str, parts: Mapping[str, Tensor], facts: Facts, source: str) -> Callable[[], Change]:
    def make() -> Change:
        try:
            return change_of(parts, facts)
        except KeyError as missing:
            raise DeftError(f"{source}: {layer} is of no kind of adapter that is known here ({missing})") from None
        except (ValueError, RuntimeError, IndexError, TypeError, ArithmeticError) as error:
            raise DeftError(f"{source}: {layer} is damaged ({reason_of(error)})") from None

    return make


def _configs(metadata: Mapping[str, str], source: str) -> dict[str, dict[str, object]]:
    """Model -> peft's configuration of its adapter."""
    try:
        found = dict(json.loads(metadata.get(PEFT_KEY, "{}")))
    except (TypeError, ValueError, RecursionError) as error:
        raise DeftError(f"{source}: its {PEFT_KEY} cannot be read ({reason_of(error)})") from None
    configs: dict[str, dict[str, object]] = {}
    for key, value in found.items():
        model, _, name = str(key).partition(".")
        configs.setdefault(DENOISER if model in ("unet", "transformer") else model, {})[name] = value
    return configs


def recorded_alpha(metadata: Mapping[str, str], layer: str, rank: int) -> float | None:
    """A layer's alpha where `save_lora_weights` of diffusers has put it: into the metadata, beside no tensor.

    :param layer: as its keys begin
    :param rank: its rank in the file
    """
    if PEFT_KEY not in metadata:
        return None
    _, model, path = deft_names.model_of(layer)
    try:
        config = _configs(metadata, "").get(model, {})
    except DeftError:  # which reading the file tells
        return None
    parts = {"lora_down.weight": torch.empty(rank, 0)}
    found = _with_alpha(parts, config, rank, path).get("alpha")
    return None if found is None else float(found)


def _pattern_value(config: Mapping[str, object], patterns: str, default: str, path: str) -> float | None:
    """peft's value for a layer: that of the first pattern that fits the end of its path, or the one for all."""
    found = config.get(patterns)
    value = config.get(default)
    for pattern, number in found.items() if isinstance(found, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                value = number
                break
        except re.error:
            continue
    return value if isinstance(value, int | float) and 0 < value < 1e6 else None


def _with_alpha(
    parts: Mapping[str, Tensor], config: Mapping[str, object], rank: int | None, path: str
) -> Mapping[str, Tensor]:
    """A layer's tensors with the alpha that peft has in its configuration."""
    default = next((key for key in ("lora_alpha", "alpha") if key in config), "")
    if not default or "alpha" in parts:
        return parts
    alpha: float | None = _pattern_value(config, "alpha_pattern", default, path)
    if alpha is None:
        return parts
    if config.get("use_rslora") and "lora_down.weight" in parts:
        alpha *= math.sqrt(parts["lora_down.weight"].shape[0])
    return {**parts, "alpha": torch.tensor(float(alpha))}


# --- weights that some programs have in pieces ------------------------------------------------------------------------


def _assembling(
    pieces: Mapping[str, Callable[[], Change]], with_mlp: bool, mlp_rows: int | None
) -> Callable[[], Change]:
    return lambda: assembled({piece: make() for piece, make in pieces.items()}, with_mlp, mlp_rows)


def assembled(pieces: Mapping[str, Change], with_mlp: bool = False, mlp_rows: int | None = None) -> Change:
    """The change of a fused weight by those of its pieces: "0", "1", "2" are queries, keys and values of equal size,
    "012" all three, "3" the fully connected layer behind them; a piece that is not there does not change.

    :param with_mlp: whether that layer stands behind them
    :param mlp_rows: its outputs where it is not there; None for four times the queries', as in FLUX.1
    :raises ValueError: when their shapes do not fit
    """
    if "swapped" in pieces:
        return _swapped(pieces["swapped"])
    inputs = {change.shape[1:] for change in pieces.values() if 0 not in change.shape[1:]}
    sizes = {c.shape[0] / len(piece) for piece, c in pieces.items() if piece != "3" and c.shape[0]}
    if len(inputs) > 1 or len(sizes) > 1 or sizes - {1.0 * size for size in map(int, sizes)}:
        shapes = " and ".join(str(tuple(change.shape)) for change in pieces.values())
        raise ValueError(f"changes of {shapes} are no pieces of one weight")
    if not all(change.shape[0] for change in pieces.values()):  # of these kinds, only the weight tells how large
        kind = next(change.kind for change in pieces.values() if isinstance(change, OnBase))
        return OnBase(kind, (0, *next(iter(inputs), (0,))), lambda W: _by_weight(pieces, W))
    hidden = int(next(iter(sizes), 0)) or next(iter(inputs), (0,))[0]
    behind = pieces["3"].shape[0] if "3" in pieces else (mlp_rows or 4 * hidden) if with_mlp else 0
    first = {"0": 0, "1": hidden, "2": 2 * hidden, "012": 0, "3": 3 * hidden}
    return _stacked([(pieces[piece], first[piece]) for piece in sorted(pieces)], 3 * hidden + behind)


def _by_weight(pieces: Mapping[str, Change], W: Tensor) -> Tensor:
    """The change of a fused weight (m, n) whose queries are n, as many as its inputs."""
    n = W.shape[1]
    rows = {"0": (0, n), "1": (n, n), "2": (2 * n, n), "012": (0, 3 * n), "3": (3 * n, len(W) - 3 * n)}
    whole = torch.zeros_like(W)
    for piece, change in pieces.items():
        first, number = rows[piece]
        part = slice(first, first + number)
        whole[part] = change.delta(W[part]) if isinstance(change, OnBase) else change.delta()
    return whole


def _swapped(change: Change) -> Change:
    """With the two halves of its rows in each other's place."""
    half = change.shape[0] // 2
    if isinstance(change, Factors):
        return Factors(change.up.roll(half, 0), change.down, change.kernel)
    if isinstance(change, Dense):
        return replace(change, delta=lambda: change.delta().roll(half, 0))
    return replace(change, delta=lambda W: change.delta(W.roll(half, 0)).roll(half, 0))


def _stacked(parts: Sequence[tuple[Change, int]], total: int) -> Change:
    """Changes of some rows of a weight each, from the given row on, as one change of it."""
    factors = [(change, first) for change, first in parts if isinstance(change, Factors)]
    if len(factors) == len(parts):
        return deft_factors.shared(deft_factors.stacked(factors, total))
    some = next(change for change, _ in parts if not isinstance(change, Factors))
    shape = (total, *some.shape[1:])
    if not any(isinstance(change, OnBase) for change, _ in parts):
        return Dense(some.kind, shape, lambda: _rows(parts, None, total))
    return OnBase(some.kind, shape, lambda W: _rows(parts, W, total))


def _rows(parts: Sequence[tuple[Change, int]], W: Tensor | None, total: int) -> Tensor:
    whole: Tensor | None = None
    for change, first in parts:
        rows = slice(first, first + change.shape[0])
        found = change.delta(W[rows]) if isinstance(change, OnBase) and W is not None else change.delta()  # type: ignore
        whole = found.new_zeros(total, found.shape[1]) if whole is None else whole
        whole[rows] = found
    assert whole is not None
    return whole


# --- writing ----------------------------------------------------------------------------------------------------------


def tensors_as(
    format: str, changes: Mapping[str, Factors], dtype: torch.dtype, pad: bool, architecture: str
) -> dict[str, Tensor]:
    """A plain LoRA's tensors under a format's names.

    :param format: "kohya", "diffusers", "comfy", or "peft", which is of one model
    :param changes: by kohya's key names, float32
    :param pad: one rank in the whole file, as `deft_io.lora_tensors`
    :param architecture: name of a row of `deft_architectures.ARCHITECTURES`
    :raises DeftError: when the format has no names for them
    """
    if not changes:
        raise DeftError("nothing to write: no layer is changed")
    if format == "kohya":
        return deft_io.lora_tensors(changes, dtype, pad)[0]
    if format not in ("diffusers", "comfy", "peft"):
        raise DeftError(f"format {format}: only kohya, diffusers, comfy and peft are written")
    placed = _placed(format, changes, architecture)
    row = deft_names.named(architecture)
    if format == "peft" and row is not None and row.peft_form != "diffusers":
        placed, pad = _evened(placed), False
    tensors: dict[str, Tensor] = {}
    for key, tensor in deft_io.lora_tensors(placed, dtype, pad)[0].items():
        if not key.endswith(".alpha"):  # alpha is the rank, which is what all take where none is there
            tensors[re.sub(r"\.lora_(up|down)\.weight$", lambda m: _AB[m[1]], key)] = tensor
    return tensors


_AB = {"up": ".lora_B.weight", "down": ".lora_A.weight"}


def _placed(format: str, changes: Mapping[str, Factors], architecture: str) -> dict[str, Factors]:
    """By a format's keys of layers, fused weights in pieces where it has them so."""
    row = deft_names.named(architecture)
    if row is None:
        raise DeftError(
            f"format {format}: the names of {architecture or 'this model'}'s layers in it are not known here"
        )
    placed: dict[str, Factors] = {}
    parts_of: dict[str, dict[str, Change]] = {}  # of layers that are several weights in one
    models = set()
    form = {"comfy": "original", "peft": row.peft_form}.get(format, "diffusers")
    for name, factors in changes.items():
        try:
            places = deft_names.places(row, name, form)
        except KeyError:
            places = []
        if not places or (format == "comfy" and "#" in places[0][1]):  # of no model that ComfyUI knows
            raise DeftError(f"format {format}: {name} has no name in it that is known here")
        models.add(places[0][0])
        if format == "peft" and len(models) > 1:
            raise DeftError("format peft: one file is of one model; write the text encoders' layers apart")
        prefix = _prefix(format, row, places[0][0], factors)
        parts = _split_rows(factors, [piece for _, _, piece in places])
        for (model, path, _), part in zip(places, parts, strict=True):
            if format == "peft" and model == "text_encoder":  # transformers 5; CLIPTextModelWithProjection has it still
                path = path.removeprefix("text_model.")
            path, _, number = path.partition("#")
            if number:
                parts_of.setdefault(f"{prefix}{path}", {})[number] = part
            else:
                placed[f"{prefix}{path}"] = part
    for layer, found in parts_of.items():
        whole = assembled(found)
        assert isinstance(whole, Factors)
        placed[layer] = whole
    return placed


def _evened(placed: Mapping[str, Factors]) -> dict[str, Factors]:
    """With zeros to one rank for all layers of a kind, by which peft's `rank_pattern` names them."""
    ranks: dict[str, int] = {}
    for layer, factors in placed.items():
        kind = layer.rpartition(".")[2]
        ranks[kind] = max(factors.rank, ranks.get(kind, 0))
    return {layer: deft_factors.padded(f, ranks[layer.rpartition(".")[2]]) for layer, f in placed.items()}


def _prefix(format: str, row: deft_names.Architecture, model: str, factors: Factors) -> str:
    if format == "peft":
        return "base_model.model."
    if format == "diffusers":
        transformer = not any(part.prefix and "UNet" in "".join(part.model_classes) for part in row.denoisers)
        return {DENOISER: "transformer." if transformer else "unet."}.get(model, f"{model}.")
    if model == DENOISER:
        return "diffusion_model."
    encoder = deft_names.encoder_of(row, model)
    if encoder is None or not encoder.comfy:
        raise DeftError(f"format {format}: the names of {row.name}'s text encoder in it are not known here")
    wide = len(encoder.comfy) > 1 and min(factors.up.shape[0], factors.kernel[0]) >= 1024
    return f"text_encoders.{encoder.comfy[wide]}.transformer."


def _split_rows(factors: Factors, pieces: Sequence[str]) -> list[Factors]:
    """Queries, keys and values of a fused weight, and what stands behind them if they are four."""
    if len(pieces) == 1:
        return [_swapped(factors) if pieces[0] else factors]  # type: ignore[list-item]
    m, number = factors.up.shape[0], len(pieces)
    hidden = m // 3 if number == 3 else factors.kernel[0]
    if 3 * hidden > m or (number == 3 and m % 3):
        raise DeftError(f"a weight of {m} x {factors.kernel[0]} is no {number} layers in one")
    sizes = [hidden] * 3 + ([m - 3 * hidden] if number == 4 else [])
    return [deft_factors.rows_of(factors, sum(sizes[:k]), size) for k, size in enumerate(sizes)]


def peft_config(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The content of adapter_config.json for what `tensors_as("peft", ...)` has made.

    Layers are named whole, so that peft refuses a model whose own are named in another way.
    """
    ranks = {
        key.removesuffix(".lora_A.weight"): t.shape[0] for key, t in tensors.items() if key.endswith("lora_A.weight")
    }
    rank = Counter(sorted(ranks.values())).most_common(1)[0][0]
    paths = {key.removeprefix("base_model.model."): value for key, value in ranks.items()}
    of_kind: dict[str, set[int]] = {}
    for path, value in paths.items():
        of_kind.setdefault(path.rpartition(".")[2], set()).add(value)
    others = {}
    for path, value in paths.items():
        kind = path.rpartition(".")[2]
        if value != rank:  # by the last word where that is enough: peft before 0.14 does not know whole paths
            alone = len(of_kind[kind]) == 1 and not kind.isdecimal()
            others[kind if alone else f"^{re.escape(path)}"] = value
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": f"(?:{'|'.join(map(re.escape, sorted(paths)))})",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "task_type": None,
    }


# --- any change as two factors ----------------------------------------------------------------------------------------


def to_factors(
    change: Change, rank: int | None, energy: float | None, base: Callable[[], Tensor] | None
) -> tuple[Factors, float]:
    """A change as two factors, and its relative Frobenius error: 0 where nothing had to be cut.

    :param rank: the highest rank; None for what is exact
    :param energy: the part of the squared norm to be kept, 0 to 1; None for all
    :param base: the weight (m, n) that an `OnBase` depends on
    :raises ValueError: when the base is needed and not there, or has another shape
    """
    if not isinstance(change, Factors):
        found, error = deft_factors.approximated(_matrix_of(change, base), _behind_outputs(change, base), rank, energy)
        sizes = found.up.square().sum(0)  # the singular values: two factors of equal size
        used = sizes > deft_factors.NEGLIGIBLE * sizes.max()  # no rank for what is rounding
        return replace(found, up=found.up[:, used], down=found.down[used]), error
    if energy is None and (rank is None or change.rank <= rank):
        return change, 0.0
    whole = deft_factors.decomposed(change)
    needed = len(whole.values) if energy is None else deft_factors.rank_of_energy(whole.values, energy)
    return whole.truncated(max(1, min(needed, len(whole.values), rank or needed)))


def _behind_outputs(change: Dense | OnBase, base: Callable[[], Tensor] | None) -> tuple[int, ...]:
    if isinstance(change, OnBase) and 0 in change.shape and base is not None:
        return tuple(base().shape[1:])
    return change.shape[1:]


def _matrix_of(change: Dense | OnBase, base: Callable[[], Tensor] | None) -> Tensor:
    if isinstance(change, Dense):
        return change.delta()
    if base is None:
        raise ValueError(f"{change.kind} depends on the base model's weights")
    W = base().float()
    if change.of_all is not None:
        return change.of_all(W.flatten(1))
    if change.shape[0] not in (0, W.shape[0]) or math.prod(change.shape[1:]) not in (0, W[0].numel()):
        raise ValueError(f"made for a weight of {change.shape}, the base model's is {tuple(W.shape)}")
    return change.delta(W.flatten(1))
