"""Matching losses and their gradients, against plain loops in float64 over what was really drawn."""
import copy

import pytest
import torch
import torch.nn.functional as F
from fakes import PRECISIONS, TinyNet, random_clips
from test_synset import pairs
from torch import nn

import networks
from distill_DC import GradientMatching, loops, row_distance
from distill_DM import DistributionMatching
from distill_utils import compute
from distill_utils.clips import normalize
from distill_utils.compute import KnownGradient, clips_at_once
from distill_utils.synset import PixelSet, StaticDynamicSet, StillSet
from networks import Hallucinator

K, T, SIZE = 3, 4, 8
LABELS = [2, 0, 1, 0, 2, 2, 1, 0, 1, 2, 2]  # not in class order, of unequal numbers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(values, reference, relative=1e-5):
    """The difference within `relative` of the reference, both as vectors."""
    return (values.detach().double() - reference.detach()).norm() <= relative * reference.detach().norm()


def spy_draws(clips):
    """A list that will hold (label, float64 clip) of each real clip drawn from `clips`."""
    drawn, draw = [], clips.draw

    def spy(index, **flags):
        batch = draw(index, **flags)
        drawn.extend(zip(clips.labels[index].tolist(), batch.double()))
        return batch
    clips.draw = spy
    return drawn


def count(drawn):
    """How many clips of each class were drawn."""
    return [sum(label == c for label, _ in drawn) for c in range(K)]


@pytest.fixture
def nets(monkeypatch):
    """The networks that are built, in order; they are TinyNets unless the table is mended."""
    built = []
    monkeypatch.setitem(networks.NETWORKS, "ConvNet3D", TinyNet)
    build = networks.build
    monkeypatch.setattr(networks, "build", lambda *settings: built.append(build(*settings)) or built[-1])
    return built


# ---------------------------------------------------------------- DM

def plain_distribution_matching(net, real, videos, num_classes, ipc):
    """Σ_c ‖ mean_b embed(clip_cb) − mean_n embed(video_cn) ‖², one clip at a time; videos (K·N, T, 3, H, W) float64."""
    net, loss = copy.deepcopy(net).double(), 0
    for c in range(num_classes):
        real_mean = synthetic_mean = 0
        clips = [clip for label, clip in real if label == c]
        for clip in clips:
            real_mean = real_mean + net.embed(clip[None])[0] / len(clips)
        for n in range(ipc):
            synthetic_mean = synthetic_mean + net.embed(videos[c * ipc + n][None])[0] / ipc
        loss = loss + ((real_mean - synthetic_mean) ** 2).sum()
    return loss


def double_static_dynamic(synset, numbers):
    """Videos (K·N, T, 3, H, W) of the pairs `numbers` in float64, and the leaves S, D and H that they are made of."""
    copied = copy.deepcopy(synset).double().requires_grad_(True)
    static, dynamic = copied.static.flatten(0, 1), copied.dynamic.flatten(0, 1)
    return torch.cat([copied.hallucinator(static[s][None], dynamic[d][None]) for s, d in zip(*numbers)]), copied


def static_dynamic(ipc, spc, dpc):
    static, dynamic = torch.randn(K, spc, 3, SIZE, SIZE), torch.randn(K, dpc, T, 1, SIZE, SIZE)
    return StaticDynamicSet(static, dynamic, Hallucinator(), ipc)


@pytest.mark.parametrize("batch_real", [3, 64])
@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 1000])
def test_dm_of_pixels_is_the_plain_loop_for_any_chunks(nets, at_once, batch_real):
    clips, synset = random_clips(LABELS, K, T=T, size=SIZE), PixelSet(torch.randn(K * 2, T, 3, SIZE, SIZE), K)
    drawn, matching = spy_draws(clips), DistributionMatching(clips, batch_real)
    matching.at_once = at_once
    loss = matching(synset)
    (3 * loss).backward()

    assert count(drawn) == [min(batch_real, LABELS.count(c)) for c in range(K)]
    videos = synset.videos.detach().double().requires_grad_()
    plain = plain_distribution_matching(nets[0], drawn, videos, K, 2)
    (3 * plain).backward()
    assert close(loss, plain) and close(synset.videos.grad, videos.grad)
    assert all(parameter.grad is None for parameter in nets[0].parameters())


@pytest.mark.parametrize("lr_static", [0, 1])
@pytest.mark.parametrize("at_once, ipc, spc, dpc", [
    (1, 1, 2, 2), (2, 1, 2, 2), (3, 2, 4, 2), (1, 3, 3, 6), (1000, 2, 4, 6)])
