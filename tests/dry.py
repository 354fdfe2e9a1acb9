"""Dry runs: a stub stands in the place of Python and writes down its command line; the program's own parser reads it."""
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from utils import ROOT

# A line of JSON for each call, into the file that CALL names; exit code CODE where a word of the command line is FAILS.
STUB = f"""#!{sys.executable} -SE
import json, os, sys
with open(os.environ["CALL"], "a") as file:
    json.dump({{"command": sys.argv[1:], "program": os.path.basename(sys.argv[0]), "folder": os.getcwd(), "environment": dict(os.environ)}}, file)
    file.write("\\n")
sys.exit(int(os.environ.get("CODE", 0)) if os.environ.get("FAILS", "nothing") in sys.argv else 0)
"""
OURS = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}  # a scheduler's is given where a test says so


def dry_run(command, stub, folder, **environment):
    """Runs a command in `folder` with the file `stub` as Python -> the finished process, and the stub's calls."""
    calls = stub.with_name("calls.jsonl")
    calls.unlink(missing_ok=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    process = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                             env={**OURS, "PYTHON": str(stub), "CALL": str(calls), **environment})
    return process, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def program_of(call):
    """The program of a call: folder of the project, the program's parser, its arguments."""
    first, *arguments = call["command"][4 if "distill_utils.torchrun" in call["command"] else 0:]
    if first == "-m":
        first, *arguments = arguments
        root = call["environment"].get("PYTHONPATH", "").split(":")[0]
        return pathlib.Path(root), importlib.import_module(first).parser(), arguments
    root = os.path.dirname(first)
    return pathlib.Path(root), script(first).parser(), arguments


def script(path):
    """The module of a script in the project's folder, or the program of the folder sh/benchmark."""
    if os.path.basename(path) != "benchmark":
        return importlib.import_module(os.path.basename(path).removesuffix(".py"))
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "sh" / "benchmark" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(call):
    """The flags as the program's own parser reads them; SystemExit for one that it refuses."""
    _, parser, arguments = program_of(call)
    return vars(parser.parse_args(arguments))
