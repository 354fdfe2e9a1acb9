"""A pretend accelerator: the device `pretend`, for machines without a GPU. It computes on the CPU and is as strict as a GPU about where tensors are.

It refuses what CUDA refuses: an operator whose tensors are on different devices (CUDA takes from the CPU only what to index with, and numbers without
axes in element-wise operators), and `.numpy()`. It refuses float64, as MPS does, and a copy to the CPU that nothing waits for. It has random state of its
own, which the same seed starts elsewhere than the CPU's. A file in which its tensors are is loaded by a map_location only. A gradient from the
wrong device it does not refuse: for a tensor subclass autograd moves it.

Autograd, double backward passes (of group norm, too), inference mode, recurrent layers, and autocast of the operators LOWERED are there; other operators
take bfloat16 as it comes, where CUDA's autocast goes back to float32 for some. It shows nothing of what CUDA rounds or draws differently, of several cards
and processes (NCCL), streams, pinned memory, torch.compile, `foreach` optimizers, or of too little memory.

As a script for tests/server.py, `pretend CHECK --device pretend` calls a function of test_device.py.
"""
import argparse
import contextlib
import importlib
import os

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # in 2.11, not in 2.9
MEMORY = 2 ** 40, 2 ** 40  # free and total bytes; PRETEND_MEMORY gives others
PEAK = 123_456_789
INDEXING = aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default
LOWERED = (aten.conv2d.default, aten.conv3d.default, aten.linear.default, aten.matmul.default, aten.bmm.default,
           aten.rnn_tanh.input, aten.lstm.input, aten.gru.input)
RAISED = aten.avg_pool3d.default,  # the CPU, which computes here, has it in float32 only


class PretendTensor(torch.Tensor):
    """A tensor on the device; its values are those of the CPU tensor `inner`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("the pretend device has no float64")
        inner.untyped_storage().is_pretend = True
        with torch.inference_mode(inner.is_inference()):  # which a view in inference mode of a tensor from outside is not
            tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                         dtype=inner.dtype, device="pretend:0")
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator.decompose(*args, **kwargs)  # inference mode hands over composite operators whole
        return compute(operator, *args, **kwargs) if result is NotImplemented else result

    def __deepcopy__(self, memo):
        copy = PretendTensor(self.inner.detach().clone())
        copy.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "inner"}  # that it is a parameter
        return memo.setdefault(id(self), copy.requires_grad_(self.requires_grad))

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"pretend {self.inner}"


def compute(operator, *args, **kwargs):
    """What the operator makes of the inner tensors, as tensors of the device; of a tensor that it changes, that tensor."""
    check_devices(operator, args, kwargs)
    to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    inner_args, inner_kwargs = tree_map_only(PretendTensor, lambda tensor: tensor.inner, (args, kwargs))
    with device_draws() if torch.Tag.nondeterministic_seeded in operator.tags else contextlib.nullcontext():
        result = operator(*inner_args, **inner_kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
    if torch.Tag.inplace_view in operator.tags:  # the outer tensor's shape changes, too
        with torch._C._DisableTorchDispatch():
            operator(*args, **kwargs)
    changed = {name: value for argument, value in arguments(operator, args, kwargs) if writes(argument) for name in argument.alias_info.before_set}
    returns = operator._schema.returns
    results = [changed[min(each.alias_info.before_set)] if writes(each) else
               value if to_cpu else tree_map_only(torch.Tensor, PretendTensor, value)
               for each, value in zip(returns, result if len(returns) > 1 else [result])]
    return results[0] if len(results) == 1 else tuple(results) or None


def arguments(operator, args, kwargs):
    """Pairs of an operator's argument as it is declared, and its value."""
    declared = operator._schema.arguments
    return [*zip(declared, args), *((argument, kwargs[argument.name]) for argument in declared if argument.name in kwargs)]


def writes(declared):
    return declared.alias_info is not None and declared.alias_info.is_write


