"""``python -m benchmarks.gpu``: all cases, or those whose module or name holds one of the words given."""

import json
import pkgutil
import sys
import traceback
from dataclasses import asdict
from importlib import import_module

import torch
import triton

import benchmarks.gpu
from argosy.cli.code_version import read_version
from benchmarks.gpu.measure import HEADER, describe, measure

HARNESS = {"__main__", "measure"}


def main(words: list[str]) -> int:
    if not torch.cuda.is_available():
        print("needs an NVIDIA card", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {read_version()}")
    print(HEADER)
    lines, num_failed = [], 0
    for module in sorted({found.name for found in pkgutil.iter_modules(benchmarks.gpu.__path__)} - HARNESS):
        torch.manual_seed(0)
        try:
            for case in import_module(f"benchmarks.gpu.{module}").cases():
                if words and not any(word in f"{module} {case.name}" for word in words):
                    continue
                line = measure(case)
                print(describe(line), flush=True)
                lines.append(line)
        except Exception:
            num_failed += 1
            print(f"{module}: failed, no more times of it are printed", flush=True)
            traceback.print_exc(file=sys.stdout)
        torch.cuda.empty_cache()
    print(json.dumps([asdict(line) for line in lines]))
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
