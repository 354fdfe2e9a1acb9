"""Measure the cost of a call: counted operations and bytes, seconds, memory, and reference rates of this machine.

Rates are in FLOP/s or bytes/s; a multiply-add counts as two FLOP.
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
    """Sum in `bytes` the sizes of all tensor inputs and outputs of every operation, backward passes included.

    Views and allocations count zero. A tensor changed in place counts as read and as written. A tensor that strides
    repeat (expand) counts its stored size. Of the source of index_select and the like, only the selected part counts.
    Caches, and data that a kernel reads twice, are not modelled.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            # inference_mode passes composite operations undivided: count their parts.
            result = function.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = function(*args, **kwargs)
            self.bytes += moved(function._schema, args, kwargs, result)
        return result


def moved(schema, args, kwargs, result):
    reads, writes = tensors((args, {name: value for name, value in kwargs.items() if name != "out"})), tensors(result)
    if schema.is_mutable and not writes:  # operations on lists of tensors
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
    """Return FLOP and bytes (see ByteCounter) of one call."""
    with FlopCounterMode(display=False) as operations, ByteCounter() as counter:
        function()
    return operations.get_total_flops(), counter.bytes


# ---------------------------------------------------------------- seconds and memory

def seconds_of(function):
    """Return the seconds of one call, including queued GPU work."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def alternate(functions, repeats):
    """Return {name: [seconds]} of `repeats` calls each; functions take turns, so that other load affects all alike."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function))
    return seconds


def quartiles(values):
    """Return first quartile, median and third quartile."""
    return np.percentile(values, (25, 50, 75)).tolist()


def memory_of(make, device):
    """Return peak bytes of this process in the call that make() returns, and their increase over before the call.

    Before the call means the peak until then; on a GPU, the memory allocated then.
    """
    call = make()
    synchronize()
    if has_own_memory(device):
        torch.get_device_module(device).reset_peak_memory_stats(device)
    before = peak_memory(device)
    call()
    synchronize()
    return peak_memory(device), peak_memory(device) - before


def memory_apart(job):
    """Return memory_of(*job), for use in a separate process."""
    return memory_of(*job)


# ---------------------------------------------------------------- this machine

def machine(device):
    """Return the hardware and software versions that the figures depend on, by name."""
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
    except (OSError, TypeError):  # not Linux, or a processor without a model name
        return platform.processor() or platform.machine()


def references(precisions, device, batch, frames, size):
    """Return {(name, precision): function}: calls of tens of ms that reach this machine's rates.

    For each precision: a large matmul, and the forward pass of ConvNet3D's middle convolution on a batch of clips (T
    frames of size pixels). In addition a copy: ("copy", None).
    """
    functions, gpu = {}, device.type != "cpu"
    side = (size + 1) // 2 // 2                                            # of the second block's input
    for precision in precisions:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        matrix = torch.randn(2, *[8192 if gpu else 2048] * 2, device=device, dtype=dtype)
        layer = convolution(64, 128).to(device, dtype)
        clips = torch.randn(batch, 64, frames, side, side, device=device, dtype=dtype).to(
            memory_format=torch.channels_last_3d)
        functions["matmul", precision] = under(precision, device, torch.matmul, *matrix)
        functions["convolution", precision] = under(precision, device, layer, clips)
    source = torch.randn(2 ** (28 if gpu else 26), device=device)
    functions["copy", None] = under("fp32", device, torch.empty_like(source).copy_, source)
    return {name: lasting(function) for name, function in functions.items()}


def under(precision, device, function, *inputs):
    @torch.inference_mode()
    def call():
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"  # set_precision allows it for convolutions only
        with autocast(device, precision):
            function(*inputs)
    return in_precision(call, precision, device)


def in_precision(function, precision, device):
    """Wrap a function so that it first sets the device's convolutions to `precision`."""
    def call():
        set_precision(device, precision)
        return function()
    return call


def lasting(function, least=0.03):
    """Return a call that repeats `function` until about `least` seconds have passed, at least once."""
    function()
    times = math.ceil(least / seconds_of(function))
    return lambda: [function() for _ in range(times)]
