"""What a call costs: its counted operations and bytes, its measured seconds and memory, and this machine's own rates to hold them against.

A rate is in FLOP/s or bytes/s; a multiply-add is two FLOP.
"""
import math
import platform
import re
import time

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from distill_utils.compute import autocast, set_precision
from distill_utils.machine import cores
from networks.convnet3d import convolution
from utils import TEXT, accelerator_memory, has_own_memory, peak_memory, synchronize

CHOOSING = ("aten::index_select", "aten::index", "aten::gather")


class ByteCounter(TorchDispatchMode):
    """Adds up in `bytes` the sizes of all tensor inputs and outputs of every operation within, backward passes included.

    Views and allocations count nothing; what an operation changes in place counts as read and as written; a tensor that strides repeat counts as it is
    stored; of what index_select and the like choose from counts as much as they choose. Nothing is known of caches, or of what a kernel reads twice.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            result = function.decompose(*args, **kwargs)  # of composite operations, which inference_mode hands over whole, the parts count
        if result is NotImplemented:
            result = function(*args, **kwargs)
            self.bytes += moved(function._schema, args, kwargs, result)
        return result


def moved(schema, args, kwargs, result):
    reads, writes = tensors((args, {name: value for name, value in kwargs.items() if name != "out"})), tensors(result)
    if schema.is_mutable and not writes:  # of lists of tensors
        writes = tensors(args[0])
    places = {tensor.untyped_storage().data_ptr() for tensor in reads}
    is_view = not schema.is_mutable and all(tensor.untyped_storage().data_ptr() in places for tensor in writes)
    if is_view or "empty" in schema.name:
        return 0
    read, written = list(map(stored, reads)), sum(map(stored, writes))
    if schema.name in CHOOSING:
        read[0] = written
    return sum(read) + written


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def stored(tensor):
    return tensor.element_size() * math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)


def count(function):
    """FLOP and bytes (those of ByteCounter) of one call."""
    with FlopCounterMode(display=False) as operations, ByteCounter() as counter:
        function()
    return operations.get_total_flops(), counter.bytes


# ---------------------------------------------------------------- seconds and memory

def seconds_of(function):
    """Seconds of one call, until a GPU has done it."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def alternate(functions, repeats):
    """The seconds of `repeats` calls of each function, all in turns, so that whatever else the machine does meets them alike: {name: [seconds]}."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function))
    return seconds


def quartiles(values):
    """First quartile, median, third quartile."""
    return np.percentile(values, (25, 50, 75)).tolist()


def memory_of(make, device):
    """Peak bytes of this process during the call that make() gives, and how many of them are above the peak, on a GPU the state, before it."""
    call = make()
    synchronize()
    if has_own_memory(device):
        torch.get_device_module(device).reset_peak_memory_stats(device)
    before = peak_memory(device)
    call()
    synchronize()
    return peak_memory(device), peak_memory(device) - before


def memory_apart(job):
    """memory_of(*job), for a process of its own."""
    return memory_of(*job)


# ---------------------------------------------------------------- this machine

def machine(device):
    """What the figures depend on, by name."""
    found = {"host": platform.node(), "cpu": cpu_model(), "cores": cores(), "threads": torch.get_num_threads(),
             "torch": torch.__version__, "python": platform.python_version()}
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device) if has_own_memory(device) else device.type
        found |= {"gpu": name, "gpu_bytes": accelerator_memory(device)[1]}
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def cpu_model():
    try:
        with open("/proc/cpuinfo", **TEXT) as file:
            return re.search(r"model name\s*: (.*)", file.read())[1]
    except (OSError, TypeError):  # not Linux, or a processor without a name
        return platform.processor() or platform.machine()


def references(precisions, device, batch, frames, size):
    """Calls of some tens of ms that reach what this machine can: a large matmul and ConvNet3D's middle convolution, forward, on a batch of clips
    (T frames of size pixels) in each precision, and a copy; {(name, precision): function}, of the copy (copy, None)."""
    functions, gpu = {}, device.type != "cpu"
    side = (size + 1) // 2 // 2                                            # of the second block's input
    for precision in precisions:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        matrix = torch.randn(2, *[8192 if gpu else 2048] * 2, device=device, dtype=dtype)
        layer = convolution(64, 128).to(device, dtype)
        clips = torch.randn(batch, 64, frames, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last_3d)
        functions["matmul", precision] = under(precision, device, torch.matmul, *matrix)
        functions["convolution", precision] = under(precision, device, layer, clips)
    source = torch.randn(2 ** (28 if gpu else 26), device=device)
    functions["copy", None] = under("fp32", device, torch.empty_like(source).copy_, source)
    return {name: lasting(function) for name, function in functions.items()}


def under(precision, device, function, *inputs):
    @torch.inference_mode()
    def call():
        with autocast(device, precision):
            function(*inputs)
    return in_precision(call, precision, device)


def in_precision(function, precision, device):
    """The function, before which the device's float32 products are set as `precision` wants them."""
    def call():
        set_precision(device, precision)
        return function()
    return call


def lasting(function, least=0.03):
    """A call that calls `function` as often as `least` seconds allow, at least once."""
    function()
    times = math.ceil(least / seconds_of(function))
    return lambda: [function() for _ in range(times)]
