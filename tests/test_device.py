"""Devices: what differs between their kinds, and every script on the pretend accelerator of tests/pretend.py: it starts, goes on from a checkpoint,
evaluates, and what it leaves needs no device."""
import copy
import json
import resource
import sys
import types

import numpy as np
import pretend
import pytest
import torch
from commands import only_folder
from test_run import outcome

import networks
import utils
from distill_utils import compute
from networks import ConvNet

DEVICE = "--device", "pretend"


@pytest.fixture(autouse=True)
def has_pretend(request):
    if "command" in request.fixturenames and not pretend.AVAILABLE:
        pytest.skip("this PyTorch has no backends in Python (2.11 has)")


# ---------------------------------------------------------------- the kinds

KINDS = {  # what PyTorch's module of each is asked for
    "cuda": {"mem_get_info": lambda device: (3, 8), "max_memory_allocated": lambda device: 5, "is_initialized": lambda: True},
    "xpu": {"mem_get_info": lambda device: (3, 8), "max_memory_allocated": lambda device: 5, "is_initialized": lambda: True},
    "mps": {"recommended_max_memory": lambda: 8, "driver_allocated_memory": lambda: 5}}


@pytest.fixture
def accelerator(monkeypatch):
    """accelerator(kind, **answers): PyTorch's accelerator is of this kind, and answers so."""
    def accelerator(kind, **answers):
        module = types.SimpleNamespace(**KINDS[kind] | {"get_rng_state": lambda: torch.tensor([7]), "synchronize": lambda: None} | answers)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        monkeypatch.setattr(torch, kind, module)
        return torch.device(kind)
    return accelerator


@pytest.mark.parametrize("kind, own", (("cuda", True), ("xpu", True), ("mps", False)))
def test_memory_of_each_kind(accelerator, monkeypatch, kind, own):
    device, cpu = accelerator(kind), torch.device("cpu")
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=7))
    assert utils.accelerator_memory(device) == (3, 8) and compute.total_memory(device) == 8
    assert utils.has_own_memory(device) is own and not utils.has_own_memory(cpu)
    for system, resident in (("linux", 7 * 1024), ("darwin", 7)):  # there it is in bytes
        monkeypatch.setattr(sys, "platform", system)
        assert utils.peak_memory(device) == (5 if own else resident) and utils.peak_memory(cpu) == resident


def test_memory_of_an_integrated_gpu(accelerator):
    """Intel's do not tell how much is free."""
    def refuse(device):
        raise RuntimeError("The device doesn't support querying the available free memory")
    device = accelerator("xpu", mem_get_info=refuse, get_device_properties=lambda device: types.SimpleNamespace(total_memory=8))
    assert utils.accelerator_memory(device) == (0, 8) and not compute.stays_on_device(1, device)
    with pytest.raises(RuntimeError):
        utils.accelerator_memory(accelerator("cuda", mem_get_info=refuse))


@pytest.mark.parametrize("kind", KINDS)
def test_random_state_of_each_kind(accelerator, kind):
    """It is kept, and given to a device of the same kind only."""
    given = []
    accelerator(kind, set_rng_state=given.append)
    state = utils.random_state()
    assert list(state["accelerator"]) == [kind]
    for other in ({"cpu": state["cpu"], "accelerator": {"other": state["cpu"]}}, {"cpu": state["cpu"], "accelerator": {}}, {"cpu": state["cpu"], "cuda": []}):
        utils.set_random_state(other)
    assert not given
    utils.set_random_state(state)
    assert [value.tolist() for value in given] == [[7]]


def test_a_run_on_the_cpu_leaves_the_gpu_alone(accelerator):
    """Reading the GPU's random state would take half a GB of it for this process."""
    accelerator("cuda", is_initialized=lambda: False, get_rng_state=None, set_rng_state=None, synchronize=None)
    state = utils.random_state()
    utils.set_random_state(state | {"accelerator": {"cuda": state["cpu"]}})
    utils.synchronize()
    assert state["accelerator"] == {}


# ---------------------------------------------------------------- the pretend device itself, and what the code asks it for; each in a process that has the device

