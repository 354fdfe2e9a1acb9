"""Networks: against formulas written out in float64, and what must hold for any weights."""
import copy

import fakes  # noqa: F401  sets one thread
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import networks
from networks import ConvNet, ConvNet3D, Hallucinator, standardize
from networks.convnet3d import convolve_blocks


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def close(values, reference, relative=1e-5):
    """Largest deviation within `relative` of the reference's largest number."""
    return (values.double() - reference).abs().max() <= relative * reference.abs().max()


# ---------------------------------------------------------------- standardize

@pytest.mark.parametrize("shape", [(5, 4, 3, 6, 6), (5, 3, 6, 6)])
def test_standardize_is_each_clip_minus_its_mean_over_its_deviation(shape):
    clips = torch.randn(shape) * torch.tensor([0.3, 1, 2, 5, 30]).view(-1, *[1] * (len(shape) - 1)) + 3
    plain = torch.stack([(clip.double() - clip.double().mean()) / clip.double().std(correction=0) for clip in clips])
    assert close(standardize(clips), plain)


def test_standardize_forgets_brightness_and_contrast_of_a_clip_and_knows_no_other():
    clips = torch.randn(3, 4, 3, 6, 6)
    changed = clips.clone()
    changed[0] = 7 * clips[0] - 5
    changed[1] = 100
    assert close(standardize(changed)[[0, 2]], standardize(clips)[[0, 2]].double())


def test_standardize_keeps_a_constant_clip_and_its_gradient_finite():
    clips = torch.full((2, 4, 3, 6, 6), 1.7, requires_grad=True)
    values = standardize(clips)
    (values * torch.randn(values.shape)).sum().backward()
    assert values.abs().max() < 1e-2 and clips.grad.isfinite().all()


# ---------------------------------------------------------------- ConvNet3D

def plain_convnet3d(net, clips, size):
    """methods.md 2 in float64, from the network's weights: embedding (B, F) and logits (B, K)."""
    *convolutions, last = [module for module in copy.deepcopy(net).double().modules() if isinstance(module, nn.Conv3d)]
    clips = clips.double()
    x = torch.stack([(clip - clip.mean()) / clip.std(correction=0) for clip in clips]).permute(0, 2, 1, 3, 4)
    for module, pool in zip(convolutions, [(1, 2, 2), (2, 2, 2), (2, 2, 2)], strict=True):
        x = F.conv3d(x, module.weight, module.bias, stride=(1, 2, 2), padding=(1, 3, 3))
        x = F.max_pool3d(x.clamp(min=0), pool)
    pooled = F.avg_pool3d(x, (2, 2, 2) if size > 64 else (2, 1, 1), stride=1)      # (B, 128, t, 1, 1)
    assert pooled.shape[3:] == (1, 1)
    moments = pooled[..., 0, 0].transpose(1, 2) @ last.weight.flatten(1).T + last.bias
    return x.flatten(1), moments.max(1).values


