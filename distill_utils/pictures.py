"""Pictures of a synthetic set: a grid of frames, and an animated grid."""
import io

import torch
from PIL import Image

from distill_utils.clips import denormalize
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


def image(grid):
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def write(path, picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, format=path.suffix[1:], **options)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