def test_dm_of_static_and_dynamic_memory_is_the_plain_loop(nets, at_once, ipc, spc, dpc, lr_static):
    clips, synset = random_clips(LABELS, K, T=T, size=SIZE), static_dynamic(ipc, spc, dpc)
    synset.param_groups(1, 1, lr_static)
    states = []
    synset.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    drawn, matching = spy_draws(clips), DistributionMatching(clips, 64)
    matching.at_once = at_once
    loss = matching(synset)
    loss.backward()

    assert len(states) == 1  # a loss is of one pairing
    torch.set_rng_state(states[0])
    videos, plain_set = double_static_dynamic(synset, pairs(synset, torch.arange(K * ipc)))
    plain = plain_distribution_matching(nets[0], drawn, videos, K, ipc)
    plain.backward()
    assert close(loss, plain) and close(synset.dynamic.grad, plain_set.dynamic.grad)
    for parameter, reference in zip(synset.hallucinator.parameters(), plain_set.hallucinator.parameters(), strict=True):
        assert close(parameter.grad, reference.grad)
    if lr_static:
        assert close(synset.static.grad, plain_set.static.grad)
    else:
        assert synset.static.grad is None


def test_dm_of_the_papers_network_is_the_plain_loop(nets, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "ConvNet3D", networks.ConvNet3D)
    clips, synset = random_clips([1, 0, 1], 2, T=8, size=43), PixelSet(torch.randn(2, 8, 3, 43, 43), 2)
    drawn, matching = spy_draws(clips), DistributionMatching(clips, 64)
    matching.at_once = 2
    loss = matching(synset)
    loss.backward()
    videos = synset.videos.detach().double().requires_grad_()
    plain = plain_distribution_matching(nets[0], drawn, videos, 2, 1)
    plain.backward()
    assert close(loss, plain, 1e-4) and close(synset.videos.grad, videos.grad, 1e-3)


def test_dm_draws_the_same_whatever_the_chunks(nets):
    def loss(at_once):
        torch.manual_seed(5)
        matching = DistributionMatching(random_clips(LABELS * 3, K, T=T, size=SIZE), 4)
        matching.at_once = at_once
        return matching(PixelSet(torch.zeros(K, T, 3, SIZE, SIZE), K)).double(), torch.rand(1)
    (whole, after), (pieces, after_pieces) = loss(1000), loss(5)
    assert close(pieces, whole) and torch.equal(after, after_pieces)


def test_dm_takes_a_fresh_network_clips_and_flips_every_time(nets):
    clips, synset = random_clips(LABELS * 3, K, T=T, size=SIZE), PixelSet(torch.randn(K, T, 3, SIZE, SIZE), K)
    drawn, matching = spy_draws(clips), DistributionMatching(clips, 2)
    matching(synset), matching(synset)
    first, second = drawn[:6], drawn[6:]
    assert len(nets) == 2 and not torch.equal(nets[0].convolution.weight, nets[1].convolution.weight)
    assert not all(torch.equal(one, other) for (_, one), (_, other) in zip(first, second, strict=True))
    stored = normalize(clips.resident).double()
    mirrored = [not any(torch.equal(clip, each) for each in stored) for _, clip in drawn]
    assert 0 < sum(mirrored) < len(mirrored)


def test_dm_never_holds_more_than_its_chunk(nets, monkeypatch):
    sizes, embed = [], TinyNet.embed
    monkeypatch.setattr(TinyNet, "embed", lambda net, clips: sizes.append(len(clips)) or embed(net, clips))
    matching = DistributionMatching(random_clips(LABELS, K, T=T, size=SIZE), 64)
    for at_once in (1, 2, 5):  # one class is the least that the synthetic branch can take
        matching.at_once = at_once
        matching(PixelSet(torch.randn(K * 2, T, 3, SIZE, SIZE), K))
        real, synthetic = sizes[:-K], sizes[-K:]
        assert max(real) <= at_once and sum(real) == len(LABELS) and synthetic == [2] * K  # a class: half of at_once, or its N
        sizes.clear()


def test_dm_descends(nets):
    clips, synset = random_clips(LABELS, K, T=T, size=SIZE), PixelSet(2 * torch.randn(K, T, 3, SIZE, SIZE) + 2, K)
    optimizer, losses = torch.optim.SGD(synset.param_groups(1.0), momentum=0.5), []
    matching = DistributionMatching(clips, 64)
    for _ in range(60):
        optimizer.zero_grad()
        loss = matching(synset)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_dm_in_bfloat16_is_near_and_keeps_float32_sums(nets):
    results = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(2)
        synset = PixelSet(torch.randn(K, T, 3, SIZE, SIZE), K)
        loss = DistributionMatching(random_clips(LABELS, K, T=T, size=SIZE), 64, precision)(synset)
        loss.backward()
        results[precision] = loss, synset.videos.grad
        assert loss.dtype == synset.videos.grad.dtype == torch.float32
    for half, full in zip(results["bf16"], results["fp32"]):
        assert close(half, full.double(), 0.05) and not torch.equal(half, full)


