"""Installs the shims of shim.py in every Python process that has this folder on its PYTHONPATH.

That is the driver, Ray's workers and vLLM's own processes, which Ray's hooks don't reach. Python runs only one module
of this name, so another one further down the path (a distribution's, a coverage tool's) is run from here.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import shim

shim.install()

here = Path(__file__).resolve().parent
next_one = importlib.machinery.PathFinder.find_spec(
    "sitecustomize", [folder for folder in sys.path if Path(folder).resolve() != here]
)
if next_one and next_one.loader:
    next_one.loader.exec_module(importlib.util.module_from_spec(next_one))
