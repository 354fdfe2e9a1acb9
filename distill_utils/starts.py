"""Start values of synthetic sets: real clips, means of real clips, or noise."""
import torch
import torch.nn.functional as F

from distill_utils.synset import PixelSet, enlargement
from distill_utils.temporal import kept_frames
from networks import Interpolation


def choose_random(clips, ipc) -> torch.Tensor:
    """Return the numbers of `ipc` random training clips of each class, (K·ipc,), in class order."""
    index = clips.class_batch(ipc)
    scarce = (torch.bincount(clips.labels[index], minlength=clips.K) < ipc).nonzero().flatten().tolist()
    if scarce:
        raise ValueError(f"class {clips.class_names[scarce[0]]} has fewer training clips than the required {ipc}: "
                         "lower --ipc, --spc or --dpc, or raise --train_clips")
    return index


def mean_videos(clips, ipc) -> torch.Tensor:
    """Return means of real clips, (K·ipc, T, 3, H, W) in class order.

    The shuffled clips of a class are divided among its `ipc` videos; each video is the mean of its clips.
    """
    index, means = clips.class_batch(len(clips)), []
    for label in range(clips.K):
        for part in index[clips.labels[index] == label].tensor_split(ipc):
            means.append(sum(clips.draw(few).sum(0) for few in part.split(16)) / len(part))
    return torch.stack(means)


def initial_videos(clips, ipc, init, chosen=None) -> torch.Tensor:
    """Return the start of a PixelSet, (K·ipc, T, 3, H, W).

    init: `real` clips, `mean`s of real clips, `noise` from N(0, 1), or `still`: a real clip's first frame, repeated.
    chosen: numbers of the real clips, (K·ipc,) in class order; None: random ones.
    """
    if init == "noise":
        return torch.randn(clips.K * ipc, clips.T, 3, clips.size, clips.size).to(clips.device)
    chosen = choose_random(clips, ipc) if chosen is None else chosen  # also for means: refuses classes of too few clips
    if init == "mean":
        return mean_videos(clips, ipc)
    videos = clips.draw(chosen)
    return videos if init == "real" else videos[:, :1].expand_as(videos).clone()


def initial_pixels(clips, ipc, init, n_syn=None, interpolation="duplicate", storage="fp32", chosen=None) -> PixelSet:
    """Return a PixelSet at its start: `n_syn` evenly spaced frames of the initial videos, stretched by `interpolation`.

    n_syn: None for all T frames.
    """
    videos = initial_videos(clips, ipc, init, chosen)
    if n_syn in (None, clips.T) and interpolation != "parametric":
        return PixelSet(videos, clips.K, storage=storage).to(clips.device)
    kept = videos[:, kept_frames(clips.T, n_syn or clips.T)]
    return PixelSet(kept, clips.K, Interpolation(interpolation, kept.shape[1], clips.T), storage).to(clips.device)


def initial_static(clips, spc, init, size=None) -> torch.Tensor:
    """Return the start of the static memory (K, spc, 3, size, size) from clips of one frame.

    init: `real` frames, `mean`s of real frames, or `noise`.
    """
    if init == "noise":
        side = size or clips.size
        return torch.randn(clips.K, spc, 3, side, side).to(clips.device)
    return downsample(initial_videos(clips, spc, init), size=size).squeeze(1).unflatten(0, (clips.K, spc))