def test_known_gradient_hands_on_a_gradient_that_passes_gradcheck():
    def cubes(values):
        return KnownGradient.apply((values ** 3).sum().detach(), [3 * values.detach() ** 2], values)
    assert torch.autograd.gradcheck(cubes, torch.randn(4, 2, dtype=torch.float64, requires_grad=True))


def test_how_many_clips_go_through_at_once_falls_with_their_size():
    cpu = torch.device("cpu")
    numbers = [clips_at_once(T, size, cpu) for T, size in ((8, 16), (8, 43), (8, 64), (16, 112), (64, 512))]
    assert numbers[0] <= 1024 and numbers == sorted(numbers, reverse=True) and numbers[-1] == 1
    assert numbers[2] == 2 ** 29 // (4 * 64 * 4 * 8 * 32 ** 2)  # four times the first block's 64 channels in 0.5 GB


# ---------------------------------------------------------------- DC

def plain_weight_gradients(net, frames, label, **options):
    """Gradient of the mean cross-entropy of one class's frames by the weights of convolutions and linear layers."""
    weights = [module.weight for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    loss = sum(-F.log_softmax(net(frame[None])[0], 0)[label] for frame in frames) / len(frames)
    return torch.autograd.grad(loss, weights, **options)


def plain_row_distance(synthetic, real):
    """Σ 1 − cos over output rows, one row at a time."""
    total = 0
    for s, r in zip(synthetic, real, strict=True):
        s, r = s.reshape(-1), r.reshape(-1)
        total = total + 1 - (s @ r) / ((s @ s).sqrt() * (r @ r).sqrt())
    return total


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7)])
def test_row_distance_is_one_minus_cosine_summed_over_rows(shape):
    synthetic, real = torch.randn(shape, requires_grad=True), torch.randn(shape)
    leaf = synthetic.detach().double().requires_grad_()
    distance, plain = row_distance(synthetic, real), plain_row_distance(leaf, real.double())
    distance.backward(), plain.backward()
    assert close(distance, plain) and close(synthetic.grad, leaf.grad)
    assert row_distance(real, 5 * real).item() == pytest.approx(0, abs=1e-4)
    assert row_distance(real, -real).item() == pytest.approx(2 * len(real), rel=1e-4)


def test_row_distance_of_dead_filters_is_finite():
    synthetic, real = torch.randn(4, 6), torch.randn(4, 6)
    synthetic[0] = real[1] = 0
    synthetic[2] = real[2] = 0
    synthetic.requires_grad_()
    distance = row_distance(synthetic, real)
    distance.backward()
    assert distance.isfinite() and synthetic.grad.isfinite().all()


def gradient_matching(clips, batch_real=256, outer_loop=1, inner_loop=1, batch_train=256):
    return GradientMatching(clips, batch_real, outer_loop, inner_loop, 0.01, batch_train, "fp32")


@pytest.mark.parametrize("batch_real", [2, 256])
def test_dc_is_the_plain_double_loop_over_rows(batch_real):
    clips, spc, size = random_clips(LABELS, K, T=1, size=16), 2, 16
    synset, net = StillSet(torch.randn(K, spc, 3, size, size), 1, T), networks.ConvNet(K, size, width=12)
    drawn = spy_draws(clips)
    loss = gradient_matching(clips, batch_real).match(net, synset)

    assert count(drawn) == [min(batch_real, LABELS.count(c)) for c in range(K)]
    assert all(parameter.grad is None for parameter in net.parameters())
    double, static, plain = copy.deepcopy(net).double(), synset.static.detach().double().requires_grad_(), 0
    for c in range(K):
        real = plain_weight_gradients(double, [clip[0] for label, clip in drawn if label == c], c)
        synthetic = plain_weight_gradients(double, static[c], c, create_graph=True)
        assert len(real) == 4
        plain = plain + sum(plain_row_distance(s, r) for s, r in zip(synthetic, real))
    plain.backward()
    # The small number beside the norms is in the loss, not in the formula.
    assert close(torch.tensor(loss), plain, 1e-4) and close(synset.static.grad, static.grad, 1e-3)


