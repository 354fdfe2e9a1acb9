"""Differentiable siamese augmentation of clips (DSA, Zhao & Bilen 2021, arXiv 2102.08259; methods.md 11).

A strategy is "none", or names of operators joined by _, such as "color_crop_cutout_flip_scale_rotate": each batch is
changed by one of them, chosen at random. Operators joined by + are applied together, one after another.

A draw holds the random parameters of the chosen operators: {name: (B, n) float32 on the CPU}, one row per clip, from
torch's generator. A row applies to all frames of its clip. A draw is the same for every device and number of processes.
All operators are differentiable with respect to the clips. Pixels are normalised; pixels from outside of the picture
are zero, ImageNet's mean colour.
"""
import torch
import torch.nn.functional as F

NONE = "none"


def augment_each(clips, strategy) -> torch.Tensor:
    """Return the clips changed by a random choice of the strategy, each with its own parameters.

    clips: (B, T, 3, H, W), or frames (B, 3, H, W), in normalised pixels.
    """
    return augment(clips, draw_operators(strategy, len(clips)))


def augment(clips, draw, rows=None) -> torch.Tensor:
    """Return the clips changed by the operators of a draw, one after another.

    clips: (B, T, 3, H, W), or frames (B, 3, H, W), in normalised pixels.
    rows: row of the draw for each clip, int64 (B,) on the CPU, such as its class in a siamese draw. None: the draw has
    B rows, in order.
    """
    for name, parameters in draw.items():
        operator, *_ = OPERATORS[name]
        clips = operator(clips, *(parameters if rows is None else parameters[rows]).unbind(1))
    return clips


def draw_operators(strategy, count):
    """Return a draw of one random choice of the strategy; of nothing for "none".

    count: rows, one for each clip of a batch, or, in siamese augmentation, for each class, whose real and synthetic
    clips share it.
    """
    choices = choices_of(strategy)
    if not choices:
        return {}
    chosen = choices[int(torch.randint(len(choices), ()))]
    return {name: draw_parameters(name, count) for name in chosen.split("+")}


def draw_parameters(name, count):
    _, *ranges = OPERATORS[name]
    low, high = torch.tensor(ranges, dtype=torch.float32).T
    return low + torch.rand(count, len(ranges)) * (high - low)             # (count, n)


def choices_of(strategy) -> list[str]:
    """Return the choices of a strategy, of which each batch gets one: an operator, or several joined by +."""
    return strategy.split("_") if operators_of(strategy) else []


def operators_of(strategy) -> list[str]:
    """Return the names of all operators of a strategy; ValueError for an unknown or repeated one."""
    names = [] if strategy == NONE else strategy.replace("+", "_").split("_")
    for name in names:
        if name not in OPERATORS:
            raise ValueError(f"--dsa {strategy}: {name!r} is unknown: join some of {', '.join(OPERATORS)} by _ or +, "
                             f"or give {NONE}")
        if names.count(name) > 1:
            raise ValueError(f"--dsa {strategy}: {name} is repeated: give each operator once")
    return names


# ---------------------------------- operators: clips (B, …, 3, H, W) and their parameters, each (B,), on the CPU

def change_color(clips, brightness, saturation, contrast):
    """Return the clips with changed brightness, saturation and contrast.

    Brightness is added. Saturation multiplies each pixel's distance to its grey, the mean of its channels. Contrast
    multiplies that distance, and the distance of the grey to the clip's mean.

    kornia's saturation and contrast clamp to 0 … 1, and so do not work on normalised pixels.
    """
    brightness, saturation, contrast = (beside(clips, values) for values in (brightness, saturation, contrast))
    gray = clips.mean(-3, keepdim=True)
    mean = beside(clips, gray.flatten(1).mean(1))
    return mean + brightness + contrast * (gray - mean + saturation * (clips - gray))


def crop(clips, top, left):
    """Return a random crop of the original size from the clip with a zero border of an eighth of the side.

    top, left: position of the crop, from 0 to 1.
    """
    height, width = clips.shape[-2:]
    border = round(width / 8)
    corners = (torch.stack((top, left), 1) * (2 * border + 1)).long().tolist()
    return torch.stack([clip[..., y:y + height, x:x + width]
                        for clip, (y, x) in zip(F.pad(clips, [border] * 4), corners)])


def cut_out(clips, row, column):
    """Set a square of half the side to zero. row, column: position of its centre, from 0 to 1.

    The centre is anywhere in the picture, so a part of the square can lie outside.
    """
    size = clips.shape[-1]
    places = (torch.arange(size) + size // 4
              - (torch.stack((row, column))[..., None] * (size + 1)).floor())   # (2, B, size), from the square's corner
    rows, columns = (places >= 0) & (places < size // 2)
    kept = ~(rows[:, :, None] & columns[:, None, :])                       # (B, H, W)
    return clips * kept.to(clips).view(-1, *[1] * (clips.dim() - 3), size, size)


def flip(clips, chance):
    """Mirror the clips left-right where `chance`, from 0 to 1, is below 1/2."""
    return torch.where(beside(clips, chance) < 0.5, clips.flip(-1), clips)


def scale(clips, horizontal, vertical):
    """Scale about the centre, with one factor per axis."""
    from kornia.geometry import transform  # the import takes up to a second, and few runs need it
    return transform.scale(clips.flatten(1, -3), torch.stack((horizontal, vertical), 1).to(clips)).view_as(clips)


def rotate(clips, degrees):
    """Rotate about the centre, anti-clockwise, by `degrees`."""
    from kornia.geometry import transform
    return transform.rotate(clips.flatten(1, -3), degrees.to(clips)).view_as(clips)


def beside(clips, values):
    """Return values (B,), one per clip, with the clips' dtype and device and a shape that broadcasts to the clips."""
    return values.to(clips).view(-1, *[1] * (clips.dim() - 1))


OPERATORS = {  # name: operator, and the range of each of its parameters
    "color": (change_color, (-0.5, 0.5), (0, 2), (0.5, 1.5)),
    "crop": (crop, (0, 1), (0, 1)),
    "cutout": (cut_out, (0, 1), (0, 1)),
    "flip": (flip, (0, 1)),
    "scale": (scale, (1 / 1.2, 1.2), (1 / 1.2, 1.2)),
    "rotate": (rotate, (-15, 15)),
}