def check_tensors_of_two_devices_are_refused():
    here, there = torch.rand(2, 3), torch.rand(2, 3).to("pretend")
    index, weight = torch.tensor([1]), torch.rand(1, 3, 3, 3)
    for mixed in (lambda: there + here, lambda: here + there, lambda: there @ here.T, lambda: torch.cat((here, there)), lambda: there.add_(here),
                  lambda: here.add_(there.sum()), lambda: here[index.to("pretend")], lambda: there.index_select(0, index), lambda: torch.stack((there, here)),
                  lambda: torch.nn.functional.conv2d(there.view(1, 1, 2, 3).expand(1, 3, 2, 3), weight), lambda: torch.where(there > 0, here, there),
                  lambda: torch.nn.functional.cross_entropy(there, torch.tensor([0, 1])), lambda: torch.equal(here, there), lambda: there.dot(torch.tensor(1.)),
                  lambda: there.index_put_((index,), here[:1]), lambda: there.addcmul(there, here), lambda: torch.nn.functional.linear(there, here)):
        for guard in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with guard(), pytest.raises(RuntimeError, match="device"):
                mixed()
    assert (there * torch.tensor(2.) - 1).device == there[index].device == torch.device("pretend:0")  # as CUDA
    there[index] = torch.zeros((), device="pretend")
    assert there.tolist()[1] == [0, 0, 0]


def check_other_refusals():
    there = torch.rand(2, device="pretend")
    for wrong, error in ((there.numpy, (TypeError, RuntimeError)), (there.double, TypeError), (lambda: there.to("cpu", non_blocking=True), RuntimeError),
                         (lambda: torch.zeros(2).copy_(there, non_blocking=True), RuntimeError)):
        with pytest.raises(error):
            wrong()
    assert torch.zeros(2).copy_(there).tolist() == there.cpu().numpy().tolist()


def check_views_share_memory_and_copies_do_not():
    there = torch.zeros(2, 3).to("pretend")
    there.view(3, 2)[1:].T.add_(1)
    other, back = copy.deepcopy(there), there.cpu()
    there[0] = 5
    assert there.tolist() == [[5, 5, 5], [1, 1, 1]] and other.tolist() == back.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert there.transpose_(0, 1).shape == (3, 2) and isinstance(copy.deepcopy(torch.nn.Parameter(there)), torch.nn.Parameter)


def check_random_state():
    """The device's draws are its own, and part of the run's state."""
    def draws():
        return torch.rand(3, device="pretend").tolist(), torch.nn.functional.dropout(torch.ones(8, device="pretend")).tolist(), torch.rand(3).tolist()
    utils.seed_everything(0)
    state, first = utils.random_state(), draws()
    assert first[0] != first[2] and draws() != first
    utils.set_random_state(state)
    assert draws() == first
    utils.set_random_state(state)
    with utils.random_stream(0):
        assert draws() == first
    assert draws() == first


def check_networks():
    """All networks: output and gradient are the CPU's, in training, in inference mode and in bfloat16."""
    for name in networks.NETWORKS:
        utils.seed_everything(0)
        size = 43 if name == "ConvNet3D" else 20
        net = networks.build(name, 3, 8, size, 8).eval()
        there, clips = copy.deepcopy(net).to("pretend"), torch.rand(2, 8, 3, size, size)
        expected, found = net(clips), there(clips.to("pretend"))
        for output in (expected, found):
            output.square().sum().backward()
        assert_near([found], [expected])
        assert_near([parameter.grad for parameter in there.parameters()], [parameter.grad for parameter in net.parameters()])
        with torch.inference_mode():
            assert_near([there(clips.to("pretend"))], [expected])
            with compute.autocast(torch.device("pretend"), "bf16"):
                assert (half := there(clips.to("pretend"))).dtype == torch.bfloat16
            assert_near([half.float()], [expected], 0.02)


def check_double_backward():
    """Of instance norm, as gradient matching takes it, and of ConvNet3D, as trajectory matching."""
    for make, shape in ((lambda: ConvNet(2, 16, 4), (2, 3, 16, 16)), (lambda: networks.build("ConvNet3D", 2, 8, 43, 4).eval(), (2, 8, 3, 43, 43))):
        utils.seed_everything(0)
        net, inputs, found = make(), torch.rand(shape), []
        for device in ("cpu", "pretend"):
            there, leaf = copy.deepcopy(net).to(device), inputs.to(device).requires_grad_()
            gradients = torch.autograd.grad(there(leaf).square().sum(), list(there.parameters()), create_graph=True)
            found.append([*torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), [leaf])])
        assert_near(*found[::-1])


