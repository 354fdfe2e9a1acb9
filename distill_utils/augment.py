"""Differentiable siamese augmentation over clips (DSA, Zhao & Bilen 2021, arXiv 2102.08259; METHOD 11).

A strategy names groups of operators, as "color_crop_cutout_flip_scale_rotate", or is "none". A draw is what they need to know, {group: (B, n) float32
on the CPU}, a row for each clip, from torch's generator: it holds for all frames of the clip, and is the same for every device and number of processes.
All operators are differentiable in the clips, whose pixels are normalised; what comes from outside of the picture is zero, ImageNet's mean colour.
"""
import torch
import torch.nn.functional as F

NONE = "none"


def augment_each(clips, strategy):
    """The clips (B, T, 3, H, W), or frames (B, 3, H, W), in normalised pixels, each changed by all groups of the strategy and by a draw of its own."""
    return augment(clips, draw_each(strategy, len(clips)))


def augment(clips, draw, rows=None):
    """The clips (B, T, 3, H, W), or frames (B, 3, H, W), in normalised pixels, changed by the groups of the draw, one after another.

    rows: for each clip the row of the draw that it takes, int64 (B,) on the CPU, as its class where the draw is siamese; without, the draw has B rows.
    """
    for group, parameters in draw.items():
        operator, *_ = GROUPS[group]
        clips = operator(clips, *(parameters if rows is None else parameters[rows]).unbind(1))
    return clips


def draw_each(strategy, count):
    """A draw of all groups of the strategy for `count` clips."""
    return {group: draw_group(group, count) for group in groups_of(strategy)}


def draw_siamese(strategy, num_classes):
    """A draw of one of the strategy's groups, chosen at random, with a row for each class: that of its real and of its synthetic clips."""
    groups = groups_of(strategy)
    if not groups:
        return {}
    chosen = groups[int(torch.randint(len(groups), ()))]
    return {chosen: draw_group(chosen, num_classes)}


def draw_group(group, count):
    _, *ranges = GROUPS[group]
    low, high = torch.tensor(ranges, dtype=torch.float32).T
    return low + torch.rand(count, len(ranges)) * (high - low)             # (count, n)


def groups_of(strategy):
    """The groups that a strategy names, in its order; ValueError for one that is unknown or named twice."""
    groups = [] if strategy == NONE else strategy.split("_")
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"--dsa {strategy}: {group!r} is unknown: join some of {', '.join(GROUPS)} by _, or give {NONE}")
        if groups.count(group) > 1:
            raise ValueError(f"--dsa {strategy}: {group} is named twice")
    return groups


# ---------------------------------------------------------------- the operators: clips (B, …, 3, H, W) and their parameters, each (B,), on the CPU

def change_color(clips, brightness, saturation, contrast):
    """Brightness is added; then each pixel's distance to its grey, the mean of the channels, is multiplied by the saturation, and the grey's
    distance and its own to the clip's mean by the contrast.

    kornia's saturation and contrast cut off what is not within 0 … 1, and so do not fit normalised pixels.
    """
    brightness, saturation, contrast = (beside(clips, values) for values in (brightness, saturation, contrast))
    gray = clips.mean(-3, keepdim=True)
    mean = beside(clips, gray.flatten(1).mean(1))
    return mean + brightness + contrast * (gray - mean + saturation * (clips - gray))


def crop(clips, top, left):
    """As large as it was, from a random place of the clip with a border of zeros, an eighth of the side. top, left: from 0 to 1."""
    height, width = clips.shape[-2:]
    border = round(width / 8)
    corners = (torch.stack((top, left), 1) * (2 * border + 1)).long().tolist()
    return torch.stack([clip[..., y:y + height, x:x + width] for clip, (y, x) in zip(F.pad(clips, [border] * 4), corners)])


def cut_out(clips, row, column):
    """A square of half the side becomes zero; its centre is anywhere in the picture, so that a part may lie outside. row, column: from 0 to 1."""
    size = clips.shape[-1]
    places = torch.arange(size) + size // 4 - (torch.stack((row, column))[..., None] * (size + 1)).floor()    # (2, B, size), from the square's corner
    rows, columns = (places >= 0) & (places < size // 2)
    kept = ~(rows[:, :, None] & columns[:, None, :])                       # (B, H, W)
    return clips * kept.to(clips).view(-1, *[1] * (clips.dim() - 3), size, size)


def flip(clips, chance):
    """Mirrored left-right where the chance, from 0 to 1, is below 1/2."""
    return torch.where(beside(clips, chance) < 0.5, clips.flip(-1), clips)


def scale(clips, horizontal, vertical):
    """Magnified about the centre, each axis by a factor of its own."""
    from kornia.geometry import transform  # takes up to a second, and few runs need it
    return transform.scale(clips.flatten(1, -3), torch.stack((horizontal, vertical), 1).to(clips)).view_as(clips)


def rotate(clips, degrees):
    """Turned about the centre, anti-clockwise."""
    from kornia.geometry import transform
    return transform.rotate(clips.flatten(1, -3), degrees.to(clips)).view_as(clips)


def beside(clips, values):
    """A value for each clip, (B,), in the clips' format and on their device, shaped to be multiplied with them."""
    return values.to(clips).view(-1, *[1] * (clips.dim() - 1))


GROUPS = {  # word: operator, and the range of each of its parameters
    "color": (change_color, (-0.5, 0.5), (0, 2), (0.5, 1.5)),
    "crop": (crop, (0, 1), (0, 1)),
    "cutout": (cut_out, (0, 1), (0, 1)),
    "flip": (flip, (0, 1)),
    "scale": (scale, (1 / 1.2, 1.2), (1 / 1.2, 1.2)),
    "rotate": (rotate, (-15, 15)),
}