@pytest.mark.parametrize("frames, size, width", [(16, 64, 128), (8, 112, 128), (8, 48, 32)])
def test_convnet3d_is_the_formula_of_the_method(frames, size, width):
    net = ConvNet3D(5, frames, size, width=width).eval()
    assert [module.out_channels for module in net.blocks if isinstance(module, nn.Conv3d)] == [width // 2, width, width]
    clips = 2 * torch.randn(1, frames, 3, size, size) + 1
    with torch.no_grad():
        embedding, logits = plain_convnet3d(net, clips, size)
        assert net.embed(clips).shape == (1, width * (frames // 4) * (2 if size > 64 else 1) ** 2)
        assert close(net.embed(clips), embedding, 1e-4)
        assert close(net(clips), logits, 1e-4)


@pytest.mark.parametrize("frames, size", [(8, 64), (16, 112), (16, 64)])
def test_convnet3d_has_the_papers_number_of_parameters(frames, size):
    with torch.device("meta"):
        assert count(ConvNet3D(50, frames, size)) == 3_647_666


@pytest.mark.parametrize("network, settings, shape", [
    (ConvNet3D, (3, 8, 43), (4, 8, 3, 43, 43)), (ConvNet, (3, 16), (4, 3, 16, 16))])
def test_logits_of_a_clip_do_not_depend_on_its_batch(network, settings, shape):
    net, clips = network(*settings), torch.randn(shape)
    others = torch.cat([clips[:1], 50 * clips[1:] + 20])
    with torch.no_grad():
        alone = net.eval()(clips[:1])
        assert torch.allclose(net(clips)[:1], alone, rtol=1e-4, atol=1e-6)
        assert torch.allclose(net(others)[:1], alone, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(net(clips)[1:2], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", (45, 46, 48))
def test_videos_that_need_a_gradient_take_the_blocks_with_the_same_derivatives(size):
    """First and second derivatives of the first convolution in 2×2 blocks of pixels, against PyTorch's own, in float64."""
    convolution = ConvNet3D(3, 8, 48, width=4).double().blocks[0]
    clips = torch.randn(2, 3, 8, size, size, dtype=torch.float64, requires_grad=True)

    def derivatives(formula):
        out = formula(clips)
        of = clips, *convolution.parameters()
        first = torch.autograd.grad(out.pow(3).sum(), of, create_graph=True)
        return out, *first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), of)
    for ours, plain in zip(derivatives(lambda clips: convolve_blocks(convolution, clips)), derivatives(convolution), strict=True):
        assert ours.shape == plain.shape and torch.allclose(ours, plain, rtol=1e-10, atol=1e-10)


def test_only_videos_that_need_a_gradient_take_the_blocks(monkeypatch):
    taken, net, clips = [], ConvNet3D(3, 8, 43, width=4), torch.randn(1, 8, 3, 43, 43)
    monkeypatch.setattr("networks.convnet3d.convolve_blocks", lambda *given: taken.append(1) or convolve_blocks(*given))
    net(clips), net.embed(clips)
    assert not taken
    net.embed(clips.requires_grad_())
    assert taken == [1]


def test_convnet3d_drops_features_in_training_but_never_in_its_embedding():
    net, clips = ConvNet3D(3, 8, 43).train(), torch.randn(2, 8, 3, 43, 43)
    with torch.no_grad():
        assert not torch.equal(net(clips), net(clips))
        assert torch.equal(net.embed(clips), net.embed(clips))
        net.eval()
        assert torch.equal(net(clips), net(clips))
    assert [module.p for module in net.modules() if isinstance(module, nn.Dropout)] == [0.5]


def test_convnet3d_sees_the_order_of_frames():
    net, clips = ConvNet3D(3, 8, 43).eval(), torch.randn(1, 8, 3, 43, 43)
    with torch.no_grad():
        assert not torch.allclose(net(clips), net(clips.flip(1)), rtol=1e-3)


def test_convnet3d_refuses_less_than_it_can_pool_and_takes_the_rest():
    for frames, size in ((7, 64), (8, 42)):
        with pytest.raises(ValueError, match=f"not {frames} of {size}"):
            ConvNet3D(3, frames, size)
    for frames, size in ((8, 43), (9, 65), (8, 80)):
        net = ConvNet3D(3, frames, size).eval()
        with torch.no_grad():
            assert net(torch.randn(1, frames, 3, size, size)).shape == (1, 3)


# ---------------------------------------------------------------- ConvNet

@pytest.mark.parametrize("size, depth", [(16, 3), (64, 3), (112, 4)])
def test_convnet_is_the_formula_of_the_method(size, depth):
    net, frames = ConvNet(5, size), torch.randn(2, 3, size, size) * 3 + 1
    double = copy.deepcopy(net).double()
    convolutions = [module for module in double.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in double.modules() if isinstance(module, nn.GroupNorm)]
    x = torch.stack([(frame - frame.mean()) / frame.std(correction=0) for frame in frames.double()])
    assert len(convolutions) == depth
    with torch.no_grad():
        for convolution, norm in zip(convolutions, norms, strict=True):
            x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
            mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, correction=0)
            x = (x - mean) / (variance + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
            x = F.avg_pool2d(x.clamp(min=0), 2)
        assert close(net.embed(frames), x.flatten(1), 1e-4)
        assert close(net(frames), x.flatten(1) @ double.logits.weight.T + double.logits.bias, 1e-4)


def test_convnet_refuses_less_than_it_can_pool():
    with pytest.raises(ValueError, match="at least 8 pixels, not 7"):
        ConvNet(3, 7)


# ---------------------------------------------------------------- Hallucinator

def test_hallucinator_has_the_papers_number_of_parameters():
    assert count(Hallucinator()) == count(Hallucinator("identity")) == 327


def test_hallucinator_is_a_convolution_over_time_and_place_of_frame_and_memory():
    hallucinator, B, T, size = Hallucinator(), 2, 4, 5
    static, dynamic = torch.randn(B, 3, size, size), torch.randn(B, T, 1, size, size)
    weight, bias = (parameter.detach().double() for parameter in hallucinator.parameters())   # (3, 4, 3, 3, 3), (3,)
    padded = torch.zeros(B, T + 2, 4, size + 2, size + 2, dtype=torch.float64)
    for t in range(T):
        padded[:, t + 1, :3, 1:-1, 1:-1] = static
        padded[:, t + 1, 3, 1:-1, 1:-1] = dynamic[:, t, 0]
    plain = torch.zeros(B, T, 3, size, size, dtype=torch.float64)
    for t in range(T):
        for y in range(size):
            for x in range(size):
                patch = padded[:, t:t + 3, :, y:y + 3, x:x + 3]                             # (B, 3 times, 4, 3, 3)
                plain[:, t, :, y, x] = (weight[None].transpose(2, 3) * patch[:, None]).sum((2, 3, 4, 5)) + bias
    assert close(hallucinator(static, dynamic).detach(), plain)


@pytest.mark.parametrize("T", (1, 2, 5))
def test_hallucinator_has_the_derivatives_of_the_convolution_over_time_and_place(T):
    hallucinator = Hallucinator().double()
    static, dynamic = (torch.randn(2, *shape, 6, 6, dtype=torch.float64, requires_grad=True) for shape in ((3,), (T, 1)))
    joined = torch.cat([static.unsqueeze(1).expand(-1, T, -1, -1, -1), dynamic], 2).transpose(1, 2)
    plain, videos = hallucinator.convolution(joined).transpose(1, 2), hallucinator(static, dynamic)
    assert videos.shape == (2, T, 3, 6, 6) and torch.allclose(videos, plain, rtol=1e-12)
    of, weight = (static, dynamic, *hallucinator.parameters()), torch.randn_like(plain)
    for ours, theirs in zip(*(torch.autograd.grad(output, of, weight) for output in (videos, plain)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10)


def test_hallucinator_starts_as_static_plus_dynamic_where_asked():
    static, dynamic = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 1, 6, 6)
    videos = Hallucinator("identity")(static, dynamic)
    assert videos.shape == (2, 5, 3, 6, 6)
    for t in range(5):
        assert torch.allclose(videos[:, t], static + dynamic[:, t], atol=1e-6)


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="'ConvNet4D'.*ConvNet3D"):
        networks.build("ConvNet4D", 3, 8, 64)
    with pytest.raises(ValueError, match="'zero'.*random or identity"):
        Hallucinator("zero")


def test_a_fresh_network_comes_from_torchs_generator():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in networks.build("ConvNet3D", 3, 8, 43).parameters()])
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_only_convnet3d_has_a_width():
    def parameters(name, **flags):
        return sum(parameter.numel() for parameter in networks.build(name, 5, 8, 48, **flags).parameters())

    assert parameters("ConvNet3D") == parameters("ConvNet3D", width=128) > 10 * parameters("ConvNet3D", width=32)
    assert parameters("CNN+mean") == parameters("CNN+mean", width=32)
    for width in (0, 1, 33):
        with pytest.raises(ValueError, match=f"the width {width} of ConvNet3D is not an even number of at least 2"):
            networks.build("ConvNet3D", 5, 8, 48, width=width)


def test_recurrent_layers_are_computed_in_float32():
    """On a GPU autocast would compute them in float16, whatever the precision."""
    net, found = networks.build("CNN+LSTM", 3, 4, 16), []
    net.recurrent.register_forward_pre_hook(lambda _, inputs: found.append((inputs[0].dtype, torch.is_autocast_enabled("cpu"))))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 4, 3, 16, 16))
    assert found == [(torch.float32, False)]
