"""Damage for test_fuzz.py: to a file's bytes, to the members of a zip archive, and to the values that a file of json or of tensors holds."""
import copy
import io
import json
import math
import zipfile

import torch

ODD = (None, True, -1, 0, 3, 2 ** 31, 2 ** 63, 10 ** 400, -2.5, 1e308, math.nan, math.inf, "", "x", "../x", "\0", "é" * 300, [], {}, [[]], [1, "x"], {"x": 1})
ODD_TENSORS = (
    lambda tensor: tensor[:1], lambda tensor: tensor[:0], lambda tensor: tensor[None], lambda tensor: tensor.flatten(),
    lambda tensor: tensor.mT if tensor.dim() > 1 else tensor,
    lambda tensor: tensor.flip(0), lambda tensor: -tensor, lambda tensor: tensor * 1e30, lambda tensor: tensor * math.nan, lambda tensor: tensor / 0,
    lambda tensor: tensor.to(torch.int64), lambda tensor: tensor.to(torch.uint8), lambda tensor: tensor > 0, lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor.half(), lambda tensor: tensor.double(), lambda tensor: tensor.to(torch.float8_e4m3fn), lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.to("meta"), lambda tensor: tensor.float().requires_grad_(), lambda tensor: torch.nn.Parameter(tensor.float()),
    lambda tensor: tensor.tolist(), lambda tensor: tensor.flatten()[:1].expand(10 ** 9), lambda tensor: tensor.flatten()[:1].expand(30, 7, 3, 9000, 9000),
    lambda tensor: tensor.flatten()[0].expand(2 ** 31, 2 ** 31), lambda tensor: tensor.reshape(-1, 1).expand(-1, 2 ** 20))


def spoilt(data, rng):
    """The bytes with bits flipped, without their end or a piece, with a piece repeated, overwritten or a huge number in it; never as they were."""
    data, before = bytearray(data), bytes(data)
    while bytes(data) == before:
        first, second = sorted(rng.integers(0, len(data) + 1, 2))
        second = min(second, first + 2 ** int(rng.integers(20)))
        kind = rng.integers(7)
        if kind == 0:
            for _ in range(rng.integers(1, 9)):
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif kind == 1:
            del data[first:]
        elif kind == 2:
            del data[first:second]
        elif kind == 3:
            data[first:first] = data[first:second] * int(rng.integers(1, 6)) if second - first > 64 else data[first:second] * 3000
        elif kind == 4:
            data[first:second] = (b"\0", b"\xff", b"[", b"9", rng.bytes(1))[rng.integers(5)] * (second - first)
        elif kind == 5:
            data[first:first + 8] = int(rng.integers(2 ** 63)).to_bytes(8, "little")
        else:
            data[first:first + 4] = (b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"1e99", b"-999")[rng.integers(4)]
    return bytes(data)


def spoilt_zip(data, rng):
    """The archive with a member that is spoilt and has the right checksum, missing, twice, renamed, empty or another's, or all compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = list(members)
    hit = names[rng.integers(len(names))] if rng.integers(2) else next((name for name in names if name.endswith("data.pkl")), names[0])
    kind, method = rng.integers(7), zipfile.ZIP_STORED
    if kind == 0:
        del members[hit]
    elif kind == 1:
        members[hit] = b""
    elif kind == 2:
        members[hit] = members[names[rng.integers(len(names))]]
    elif kind == 3:
        members[hit + "x"] = members.pop(hit)
    elif kind == 4:
        method = zipfile.ZIP_DEFLATED
    else:
        members[hit] = spoilt(members[hit] or b"\0", rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def places(content):
    """(container, key) of all that is in nested dicts and lists."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ():
        yield content, key
        yield from places(value)


def spoilt_values(content, rng):
    """A copy of nested dicts and lists in which some values are others, missing, swapped, or of other types, sizes and shapes."""
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 4)):
        every = list(places(content))
        if not every:
            return ODD[rng.integers(len(ODD))]
        container, key = every[rng.integers(len(every))]
        value, kind = container[key], rng.integers(6)
        if kind == 0:
            del container[key]
        elif kind == 1:
            other, name = every[rng.integers(len(every))]
            container[key] = copy.deepcopy(other[name])
        elif kind == 2 and isinstance(value, torch.Tensor):
            other = rng.integers(2) and [each[name] for each, name in every if isinstance(each[name], torch.Tensor)]
            container[key] = other[rng.integers(len(other))] if other else odd_tensor(value, rng)
        elif kind == 2 and isinstance(value, (list, str)):
            container[key] = (value * 2, value[:-1], value[::-1])[rng.integers(3)]
        elif kind == 2 and isinstance(value, (int, float)):
            container[key] = (-value, value + 1, value * 10 ** 9, float(value), str(value))[rng.integers(5)]
        elif kind == 3 and isinstance(value, torch.Tensor):
            container[key] = odd_tensor(value, rng)
        else:
            container[key] = ODD[rng.integers(len(ODD))]
    return content


def odd_tensor(tensor, rng):
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.numel() > 10 ** 7:  # already odd
        return tensor
    return ODD_TENSORS[rng.integers(len(ODD_TENSORS))](tensor.detach() if tensor.dim() else tensor.detach()[None])


def tensors_file(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def damaged_tensors(data, rng):
    """A damaged file of tensors."""
    kind = rng.integers(4)
    if kind == 0 and zipfile.is_zipfile(io.BytesIO(data)):
        return spoilt_zip(data, rng)
    if kind < 2:
        return spoilt(data, rng)
    return tensors_file(spoilt_values(torch.load(io.BytesIO(data), weights_only=True), rng), zipped=kind == 2)


def damaged_json(data, rng):
    """A damaged file of json, or of a line of it for each record."""
    if rng.integers(3) == 0:
        return spoilt(data, rng)
    lines = [data] if data.startswith((b"{\n", b"[\n")) else data.splitlines()
    content = spoilt_values([json.loads(line) for line in lines], rng)
    return "".join(f"{json.dumps(record)}\n" for record in (content if isinstance(content, list) else [content])).encode()
