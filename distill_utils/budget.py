"""Rules for `--bytes`: the flags of the largest set that fits, one rule per kind of set.

The sizes are those of the sets' own bytes() (methods.md 9). Arguments of a rule: the budget in bytes; K classes; `most`,
the number of clips of the smallest class; clips of T frames of `size` pixels; and the flags that affect the size, None
if not given. A rule returns the flags that it chooses and the bytes of the set. A set never has more videos per class
than the smallest class has clips.
"""
from distill_utils.storage import PIXELS, stored_bytes
from networks import Hallucinator

ENOUGH = 60       # videos per class that a static-dynamic set prefers to a higher resolution (docs/trials.md: stored form)
COARSEST = 1 / 8  # smallest side of its memories, as a share of the clips'
HALLUCINATOR = sum(4 * parameter.numel() for parameter in Hallucinator().parameters())


def largest_count(budget, most, cost, flag, step=1, others=""):
    """Return the largest multiple of `step` up to `most` with cost(count) bytes within the budget, and its cost.

    ValueError if none fits.
    """
    fitting = [count for count in range(step, max(most, step) + 1, step) if cost(count) <= budget]
    if not fitting:
        raise ValueError(f"--bytes {budget} is too small: the smallest set, with --{flag} {step}{others}, needs "
                         f"{cost(step)} bytes")
    return fitting[-1], cost(fitting[-1])


def real_clips(budget, K, most, T, size) -> tuple[dict, int]:
    """Return the largest IPC of real clips of 8-bit pixels."""
    ipc, total = largest_count(budget, most, lambda ipc: stored_bytes((K * ipc, T, 3, size, size), PIXELS), "ipc")
    return {"ipc": ipc}, total


def pixels(budget, K, most, T, size, n_syn=None, interpolation="duplicate", storage="fp32",
           learn_label=False) -> tuple[dict, int]:
    """Return the largest IPC of videos of `n_syn` frames.

    A learned interpolation adds a matrix of T × n_syn 32-bit numbers; a learned label adds K 16-bit numbers per video.
    """
    n = n_syn or T
    matrix = 4 * T * n if interpolation == "parametric" else 0
    label = 2 * K if learn_label else 0
    ipc, total = largest_count(budget, most, lambda ipc: (
        stored_bytes((K * ipc, n, 3, size, size), storage) + K * ipc * label + matrix), "ipc")
    return {"ipc": ipc}, total


def stills(budget, K, most, T, size, ipc=None, static_size=None, storage="fp32") -> tuple[dict, int]:
    """Return the largest spc of still frames, a multiple of --ipc if that is given."""
    side = static_size or size
    spc, total = largest_count(budget, most, lambda spc: stored_bytes((K, spc, 3, side, side), storage), "spc",
                               step=ipc or 1)
    return {"spc": spc}, total


def static_dynamic(budget, K, most, T, size, static_size=None, dynamic_size=None, dynamic_frames=None, storage="fp32",
                   learn_label=False) -> tuple[dict, int]:
    """Return the largest IPC = spc = dpc, and the resolution.

    Both memories get the same side: the largest at which sixty videos per class fit, or all clips of the smallest
    class; else an eighth of the clips'. Dynamic memories get all T frames. Given sizes and frames are kept.
    """
    frames = dynamic_frames or T

    def sides(side):
        return static_size or side, dynamic_size or side

    def cost(count, side):
        static, dynamic = sides(side)
        return (stored_bytes((K, count, 3, static, static), storage)
                + stored_bytes((K, count, frames, 1, dynamic, dynamic), storage) + HALLUCINATOR
                + (K * count * 2 * K if learn_label else 0))
    coarsest = max(1, round(COARSEST * size))
    side = next((side for side in range(size, coarsest, -1) if cost(min(ENOUGH, most), side) <= budget), coarsest)
    chosen = dict(zip(("static_size", "dynamic_size"), sides(side))) | {"dynamic_frames": frames}
    ipc, total = largest_count(budget, most, lambda count: cost(count, side), "ipc",
                               others="".join(f" --{name} {value}" for name, value in chosen.items()))
    return {"ipc": ipc, "spc": ipc, "dpc": ipc, **chosen}, total
