"""What sd-scripts itself writes as ModelSpec's fields: `python metadata_side.py FILE [WORDS OF A COMMAND LINE ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(file: Path, kind: str, words: list[str]) -> None:
    from library import sai_model_spec, train_util

    parser = argparse.ArgumentParser()
    sai_model_spec.add_model_spec_arguments(parser)
    of_train_util = (train_util.add_sd_models_arguments, train_util.add_training_arguments)
    train_util.add_dataset_arguments(parser, True, True, True)
    for add in of_train_util:
        add(parser, True) if add is train_util.add_training_arguments else add(parser)
    args, _ = parser.parse_known_args(words)
    args.resolution = tuple(map(int, str(args.resolution).split(","))) if args.resolution else None
    flux = {"flux": "dev"} if kind == "flux" else {}
    options = [action.dest for action in parser._actions if action.dest.startswith("metadata_")]
    found = train_util.get_sai_model_spec(None, args, kind == "sdxl", True, False, **flux)
    file.write_text(json.dumps({"fields": found, "options": options}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