def real_memories(clips, chosen, ipc, spc, dpc, frame="mean", static_size=None, frames=None,
                  size=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the static and dynamic memory of the clips `chosen`, (K·max(spc, dpc),) in class order.

    The static memory is the mean or the middle frame of a clip; the dynamic memory is the grey residual of the clip.
    Each slot owns as many clips as the larger of its numbers of static and dynamic memories.
    """
    statics, residuals, members = [], [], torch.arange(dpc // ipc)
    for numbers in chosen.view(clips.K, -1):  # class by class: clips take far more memory than what is kept of them
        videos = clips.draw(numbers).unflatten(0, (ipc, -1))                            # (N, group, T, 3, H, W)
        still = videos.mean(2) if frame == "mean" else videos[:, :, clips.T // 2]
        still = downsample(still[:, :spc // ipc], size=static_size)                     # (N, spc/N, 3, h, h)
        shown = enlargement(still, clips.size).to(still.device)(still)[:, members % (spc // ipc)]
        residual = (videos[:, members] - shown.unsqueeze(2)).mean(3, keepdim=True)      # (N, dpc/N, T, 1, H, W)
        statics.append(still.flatten(0, 1).clone())    # a view would keep the clips
        residuals.append(downsample(residual.flatten(0, 1), frames, size))
    return torch.stack(statics), torch.stack(residuals)


def initial_dynamic(clips, static, ipc, dpc, init, frames=None, size=None, chosen=None) -> torch.Tensor:
    """Return the start of the dynamic memory (K, dpc, n, 1, h, h).

    init: `noise` from N(0, 1), or the `residual` or `motion` of real clips, averaged over the frames and pixels that
    each stored value represents.
    frames: n (None: T).
    size: h (None: the size of the clips).

    The residual is the grey difference between a real clip's frames and the static memory (K, spc, 3, h', h'). So
    static plus dynamic memory is the clip, except for the motion of its colours. Each static memory gets the clips of
    its class whose nearest frame is closest to it: the residual of any other clip would show the negative of the
    static picture.

    The motion is the grey difference between a real clip's frames and their own mean: what moves, without the clip's
    background. The clips are `chosen`, or random ones.
    """
    K, spc = static.shape[:2]
    if init == "noise":
        side = size or clips.size
        return torch.randn(K, dpc, frames or clips.T, 1, side, side).to(clips.device)
    if init == "motion":
        memories, chosen = [], choose_random(clips, dpc) if chosen is None else chosen
        for numbers in chosen.view(K, dpc):                                            # class by class, to save memory
            videos = clips.draw(numbers)
            motion = (videos - videos.mean(1, keepdim=True)).mean(2, keepdim=True)  # (dpc, T, 1, H, W)
            memories.append(downsample(motion, frames, size))
        return torch.stack(memories)
    if clips.counts().min() < dpc:
        raise ValueError(f"class {clips.class_names[clips.counts().argmin()]} has fewer training clips than --dpc "
                         f"{dpc}: lower --dpc, or raise --train_clips")
    static, dynamic = enlargement(static, clips.size)(static).to(clips.device), []
    for label in range(K):
        index, taken = (clips.labels == label).nonzero().flatten(), []
        distance = frame_distance(clips, index, static[label])                      # (spc, clips of the class)
        for number in range(dpc):
            slot, member = divmod(number, dpc // ipc)
            partner = slot * (spc // ipc) + member % (spc // ipc)
            nearest = next(i for i in distance[partner].argsort().tolist() if i not in taken)
            taken.append(nearest)
            residual = clips.draw(index[[nearest]])[0] - static[label, partner]
            dynamic.append(residual.mean(1, keepdim=True))                          # (T, 1, H, W)
    return downsample(torch.stack(dynamic).unflatten(0, (K, dpc)), frames, size)


def downsample(videos, frames=None, size=None) -> torch.Tensor:
    """Return videos (..., T, C, H, W), averaged to `frames` frames of `size` pixels (None: unchanged)."""
    *_, T, C, H, W = videos.shape
    frames, size = frames or T, size or H
    if (frames, size) == (T, H):
        return videos
    channels_first = videos.flatten(0, -5).transpose(1, 2).cpu()                    # (B, C, T, H, W); not on Apple GPUs
    averages = F.adaptive_avg_pool3d(channels_first, (frames, size, size)).to(videos.device)
    return averages.transpose(1, 2).reshape(*videos.shape[:-4], frames, C, size, size)


def frame_distance(clips, index, frames):
    """Return the mean squared difference of frames (M, 3, H, W) to the nearest frame of each clip.

    The result is (M, len(index)), on the CPU.
    """
    rows = []
    for part in index.split(16):
        drawn = clips.draw(part)                                                    # (B, T, 3, H, W)
        rows.append(torch.stack([(drawn - frame).square().mean((2, 3, 4)).amin(1) for frame in frames]))
    return torch.cat(rows, 1).cpu()
