"""Runs the sweep over every model type, prints a table and writes it as JSON.

    PYTHONPATH=tests python -m sweep.run --json docs/support.json [model types ..]

Ends with status 1 if an outcome is neither exact nor refused.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from support.varlen_stand_in import path_of_a_gpu

from . import model_types
from .outcomes import outcomes


def sweep(names: list[str]) -> dict[str, dict[str, str]]:
    """The outcomes of each type, {"model": reason} of one that cannot be built."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        started = time.perf_counter()
        try:
            found[name] = outcomes(model_types.build(name))
        except model_types.NotTiny as reason:
            found[name] = {"model": f"not built: {reason}"}
        gc.collect()
        print(f"{name} ({time.perf_counter() - started:.1f} s)", flush=True)
        for entry, outcome in found[name].items():
            print(f"    {entry:18} {outcome[:230]}", flush=True)
    return found


def counted(found: dict[str, dict[str, str]]) -> dict[str, int]:
    """Numbers of types by their worst outcome."""
    numbers = dict.fromkeys(("wrong", "exact", "refused", "not built"), 0)
    for entries in found.values():
        values = list(entries.values())
        if "model" in entries:
            numbers["not built"] += 1
        elif any(value.startswith("wrong") for value in values):
            numbers["wrong"] += 1
        elif any(value.startswith("exact") for value in values):
            numbers["exact"] += 1
        else:
            numbers["refused"] += 1
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*", help='such as "llama"; all if none is given')
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    parser.add_argument("--gpu-path", action="store_true", help="packed batches attend as on a GPU, through a stand-in")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    tf.logging.set_verbosity_error()
    names = model_types.every_type()
    if arguments.types:
        names = [name for name in names if name.split(":")[1] in arguments.types or name in arguments.types]
    started = time.perf_counter()
    with path_of_a_gpu() if arguments.gpu_path else nullcontext():
        found = sweep(names)
    numbers = counted(found)
    print(f"{len(found)} types in {time.perf_counter() - started:.0f} s:", numbers)
    wrong = [f"{name} {e}: {o}" for name, entries in found.items() for e, o in entries.items() if o.startswith("wrong")]
    print(*wrong, sep="\n")
    if arguments.json:
        result: dict[str, Any] = {"transformers": tf.__version__, "torch": torch.__version__, "types": found}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
