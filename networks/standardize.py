def standardize(clips):
    """Return each clip minus its own mean, divided by its own standard deviation.

    clips: (B, ...) float. Every network applies it to its input (methods.md 1).
    """
    axes = tuple(range(1, clips.dim()))
    mean = clips.mean(axes, keepdim=True)
    # The standard deviation of a constant clip is zero: the small constant keeps the result and its gradient finite.
    variance = (clips - mean).square().mean(axes, keepdim=True)
    return (clips - mean) * (variance + 1e-6).rsqrt()