def assert_near(found, expected, relative=1e-4):
    largest = max(tensor.abs().max() for tensor in expected)
    assert all(tensor.device.type == "pretend" for tensor in found)
    assert all((one.cpu() - other).abs().max() <= relative * largest for one, other in zip(found, expected, strict=True))


def check_memory(monkeypatch=pytest.MonkeyPatch()):
    """The budgets are shares of the device's total, the peak is the device's; clips stay there where they leave five eighths free."""
    device, settings = torch.device("pretend"), (16, 112)
    for free, total in ((0, 2 ** 36), (2 ** 36, 2 ** 36)):
        monkeypatch.setenv("PRETEND_MEMORY", f"{free} {total}")
        assert compute.clips_at_once(*settings, device) == 2 ** 33 // (4 * 64 * 4 * 16 * 56 ** 2)
        step = compute.kept_step_bytes(50, 5, *settings, 128, 10 ** 6)
        assert compute.count_kept_steps(50, 5, *settings, 128, 10 ** 6, device) == 2 ** 35 // step - 1
    assert utils.peak_memory(device) == pretend.PEAK and utils.peak_memory(torch.device("cpu")) != pretend.PEAK
    for free, size, stays in ((8, 3, True), (8, 4, False), (7, 2, True), (7, 3, False), (5, 1, False), (5, 0, True), (0, 1, False)):
        monkeypatch.setenv("PRETEND_MEMORY", f"{free} 8")
        assert compute.stays_on_device(size, device) is stays and not compute.stays_on_device(size, torch.device("cpu"))


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_device(command, check):
    command.submit("pretend", [check, *DEVICE])
    code, printed = command.end()
    assert code == 0, printed


# ---------------------------------------------------------------- the scripts, from start to export

SCRIPTS = "distill_DM", "distill_DC", "distill_MTT", "distill_s2d", "distill_s2d MTT", "buffer"


@pytest.fixture(scope="module")
def on_device(command):
    """on_device(script) gives (run folder, flags that the script needs besides), of an uninterrupted run on the device."""
    done, place = {}, command.folder / "on_device"

    def on_device(script):
        if script not in done:
            extra = ("--path_static", on_device("distill_DC")[0] / "distilled.pt") if script.startswith("distill_s2d") else ()
            extra += ("--buffer_path", on_device("buffer")[0]) if script.endswith("MTT") else ()
            done[script] = run(command, script, place / script.replace(" ", "_"), *DEVICE, *extra), extra
        return done[script]
    return on_device


def run(command, script, save_path, *flags):
    """The folder of a run that ended well."""
    code, printed = command(script, save_path, *flags)
    assert code == 0 and "result:" in printed, printed
    folder = only_folder(save_path)
    return folder


def learned(folder):
    """The set that a run left, with tensors that need no device, as one list of tensors."""
    return utils.tensors(torch.load(folder / "distilled.pt", weights_only=True))


