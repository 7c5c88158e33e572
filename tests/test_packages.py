"""`--network_module networks.deft` beside a trainer's own `networks`, on the path and copied into it.

sd-scripts' is a folder without `__init__.py` beside its scripts; musubi-tuner's is a package inside of one, whose
folder its trainer puts at the end of the path, and its scripts stand beside that package and, three lines each, in the
checkout's root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SD_SCRIPTS, MUSUBI = os.environ.get("SD_SCRIPTS_DIR"), os.environ.get("MUSUBI_DIR")

TRAINER = """
import importlib
module = importlib.import_module("networks.deft")
own = importlib.import_module("networks.lora")
print(module.__file__, own.__file__, callable(module.create_network), callable(module.create_arch_network), sep="|")
"""
OF_MUSUBI = f"""
import os, sys
def main():
    sys.path.append(os.path.dirname(os.path.dirname(__file__)))
{"".join(f"    {line}" + chr(10) for line in TRAINER.strip().splitlines())}
"""


def write(file: Path, text: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def sd_scripts(folder: Path) -> Path:
    """A checkout as sd-scripts': the script, and its `networks` without `__init__.py`."""
    write(folder / "train_network.py", TRAINER)
    write(folder / "networks" / "lora.py")
    return folder / "train_network.py"


def musubi(folder: Path) -> Path:
    """A checkout as musubi-tuner's; the script in the root."""
    package = folder / "src" / "musubi_tuner"
    write(package / "__init__.py")
    write(package / "networks" / "__init__.py")
    write(package / "networks" / "lora.py")
    write(package / "training" / "__init__.py")
    write(package / "training" / "trainer_base.py", OF_MUSUBI)
    script = "from musubi_tuner.training.trainer_base import main\n\nif __name__ == '__main__':\n    main()\n"
    for file in (package / "wan_train_network.py", folder / "wan_train_network.py"):
        write(file, script)
    return folder / "wan_train_network.py"


def copy_into(networks: Path) -> None:
    for file in (ROOT / "networks").glob("*deft*.py"):
        shutil.copy(file, networks)


def start(script: Path, *paths: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, script.name], cwd=script.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ways(tmp_path_factory) -> dict[str, tuple[Path, Path, subprocess.Popen]]:
    """Way -> where DEFT has to come from, where the trainer's own modules, and the running script."""
    folder = tmp_path_factory.mktemp("trainers")
    found = {}
    for way in ("path", "copied"):
        script = sd_scripts(folder / way / "sd-scripts")
        own = script.parent / "networks"
        paths = [ROOT] if way == "path" else []
        if way == "copied":
            copy_into(own)
        found[f"sd-scripts {way}"] = (ROOT / "networks" if paths else own, own, start(script, *paths))
        script = musubi(folder / way / "musubi")
        own = script.parent / "src" / "musubi_tuner" / "networks"
        if way == "copied":
            copy_into(own)
        installed = script.parent / "src"  # what `pip install -e .` puts on the path
        found[f"musubi {way}"] = (ROOT / "networks" if paths else own, own, start(script, *paths, installed))
        if way == "copied":
            script = script.parent / "src" / "musubi_tuner" / "wan_train_network.py"
            found["musubi copied, its inner script"] = (own, own, start(script, installed))
    return found


@pytest.mark.parametrize(
    "way", ["sd-scripts path", "sd-scripts copied", "musubi path", "musubi copied", "musubi copied, its inner script"]
)
def test_is_found_beside_the_trainers_own_networks(ways, way):
    deft_from, own_from, process = ways[way]
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-1000:]
    deft_file, own_file, *callables = printed.strip().split("|")
    assert Path(deft_file) == deft_from / "deft.py"
    assert Path(own_file) == own_from / "lora.py"
    assert callables == ["True", "True"]


def real(script: str, folder: str | None, tmp_path: Path, inside: str, copied: bool) -> subprocess.CompletedProcess:
    """Finds both modules from a script that stands in a real checkout, as far as the path tells, without a trainer."""
    paths = [] if copied else [str(ROOT)]
    own = Path(folder or "") / inside
    if copied:
        shutil.copytree(own, tmp_path / inside, ignore=shutil.ignore_patterns("__pycache__"))
        copy_into(tmp_path / inside)
        own = tmp_path / inside
    first, last = (str(own.parent), "") if script == "sd-scripts" else ("", str(own.parent))
    code = (
        f"import sys; sys.path = [{first!r}, *{paths!r}, *sys.path[1:], {last!r}]\n"
        "import importlib.util as u, networks.deft\n"
        "print(networks.deft.__file__, u.find_spec('networks.lora').origin, sep='|')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True)


@pytest.mark.parametrize("copied", [False, True], ids=["path", "copied"])
@pytest.mark.parametrize(("kind", "folder", "inside"), [
    pytest.param("sd-scripts", SD_SCRIPTS, "networks",
                 marks=pytest.mark.skipif(not SD_SCRIPTS, reason="set SD_SCRIPTS_DIR to a checkout")),
    pytest.param("musubi", MUSUBI, "src/musubi_tuner/networks",
                 marks=pytest.mark.skipif(not MUSUBI, reason="set MUSUBI_DIR to a checkout")),
])  # fmt: skip
def test_is_found_in_the_real_checkouts(kind, folder, inside, copied, tmp_path):
    printed = real(kind, folder, tmp_path, inside, copied).stdout.strip().split("|")
    own = (tmp_path if copied else Path(folder)) / inside
    assert Path(printed[0]) == (own if copied else ROOT / "networks") / "deft.py"
    assert Path(printed[1]) == own / "lora.py"
