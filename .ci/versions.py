"""Prints requirements, one a line, that differ from what is installed here: what a second run of tests is to see.

    python .ci/versions.py lowest    what requirements/lowest.txt names
    python .ci/versions.py newest    what the registry has today of the libraries in pyproject.toml, whatever its bounds

PyTorch and what comes with it stay as they are: they are gigabytes.
"""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
STAYING = ("torch", "triton", "nvidia-", "cuda-")


def main(which):
    wanted = lowest() if which == "lowest" else newest()
    for name, number in sorted(wanted.items()):
        if not name.startswith(STAYING) and installed(name) != number:
            print(f"{name}=={number}")


def lowest():
    lines = (ROOT / "requirements" / "lowest.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    here = [each for each in pinned if each.marker is None or each.marker.evaluate()]
    return {each.name: next(iter(each.specifier)).version for each in here}


def newest():
    """As pip would choose them together, with the PyTorch that is here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *(line for extra, lines in extras.items() if extra != "test" for line in lines)]
    names = [name for line in listed if (name := Requirement(line).name) != "torch"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--upgrade", "--report", "-"]
    command += ["--upgrade-strategy", "eager", f"torch=={version('torch')}", *names]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in report["install"]}


def installed(name):
    """Its version here; None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(sys.argv[1])