def same(found, expected, relative=1e-5):
    return all((one - other).norm() <= relative * other.norm() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_goes_on_from_a_checkpoint(command, on_device, tmp_path, script):
    """Killed after the checkpoint that follows the first step, bitwise as if it never had been."""
    whole, extra = on_device(script)
    flags = *DEVICE, *extra, "--checkpoint_seconds", 0
    assert command(script, tmp_path, *flags, replace=-3 if script == "buffer" else -8)[0] == -9
    code, printed = command(script, tmp_path, *flags)
    assert code == 0 and "resumed at iteration 1" in printed, printed
    folder = only_folder(tmp_path)
    if script == "buffer":
        for number in range(2):
            assert same(*(utils.tensors(torch.load(place / f"replay_buffer_{number}.pt", weights_only=True)) for place in (folder, whole)), 0)
    else:
        assert outcome(folder) == outcome(whole)
    assert json.loads((folder / "result.json").read_text())["peak_memory"] == pretend.PEAK


@pytest.mark.parametrize("script, flags", (
    ("distill_DM", ""),
    ("distill_DM", "--n_syn 2 --interpolation parametric --lr_interpolation 1 --segments 2 --init mean"),
    ("distill_DM", "--n_real 2 --n_syn 1 --init still"),
    ("distill_DM", "--pool 2 --batch_real 64 --init noise"),
    ("distill_DM", "--validation 0.34 --no_pack"),
    ("distill_DC", "--init mean --ipc 1"),
    ("distill_s2d", "--init_dynamic residual --init_hal identity --train_static"),
    ("distill_s2d", "--init_dynamic motion"),
    ("distill_utils.coreset", "--method random")))
def test_learns_what_the_cpu_learns(command, on_device, tmp_path, script, flags):
    """All that these draw comes from the CPU's random numbers (dropout alone draws on the device): the sets are the same, to rounding."""
    flags = [*flags.split(), *(on_device(script)[1] if script == "distill_s2d" else ()), "--precision", "fp32"]
    assert same(*(learned(run(command, script, tmp_path / device, *flags, "--device", device)) for device in ("pretend", "cpu")))


@pytest.mark.parametrize("script, flags", (
    ("distill_DM", "--precision bf16"), ("distill_MTT", "--precision bf16 --replay all"), ("distill_MTT", "--replay none --trajectories_per_step 2 --batch_syn 1"),
    ("buffer", "--buffer_dtype bfloat16 --precision bf16"), ("distill_utils.coreset", "--method herding --feature_epochs 1"),
    ("distill_utils.coreset", "--method k-center --feature_epochs 1 --ipc 2"), ("distill_utils.evaluate", ""), ("distill_utils.evaluate", "--n_real 1")))
def test_options_that_round_or_draw_otherwise(command, on_device, tmp_path, script, flags):
    run(command, script, tmp_path, *flags.split(), *(on_device(script)[1] if script == "distill_MTT" else ()), *DEVICE)


@pytest.mark.parametrize("first, then", (("cpu", "pretend"), ("pretend", "cpu")))
def test_goes_on_on_another_device(command, on_device, tmp_path, first, then):
    """The device does not choose the run's folder; where the precision is the same, so is the run."""
    (whole, _), flags = on_device("distill_DM"), ("--precision", "fp32", "--checkpoint_seconds", 0)
    assert command("distill_DM", tmp_path, *flags, "--device", first, replace=-8)[0] == -9
    code, printed = command("distill_DM", tmp_path, *flags, "--device", then)
    assert code == 0 and "resumed at iteration 1" in printed, printed
    folder = only_folder(tmp_path)
    assert same(learned(folder), learned(whole))


def test_clips_that_do_not_fit_on_the_device(command, on_device, tmp_path):
    """They are read from the pack, a batch at a time, and are the same."""
    code, printed = command("distill_DM", tmp_path, *DEVICE, PRETEND_MEMORY=f"{2 ** 30} {2 ** 40}")
    assert code == 0, printed
    folder = only_folder(tmp_path)
    assert same(learned(folder), learned(on_device("distill_DM")[0]), 0)


@pytest.mark.parametrize("script", ("distill_DM", "distill_DC", "distill_s2d"))
def test_evaluation_and_export(command, on_device, tmp_path, script):
    folder, _ = on_device(script)
    names = ",".join(networks.NETWORKS) if script == "distill_DM" else "CNN+mean"
    command.submit("distill_utils.evaluate", [folder, "--networks", names, "--pack_path", command.folder / "packs", *DEVICE])
    code, printed = command.end()
    assert code == 0 and all(name in printed for name in names.split(",")), printed
    for format in ("npz", "pt", "gif", "mp4"):
        command.submit("distill_utils.export", [folder, "--format", format, "--out", tmp_path])
        assert command.end()[0] == 0
    videos = torch.load(tmp_path / "distilled.pt", weights_only=True)["videos"]
    assert videos.shape[1:] == np.load(tmp_path / "distilled.npz")["videos"].transpose(0, 1, 4, 2, 3).shape[1:] == (8, 3, 43, 43)
    assert len(list(tmp_path.glob("*.gif"))) == len(list(tmp_path.glob("*.mp4"))) == len(videos)


def test_a_selection_that_was_stopped_before_its_test(command, tmp_path):
    """It is read from its file, and tested on the device."""
    flags = *DEVICE, "--validation", 0.34
    run(command, "distill_utils.coreset", tmp_path / "whole", *flags)  # and makes the packs
    assert command("distill_utils.coreset", tmp_path / "stopped", *flags, replace=-8)[0] == -9
    found = [run(command, "distill_utils.coreset", tmp_path / name, *flags) for name in ("stopped", "whole")]
    assert outcome(found[0]) == outcome(found[1])


def test_a_finished_run_changes_nothing(command, on_device, tmp_path):
    folder, _ = on_device("distill_DM")
    before = outcome(folder)
    code, printed = command("distill_DM", folder.parent.parent, *DEVICE)
    assert code == 0 and "result:" in printed and outcome(folder) == before
