"""Makes `networks` one package with a trainer's folder of that name.

sd-scripts' has no `__init__.py`, musubi-tuner's has one, and where any folder on the path has one, Python leaves out
those without. So this one takes in all: `networks.deft` is found beside the trainer's own modules, whichever comes
first. It stays behind when the `*deft*.py` are copied into a trainer's folder.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
