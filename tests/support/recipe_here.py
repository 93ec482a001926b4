"""Recipes within this process."""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def refusal(name, *arguments, folder) -> str:
    """What a recipe says when it gives up, without an interpreter of its own, which would spend 10 s on imports."""
    words = [name, *map(str, arguments)]
    with mock.patch.object(sys, "argv", words), contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPES / name), run_name="__main__")
    return " ".join(str(ended.value.code).split())
