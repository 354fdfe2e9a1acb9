"""Temporal compression of clips and videos (methods.md 7): which of T frames are kept or matched, as frame indices."""
import torch


def kept_frames(T, n):
    """Return the indices (n,) of n evenly spaced frames, the middle frame of each of n parts of T frames."""
    return ((torch.arange(n) + 0.5) * T / n).long()


def repeated_frames(T, n):
    """Return indices (T,) of a clip that keeps n frames, each repeated over its part of the T frames."""
    return kept_frames(T, n)[torch.arange(T) * n // T]


def random_segment(T, segments, least):
    """Return the frame indices of a random segment of T/segments frames, repeated to at least `least` frames.

    With one segment, return a slice of all frames.
    """
    if segments == 1:
        return slice(None)
    length, number = T // segments, int(torch.randint(segments, ()))
    shown = max(length, least)
    return number * length + torch.arange(shown) * length // shown