def test_dc_distance_is_nothing_for_the_real_frames_themselves():
    clips = random_clips([0, 1, 2, 0, 1, 2], K, T=1, size=16)
    clips.draw = lambda index, flip: type(clips).draw(clips, index)  # never mirrored
    net = networks.ConvNet(K, 16)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    same = StillSet(clips.draw(order, flip=False)[:, 0].unflatten(0, (K, 2)), 1, T)
    other = StillSet(torch.randn(K, 2, 3, 16, 16), 1, T)
    assert gradient_matching(clips).match(net, same) < 0.02 * gradient_matching(clips).match(net, other)


@pytest.fixture
def iteration(monkeypatch):
    """Runs one iteration of DC; returns the loss and how its steps and the network's updates followed one another."""
    def iterate(outer_loop, inner_loop, batch_train=256, lr_img=0.1):
        clips, events = random_clips(LABELS, K, T=1, size=16), []
        synset = StillSet(torch.randn(K, 2, 3, 16, 16), 1, T)
        optimizer = torch.optim.SGD(synset.parameters(), lr=lr_img, momentum=0.5)
        matching, step = gradient_matching(clips, 256, outer_loop, inner_loop, batch_train), torch.optim.SGD.step

        def spy(self, *values):
            events.append("frames" if self is optimizer else "network")
            return step(self, *values)
        monkeypatch.setattr(torch.optim.SGD, "step", spy)
        losses, before = [], synset.static.detach().clone()
        matching.iterate(synset, optimizer, losses.append)
        return losses, events, (synset.static - before).abs().amax((2, 3, 4))
    return iterate


def test_dc_iteration_steps_the_frames_and_trains_the_network_between(iteration):
    losses, events, moved = iteration(outer_loop=3, inner_loop=2, batch_train=4)
    between = ["network"] * 4  # 2 epochs of 6 frames in batches of 4
    assert events == ["frames", *between, "frames", *between, "frames"]
    assert len(losses) == 3 and all(0 < loss < 1000 for loss in losses)
    assert (moved > 0).all()


