"""The stand-alone trainer's rooms. Nothing is imported here: the bootstrap runs before anything is installed."""

import os

for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):  # theirs are for their developers
    os.environ.setdefault(_name, "error")
