import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


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
