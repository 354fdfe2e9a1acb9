"""Temporal compression of clips and videos (METHOD 7): which of T frames are kept or matched, as frame numbers to index with."""
import torch


def kept_frames(T, n):
    """The n evenly spaced frames, from the middle of each of n parts, that stand for all of T: numbers (n,)."""
    return ((torch.arange(n) + 0.5) * T / n).long()


def repeated_frames(T, n):
    """Of T frames only n are kept, each shown in the place of its part: numbers (T,)."""
    return kept_frames(T, n)[torch.arange(T) * n // T]


def random_segment(T, segments, least):
    """A random one of the segments of T/segments frames, its frames repeated to at least `least`; with one segment all frames, as they are."""
    if segments == 1:
        return slice(None)
    length, number = T // segments, int(torch.randint(segments, ()))
    shown = max(length, least)
    return number * length + torch.arange(shown) * length // shown
