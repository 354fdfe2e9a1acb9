def standardize(clips):
    """Each clip minus its own mean over its own standard deviation; (B, ...) float, the network input everywhere (METHOD 1)."""
    axes = tuple(range(1, clips.dim()))
    mean = clips.mean(axes, keepdim=True)
    # A constant clip has no deviation: the floor keeps it, and its gradient, finite.
    variance = (clips - mean).square().mean(axes, keepdim=True)
    return (clips - mean) * (variance + 1e-6).rsqrt()