def check_devices(operator, args, kwargs):
    """RuntimeError where CUDA would have one, and for a copy to the CPU that nothing waits for."""
    values = arguments(operator, args, kwargs)
    named = {argument.name: value for argument, value in values}
    if operator in (aten.copy_.default, aten._to_copy.default):
        target = named["self"].device if "src" in named else torch.device(named.get("device") or "pretend")
        if target.type == "cpu" and named.get("non_blocking"):
            raise RuntimeError("nothing waits for this copy to the CPU")
        return
    if not any(isinstance(leaf, PretendTensor) for leaf in tree_leaves(named)):
        return
    for argument, value in values:
        strange = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and not isinstance(leaf, PretendTensor)]
        numbers = torch.Tag.pointwise in operator.tags and not writes(argument) and all(leaf.dim() == 0 for leaf in strange)
        indices = operator in INDEXING and argument.name == "indices" and isinstance(named["self"], PretendTensor)
        if strange and not numbers and not indices:
            raise RuntimeError(f"Expected all tensors to be on the same device: `{argument.name}` of {operator} is on cpu, others are on pretend:0")


@contextlib.contextmanager
def device_draws():
    outside = torch.get_rng_state()
    torch.set_rng_state(Backend.random)
    try:
        yield
    finally:
        Backend.random = torch.get_rng_state()
        torch.set_rng_state(outside)


# ---------------------------------------------------------------- what is C++ elsewhere

def lstm_cell(input_gates, hidden_gates, cell, input_bias=None, hidden_bias=None):
    gates = input_gates + hidden_gates if input_bias is None else input_gates + hidden_gates + input_bias + hidden_bias
    let_in, forget, new, let_out = gates.chunk(4, 1)
    cell = forget.sigmoid() * cell + let_in.sigmoid() * new.tanh()
    return let_out.sigmoid() * cell.tanh(), cell, gates


def gru_cell(input_gates, hidden_gates, hidden, input_bias=None, hidden_bias=None):
    if input_bias is not None:
        input_gates, hidden_gates = input_gates + input_bias, hidden_gates + hidden_bias
    (reset, keep, new), (hidden_reset, hidden_keep, hidden_new) = input_gates.chunk(3, 1), hidden_gates.chunk(3, 1)
    new = (new + (reset + hidden_reset).sigmoid() * hidden_new).tanh()
    return new + (keep + hidden_keep).sigmoid() * (hidden - new), input_gates


def in_format(dtype, operator):
    """The operator as autocast calls it."""
    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operator(*tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype), args))
    return kernel


def copy_from(source, target, non_blocking=False):
    """Of torch.tensor(…, device="pretend"), which leaves __torch_dispatch__ out."""
    target.inner.copy_(source)
    return target


class Backend:
    """torch.pretend, with what torch.cuda has."""

    random = torch.Generator().get_state()

    def manual_seed_all(self, seed):
        Backend.random = torch.Generator().manual_seed((seed + 1) % 2 ** 63).get_state()

    def get_rng_state(self, device=None):
        return Backend.random.clone()

    def set_rng_state(self, state, device=None):
        Backend.random = state.clone()

    def mem_get_info(self, device=None):
        return tuple(map(int, os.environ["PRETEND_MEMORY"].split())) if "PRETEND_MEMORY" in os.environ else MEMORY

    def max_memory_allocated(self, device=None):
        return PEAK

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def is_initialized(self):
        return True

    is_available = is_initialized

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def synchronize(self):
        pass


LIBRARIES = []  # what they register lasts as long as they


def register():
    """From now on this process has the device."""
    backend_registration._setup_privateuseone_for_python_backend("pretend", Backend())  # renamed: autograd asks an unnamed one for CUDA
    LIBRARIES[:] = everything, operators = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(compute, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    operators.impl(aten._copy_from.default, copy_from, "PrivateUse1")
    operators.impl(aten._thnn_fused_lstm_cell.default, lstm_cell, "AutogradPrivateUse1")
    operators.impl(aten._thnn_fused_gru_cell.default, gru_cell, "AutogradPrivateUse1")
    for listed, dtype in ((LOWERED, torch.bfloat16), (RAISED, torch.float32)):
        for operator in listed:
            operators.impl(operator, in_format(dtype, operator), "AutocastPrivateUse1")
    torch.serialization.register_package(5, lambda storage: "pretend:0" if getattr(storage, "is_pretend", False) else None, refuse)
    plain = torch.empty
    torch.empty = lambda *shape, pin_memory=False, **options: plain(*shape, **options)  # no backend in Python can pin memory


def refuse(storage, location):
    if location.startswith("pretend"):
        raise RuntimeError("a tensor that was saved on the device is loaded without a map_location")


def main(args):
    getattr(importlib.import_module("test_device"), args.check)()


def parser():
    parser = argparse.ArgumentParser(prog="pretend")
    parser.add_argument("check")
    parser.add_argument("--device")
    return parser