@pytest.mark.parametrize("batch_train", [4, 256])
def test_dc_trains_its_network_by_plain_sgd_on_the_frames(monkeypatch, batch_train):
    synset, net, order = StillSet(torch.randn(K, 2, 3, 16, 16), 1, T), networks.ConvNet(K, 16, width=8), []
    double, shuffle = copy.deepcopy(net).double(), torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n: order.append(shuffle(n)) or order[-1])
    matching = gradient_matching(random_clips(LABELS, K, T=1, size=16), inner_loop=3, batch_train=batch_train)
    matching.train(net, synset)

    assert len(order) == 3
    before, parameters = copy.deepcopy(double), list(double.parameters())
    frames = synset.static.detach().double().flatten(0, 1)
    for batch in [batch for epoch in order for batch in epoch.split(batch_train)]:
        loss = sum(-F.log_softmax(double(frames[n:n + 1])[0], 0)[n // 2] for n in batch.tolist()) / len(batch)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter.sub_(0.01 * gradient)
    for parameter, reference, start in zip(net.parameters(), parameters, before.parameters()):
        assert (parameter - reference).norm() < 1e-3 * (start - reference).norm() + 1e-7
    assert synset.static.grad is None


def test_dc_network_learns_from_the_frames_only(iteration):
    losses, events, moved = iteration(outer_loop=2, inner_loop=30, lr_img=0)
    assert (moved == 0).all() and losses[0] != losses[1]


def test_dc_descends():
    clips = random_clips(LABELS, K, T=1, size=16)
    synset, net = StillSet(torch.randn(K, 1, 3, 16, 16), 1, T), networks.ConvNet(K, 16, width=16)
    matching = gradient_matching(clips)
    optimizer, losses = torch.optim.SGD(synset.parameters(), lr=0.1, momentum=0.5), []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(matching.match(net, synset))
        optimizer.step()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_loops_are_the_papers_unless_flags_give_them():
    assert [loops(spc, None, None) for spc in (1, 2, 5, 10, 20, 30, 40, 50)] == [
        (1, 1), (1, 1), (1, 1), (10, 50), (20, 25), (30, 20), (40, 15), (50, 10)]
    assert loops(10, 3, None) == (3, 50) and loops(10, None, 4) == (10, 4) and loops(7, 2, 3) == (2, 3)
    for given in ((None, None), (1, None), (None, 1)):
        with pytest.raises(ValueError, match="--spc 7 .*--outer_loop and --inner_loop"):
            loops(7, *given)


# ---------------------------------------------------------------- number formats

def test_auto_is_bf16_where_the_hardware_has_it(monkeypatch, tmp_path):
    cpu, info = torch.device("cpu"), tmp_path / "cpuinfo"
    for flags, has in (("fpu avx512_bf16 sse", True), ("amx_tile amx_bf16", True), ("fp asimd bf16", False), ("avx_vnni avx_ne_convert", False), ("fpu avx512f avx2", False), ("xbf16x", False)):
        info.write_text(f"flags : {flags}\n")
        assert compute.cpu_has_bf16(info) is has
        monkeypatch.setattr(compute, "cpu_has_bf16", lambda has=has: has)
        assert compute.set_precision(cpu, "auto") == ("bf16" if has else "fp32")
        monkeypatch.undo()
    assert not compute.cpu_has_bf16(tmp_path / "none") and not compute.cpu_only_infers_in_bf16(tmp_path / "none")
    for flags, only in (("avx_vnni avx_ne_convert", True), ("avx512_bf16 avx_ne_convert", False), ("avx2", False)):
        info.write_text(f"flags : {flags}\n")
        assert compute.cpu_only_infers_in_bf16(info) is only
    with monkeypatch.context() as patch:
        patch.setattr(compute, "cpu_only_infers_in_bf16", lambda: True)
        with pytest.raises(ValueError, match="--precision bf16: PyTorch cannot train in bf16 on this CPU: give fp32"):
            compute.set_precision(cpu, "bf16")
        assert compute.set_precision(cpu, "fp32") == "fp32"
    assert [compute.set_precision(cpu, name) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    with pytest.raises(ValueError, match="--precision tf32 needs an NVIDIA GPU of the Ampere generation or later: give fp32 or bf16"):
        compute.set_precision(cpu, "tf32")


@pytest.mark.parametrize("capability, auto, allowed", (((9, 0), "bf16", True), ((7, 5), "fp32", False)))
def test_precision_of_a_gpu(monkeypatch, capability, auto, allowed):
    """tf32 is PyTorch's default for convolutions there: fp32 must turn it off."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    gpu = torch.device("cuda")
    for cudnn in (90800, 91002, 91499):  # whose bf16 convolutions over time are wrong or slow
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda cudnn=cudnn: cudnn)
        assert compute.set_precision(gpu, "auto") == "fp32"
    for cudnn in (None, 90799, 91500):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda cudnn=cudnn: cudnn)
        assert compute.set_precision(gpu, "auto") == auto
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    if allowed:
        assert compute.set_precision(gpu, "tf32") == "tf32" and torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        assert compute.set_precision(gpu, "bf16") == "bf16"
    else:
        for precision in ("bf16", "tf32"):
            with pytest.raises(ValueError, match=f"--precision {precision} needs an NVIDIA GPU of the Ampere generation or later"):
                compute.set_precision(gpu, precision)
    compute.set_precision(torch.device("cpu"), "fp32")
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert compute.set_precision(gpu, "auto") == auto
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        compute.set_precision(gpu, "tf32")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sums_and_gradients_are_float32(nets, monkeypatch, precision):
    """Class means, loss and the videos' gradient; only what the convolutions give is rounded."""
    monkeypatch.undo()  # ConvNet3D itself
    clips, synset = random_clips([0, 0, 1, 1], 2, T=8, size=43), PixelSet(torch.randn(2, 8, 3, 43, 43), 2)
    matching = DistributionMatching(clips, 2, precision, width=8)
    assert matching.real_means(networks.build("ConvNet3D", 2, 8, 43, width=8), slice(None), {}, range(2), torch.arange(4)).dtype == torch.float32
    loss = matching(synset)
    loss.backward()
    assert loss.dtype == synset.videos.grad.dtype == torch.float32


def test_compiled_networks_give_the_same(nets, monkeypatch):
    """Through torch's own tracing, without code generation, which takes a minute."""
    compile_function, built = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda function, **options: built.append(function) or compile_function(function, backend="aot_eager", **options))
    monkeypatch.setattr(nn.Module, "compile", lambda net, **options: setattr(net, "_compiled_call_impl", torch.compile(net._call_impl, **options)))
    clips = random_clips(LABELS, K, T=T, size=SIZE)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(1)
        synset = PixelSet(torch.ones(K, T, 3, SIZE, SIZE), K)
        for _ in range(2):
            loss = DistributionMatching(clips, 3, compile=compiled)(synset)
            loss.backward()
        losses.append((loss, synset.videos.grad))
        assert len(built) == 4 * compiled  # forward and embed of two fresh networks
    assert close(losses[1][0], losses[0][0]) and close(losses[1][1], losses[0][1])
