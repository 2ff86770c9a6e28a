#!/usr/bin/env bash
# Makes requirements/tested.txt, which README.md's commands install by, and requirements/lowest.txt, from pyproject.toml,
# for all systems and Pythons at once. Needs uv (pip install uv). Run it, test, then commit:
#
#     scripts/lock.sh                  # keep what is locked, add what pyproject.toml newly asks for
#     scripts/lock.sh --upgrade        # the newest of everything that pyproject.toml allows
set -euo pipefail
cd "$(dirname "$0")/.."
lock=(uv pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 --no-annotate
  --custom-compile-command scripts/lock.sh)
"${lock[@]}" "$@" --output-file requirements/tested.txt
"${lock[@]}" "$@" --resolution lowest-direct --output-file requirements/lowest.txt
