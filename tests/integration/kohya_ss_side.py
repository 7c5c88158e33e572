"""Runs beside test_kohya_ss.py: the GUI without a browser, and its `accelerate`.

    kohya_ss_side.py gui FOLDER REQUEST.json RESULT.json   in the GUI's environment; FOLDER is the GUI's
    kohya_ss_side.py accelerate launch ... SCRIPT ...      in sd-scripts' environment, started by the GUI

The first makes the LoRA tab from the GUI's own code, chooses and fills in what the request says, and does what its
buttons do. The second is what the GUI finds as `accelerate`: it does not train, but reads the arguments with
sd-scripts' own parser and loads the network module that they name.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


class Page:
    """The values of the tab's boxes, and what a browser does with them."""

    def __init__(self) -> None:
        import gradio
        from kohya_gui import lora_gui
        from kohya_gui.class_gui_config import KohyaSSGUIConfig

        with gradio.Blocks() as self.blocks:
            lora_gui.lora_tab(headless=True, config=KohyaSSGUIConfig())
        self.gui = lora_gui
        self.entries = lora_gui.last_built_gui_entries
        self.boxes = dict(lora_gui.last_built_field_registry)
        self.values = {box: getattr(box, "value", None) for box in self.blocks.blocks.values()}
        # an empty text box is None to Python and "" to the browser
        self.values |= {
            box: "" for box, value in self.values.items() if value is None and type(box).__name__ == "Textbox"
        }
        self.presets = self.entries["components"]["training_preset"]
        self.fresh = dict(self.values)

    def choices(self) -> list[str]:
        return [value for _, value in self.presets.choices]

    def choose(self, preset: str) -> None:
        self.values[self.presets] = preset
        self.update(self.entries["apply_preset"](self.values))

    def fill_in(self, values: dict[str, Any]) -> None:
        self.update({self.boxes[name]: value for name, value in values.items()})

    def update(self, outputs: dict[Any, Any]) -> None:
        """Takes over what a function returned: new values, or new properties. Boxes that change start their events."""
        changed = set()
        for box, new in outputs.items():
            if hasattr(new, "get_config") or (isinstance(new, dict) and new.get("__type__") == "update"):
                given = new if isinstance(new, dict) else new.constructor_args
                if "value" not in given:
                    continue
                new = given["value"]
            if self.values[box] != new:
                self.values[box] = new
                changed.add(box._id)
        for event in self.blocks.fns.values():
            if event.fn is not None and any((i, "change") in event.targets for i in changed):
                result = event.fn(*[self.values[box] for box in event.inputs])
                results = result if isinstance(result, tuple) else (result,)
                self.update(dict(zip(event.outputs, results, strict=True)) if event.outputs else {})

    def shown(self) -> dict[str, Any]:
        return {name: self.values[box] for name, box in self.boxes.items()}

    def start(self) -> int | None:
        """The button `Start training`; returns the exit code of what was started, None if nothing was."""
        self.entries["train_model"](self.values)
        process = self.gui.executor.process
        return process and process.wait()

    def print_command(self) -> None:
        self.entries["print_command"](self.values)


def gui(folder: str, request_file: str, result_file: str) -> None:
    sys.path.insert(0, folder)
    import toml

    page, results = Page(), []
    for case in json.loads(Path(request_file).read_text()):
        page.values = dict(page.fresh)
        for step in case["steps"]:
            page.choose(step) if isinstance(step, str) else page.fill_in(step)
        result: dict[str, Any] = {"choices": page.choices(), "shown": page.shown()}
        if case["start"]:
            result["exit_code"] = page.start()
        else:
            page.print_command()
        (file,) = Path(page.shown()["output_dir"]).glob("*.toml")
        result["toml"] = toml.load(file)
        file.unlink()
        results.append(result)
    Path(result_file).write_text(json.dumps(results, default=str))


def accelerate(arguments: list[str]) -> None:
    at = next(i for i, argument in enumerate(arguments) if argument.endswith("_network.py"))
    script = Path(arguments[at])
    sys.argv = [str(script), *arguments[at + 1 :]]
    sys.path[0] = str(script.parent)  # as for a script that Python runs
    trainer = importlib.import_module(script.stem)
    parser = trainer.setup_parser()
    options = getattr(trainer, "args_util", None) or trainer.train_util  # before v0.11
    args = parser.parse_args()
    options.verify_command_line_training_args(args)
    args = options.read_config_from_file(args, parser)
    network = importlib.import_module(args.network_module)
    recorded: dict[str, Any] = {
        "launch": arguments[:at],
        "script": str(script),
        "args": vars(args),
        "network_file": network.__file__,
    }
    if args.network_module == "networks.deft":
        config = importlib.import_module("networks.deft_config")
        given = dict(argument.split("=", 1) for argument in args.network_args or [])  # as train_network.py does
        options_given = {"dim": args.network_dim, "alpha": args.network_alpha, **config.user_options(given)}
        recorded["config"] = str(config.parse_options(options_given))
    with open(os.environ["RECORDED"], "a") as file:
        file.write(json.dumps(recorded, default=str) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "gui":
        gui(*sys.argv[2:])
    else:
        accelerate(sys.argv[2:])
