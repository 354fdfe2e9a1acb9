"""Pictures of a synthetic set: a grid of frames, and an animated grid."""
import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from distill_utils.clips import denormalize
from distill_utils.synset import StaticDynamicSet
from utils import atomic_write, random_stream

MOST_CLASSES = 50  # rows per picture


@torch.no_grad()
def save_pictures(synset, folder, milliseconds=150):
    """Write `distilled.png`, the frames of each class's first video, and `distilled.gif`, up to 5 videos per class."""
    from torchvision.utils import make_grid  # the import takes 1.5 seconds: delay it until a picture is needed

    classes, per_class = min(synset.K, MOST_CLASSES), min(synset.N, 5)
    index = (torch.arange(classes)[:, None] * synset.N + torch.arange(per_class)).flatten()
    with random_stream(0):
        videos = denormalize(synset(index)[0]).cpu()                       # (classes·per_class, T, 3, H, W) uint8
    first = videos[::per_class]
    write(folder / "distilled.png", image(make_grid(first.flatten(0, 1), nrow=first.shape[1], padding=1)))
    columns = per_class if per_class > 1 else 8
    moving = [image(make_grid(frames, nrow=columns, padding=1)) for frames in videos.unbind(1)]
    write(folder / "distilled.gif", moving[0], save_all=True, append_images=moving[1:], duration=milliseconds, loop=0)


@torch.no_grad()
def memories(synset) -> dict[str, torch.Tensor]:
    """Return {title: uint8 (K, T or 1, 3, H, W)} for the first video of each class.

    A static-dynamic set shows its static memory, its dynamic memory (grey: zero), and the video made of the two.
    """
    if not isinstance(synset, StaticDynamicSet):
        with random_stream(0):
            return {"video": denormalize(synset(torch.arange(synset.K) * synset.N)[0]).cpu()}
    static, dynamic = (synset.decode_static(synset.static[:, 0]),           # (K, 3, H, W)
                       synset.decode_dynamic(synset.dynamic[:, 0]))         # (K, T, 1, H, W)
    spread = dynamic.abs().amax((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)
    grey = (127.5 + 127.5 * dynamic / spread).round().to(torch.uint8).expand(-1, -1, 3, -1, -1)
    return {"static memory": denormalize(static)[:, None].cpu(), "dynamic memory": grey.cpu(),
            "together": denormalize(synset.hallucinator(static, dynamic)).cpu()}


def side_by_side(columns, padding=2) -> np.ndarray:
    """Return the frames, uint8 (T, H', W', 3), of videos uint8 (K, T or 1, 3, H, W): a row per class, a column each."""
    T = max(videos.shape[1] for videos in columns)
    cells = torch.stack([videos.expand(-1, T, -1, -1, -1) for videos in columns], 1)    # (K, columns, T, 3, H, W)
    cells = F.pad(cells, (0, padding, 0, padding), value=255)
    return cells.permute(2, 0, 4, 1, 5, 3).flatten(3, 4).flatten(1, 2).numpy()          # (T, K·H', columns·W', 3)


def image(grid):
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def write(path, picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, format=path.suffix[1:], **options)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
