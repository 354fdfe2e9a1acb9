"""Loading, DM iteration and evaluation against their plain forms, alternating in one process, median of five.

    bash sh/quickstart.sh; .venv/bin/python tests/benchmark.py

The plain forms are what the known implementations do: PIL decoding per access, float32 clips preloaded, one class at a time, the real
branch with its graph, contiguous layout. Sizes: the toy set, 8 classes of 24 clips of 8 frames at 64 pixels.
"""
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import normalize as torchvision_normalize
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import networks
from distill_DM import DistributionMatching
from distill_utils.clips import load_clips
from distill_utils.datasets import frame_names, read_videos
from distill_utils.evaluate import predict, train
from distill_utils.synset import PixelSet, real_videos
from utils import random_stream

GFLOP = 1.8  # forward of one clip through ConvNet3D at 64 pixels, 8 frames


class NoBar:
    def update(self):
        pass


def contiguous(net):
    """The same network without our memory layout."""
    net.features = lambda clips: net.blocks(networks.standardize(clips).transpose(1, 2))
    return net


def alternate(functions, repeats=5):
    """Median seconds of each function, in turns."""
    times = {name: [] for name in functions}
    for name, function in functions.items():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(title, seconds, unit=1):
    plain = seconds["plain"]
    print(title + ": " + ", ".join(f"{name} {1000 * value / unit:.2f} ms ({plain / value:.1f}×)" for name, value in seconds.items()), flush=True)


def plain_loading(folders):
    clips = []
    for folder in folders:
        names = frame_names(folder)[:8]
        frames = [torchvision_normalize(to_tensor(Image.open(f"{folder}/{name}")), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
                  for name in names]
        clips.append(torch.stack(frames))
    return torch.stack(clips)


def plain_dm(clips, labels, videos, per_class):
    """One class at a time, as DM is usually written; the gradient in videos.grad."""
    net = contiguous(networks.ConvNet3D(8, 8, 64)).requires_grad_(False)
    loss = 0
    for label in range(8):
        index = (labels == label).nonzero().flatten()
        real = clips[index[torch.randperm(len(index))[:per_class]]]
        n = len(videos) // 8
        loss = loss + (net.embed(real).mean(0) - net.embed(videos[label * n:(label + 1) * n]).mean(0)).square().sum()
    loss.backward()


def plain_evaluation(videos, labels, folders, epochs):
    net = contiguous(networks.ConvNet3D(8, 8, 64))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.005, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(videos, labels), 256, shuffle=True)
    for _ in range(epochs):
        for batch, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(batch), target).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        for _ in range(3):  # three random clips of each test video, decoded each time
            for part in range(0, len(folders), 32):
                net(plain_loading(folders[part:part + 32]))


def fast_evaluation(synset, test, epochs, precision):
    net = networks.ConvNet3D(8, 8, 64)
    train(net, synset, epochs, 0.005, 256, 64, precision, NoBar())
    predict(net, test, precision)


def main():
    torch.manual_seed(0)
    clips, test = load_clips("toy", split="train"), load_clips("toy", split="test")
    videos, _ = read_videos("toy")
    folders = {split: videos.folder[videos.split == split].tolist() for split in ("train", "test")}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    index = torch.arange(32)
    report("loading, a clip", alternate({"plain": lambda: plain_loading(folders["train"][:32]), "pack, uint8": lambda: clips.gather(index),
                                         "pack, normalised": lambda: clips.draw(index)}), unit=32)

    synset = PixelSet(real_videos(clips, 1), 8)
    preloaded = clips.draw(torch.arange(len(clips)))
    fp32, bf16 = (DistributionMatching(clips, 24, precision) for precision in ("fp32", "bf16"))
    seconds = alternate({"plain": lambda: plain_dm(preloaded, clips.labels, synset.videos, 24), "fp32": lambda: fp32(synset).backward(),
                         "bf16": lambda: bf16(synset).backward()})
    report("DM iteration, 192 clips and 8 videos", seconds)
    work = GFLOP * (192 + 8 * 2)  # the gradient with respect to the videos is one more forward
    a = torch.randn(64, 64, 10, 34, 34).to(memory_format=torch.channels_last_3d)
    w = torch.randn(128, 64, 3, 7, 7)
    outputs = F.conv3d(a, w, stride=(1, 2, 2)).numel()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, y = a.to(dtype), w.to(dtype)
        with torch.inference_mode():
            rate = 2 * outputs * w[0].numel() / alternate({"conv": lambda: F.conv3d(x, y, stride=(1, 2, 2))})["conv"] / 1e9
        print(f"{precision}: {work / seconds[precision]:.0f} GFLOP/s of {rate:.0f} of the middle convolution alone "
              f"({work / seconds[precision] / rate:.0%})", flush=True)

    synset, epochs = synset.frozen(), 20
    seconds = alternate({"plain": lambda: plain_evaluation(synset.videos, synset.labels, folders["test"], epochs),
                         "fp32": lambda: fast_evaluation(synset, test, epochs, "fp32"),
                         "bf16": lambda: fast_evaluation(synset, test, epochs, "bf16")}, repeats=5)
    report(f"evaluation, {epochs} epochs of 8 videos, 288 test clips", seconds)


if __name__ == "__main__":
    with random_stream(0):
        main()
