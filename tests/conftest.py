import faulthandler
import gc
import itertools
import os
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sh" / "benchmark")]

HANG = 1800  # seconds; the only limit of time: a test that takes longer hangs, and ends the tests with a traceback of all threads


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts several processes or trains for long; left out by `bash sh/test.sh --quick`")
    config.stash[screen] = os.fdopen(os.dup(2), "w")  # the screen's, before a test's output is caught


screen = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Fixtures included."""
    faulthandler.dump_traceback_later(HANG, exit=True, file=item.config.stash[screen])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_collection_finish():
    gc.freeze()  # the libraries' million objects: a collection by a test takes a tenth of a second with them


def write_frames(folder, count, size=16, seed=0, name="frame{:06d}.jpg"):
    """A folder of `count` random pictures, numbered from 1; size: pixels, or (width, height)."""
    width, height = size if isinstance(size, tuple) else (size, size)
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name.format(number))


@pytest.fixture
def tiny(tmp_path):
    """A folder for --dataset custom: 2 classes with 4 and 3 training videos, 2 test videos each, 16 to 26 frames."""
    rows = [(f"v_{label}_{split}_{number}", label, split) for label, train in (("fall", 4), ("rise", 3))
            for split, count in (("train", train), ("test", 2)) for number in range(count)]
    for number, (video, _, _) in enumerate(rows):
        write_frames(tmp_path / "data" / "jpegs" / video, 16 + number, seed=number)
    lines = ["folder_name,label,split", *(",".join(row) for row in rows)]
    (tmp_path / "data" / "list.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """The scripts' command lines, by a process that has imported them, on tiny data that no test changes."""
    from commands import Commands
    folder = tmp_path_factory.mktemp("run")
    lines = ["folder_name,label,split"]
    for label, split, number in itertools.product(("fall", "rise"), ("train", "test"), range(3)):
        write_frames(folder / "data" / "jpegs" / f"{label}_{split}_{number}", 9, seed=len(lines))
        lines.append(f"{label}_{split}_{number},{label},{split}")
    (folder / "data" / "list.csv").write_text("\n".join(lines) + "\n")
    command = Commands(folder)
    yield command
    command.close()


@pytest.fixture(scope="session")
def whole(command):
    """Results of uninterrupted runs: whole(script) gives (run folder, flags that the script needs besides)."""
    save_path, done = command.folder / "whole", {}

    def needs(script):
        static = ("--path_static", whole("distill_DC")[0] / "distilled.pt") if script in ("distill_s2d", "distill_s2d MTT") else ()
        return static + (("--buffer_path", whole("buffer")[0]) if script.endswith("MTT") else ())

    def folders():
        return {path for path in save_path.glob("*/*") if path.is_dir()}

    def whole(script):
        if script not in done:
            extra = needs(script)
            before = folders()
            code, output = command(script, save_path, *extra)
            assert code == 0, output
            new, = folders() - before
            done[script] = new, extra
        return done[script]
    return whole


@pytest.fixture
def study(tmp_path):
    """study(name, *arguments) runs a launcher dry -> the finished process and the calls of Python; FAILS and CODE: a word of the calls that fail, and how."""
    from dry import ROOT, dry_run

    def study(name, *arguments, root=ROOT, folder=tmp_path, **environment):
        return dry_run(["bash", os.path.relpath(root / name, folder), *arguments], tmp_path / "a stub", folder, **environment)
    return study


@pytest.fixture
def launch(study):
    """As study, of a launcher that calls Python once: the finished process, and the call (None when there was none)."""
    def launch(name, *arguments, **options):
        process, calls = study(name, *arguments, **options)
        return process, calls[-1] if calls else None
    return launch
