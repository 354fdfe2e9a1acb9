"""Loading, DM iteration, MTT step, expert epoch and evaluation against their plain forms, alternating in one process, median of five.

For us; sh/benchmark.sh is the user's.

    bash sh/quickstart.sh; .venv/bin/python tests/benchmark.py [prepare loading dm evaluation mtt memory experts]

The plain forms are what the known implementations do: PIL decoding per access, float32 clips preloaded, one class at a time, the real
branch with its graph, contiguous layout, the unrolled graph of all the student's steps. Sizes: the toy set, 8 classes of 24 clips of 8 frames at 64 pixels.
"""
import functools
import itertools
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile

import av
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import normalize as torchvision_normalize
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import networks
from distill_DM import DistributionMatching
from distill_MTT import TrajectoryMatching
from distill_utils import measure
from distill_utils.clips import load_clips
from distill_utils.datasets import read_videos
from distill_utils.decode import Picture, make_folder
from distill_utils.evaluate import RealSet, predict, train, train_epoch
from distill_utils.frames import frame_names
from distill_utils.starts import random_numbers
from distill_utils.synset import PixelSet
from distill_utils.workers import in_processes
from networks import FlatNetwork
from utils import random_stream

CPU = torch.device("cpu")


class NoBar:
    def update(self):
        pass


def contiguous(net):
    """The same network without our memory layout."""
    net.features = lambda clips: net.blocks(networks.standardize(clips).transpose(1, 2))
    return net


def alternate(functions, repeats=5):
    """Median seconds of each function, in turns."""
    for function in functions.values():
        function()
    return {name: statistics.median(seconds) for name, seconds in measure.alternate(functions, repeats).items()}


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


class TwoSnapshots:
    """The experts of a step: parameters as they are made, and a little further."""

    def __init__(self, net):
        self.start = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])

    def draw(self, visit, epochs):
        return self.start.clone(), self.start * 1.001


def trajectory_matching(clips, syn_steps, precision="fp32", replay="auto", build=lambda: networks.ConvNet3D(8, 8, 64)):
    net = build()
    return TrajectoryMatching(TwoSnapshots(net), FlatNetwork(net), clips, syn_steps=syn_steps, expert_epochs=1, max_start_epoch=1,
                              step_size=0.01, learn_step_size=True, precision=precision, replay=replay)


def unrolled_mtt(matching, synset):
    """The graph of all steps, as MTT is usually written."""
    start, target = matching.experts.draw(0, (0, 1))
    theta = start.clone().requires_grad_()
    for index, _ in matching.plan(len(synset)):
        videos, labels = synset(index)
        gradient, = torch.autograd.grad(F.cross_entropy(matching.student(theta, videos), labels), theta, create_graph=True)
        theta = theta - matching.step_size * gradient
    ((theta - target).square().sum() / (start - target).square().sum()).backward()


def plain_epoch(clips, labels, batch_size=16):
    """An expert's epoch from float32 clips in memory."""
    net = contiguous(networks.ConvNet3D(8, 8, 64))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for index in torch.randperm(len(clips)).split(batch_size):
        optimizer.zero_grad()
        F.cross_entropy(net(clips[index]), labels[index]).backward()
        optimizer.step()


def fast_epoch(clips, precision, batch_size=16):
    net = networks.ConvNet3D(8, 8, 64)
    train_epoch(net, RealSet(clips), torch.optim.SGD(net.parameters(), lr=0.01), batch_size, 64, precision)


def benchmark_loading(clips, test, folders):
    index = torch.arange(32)
    report("loading, a clip", alternate({"plain": lambda: plain_loading(folders["train"][:32]), "pack, uint8": lambda: clips.gather(index),
                                         "pack, normalised": lambda: clips.draw(index)}), unit=32)


def benchmark_dm(clips, test, folders):
    synset = PixelSet(clips.draw(random_numbers(clips, 1)), 8)
    preloaded = clips.draw(torch.arange(len(clips)))
    fp32, bf16 = (DistributionMatching(clips, 24, precision) for precision in ("fp32", "bf16"))
    functions = {"plain": lambda: plain_dm(preloaded, clips.labels, synset.videos, 24), "fp32": lambda: fp32(synset).backward(),
                 "bf16": lambda: bf16(synset).backward()}
    seconds = alternate(functions)
    report("DM iteration, 192 clips and 8 videos", seconds)
    share(functions, seconds)


def share(functions, seconds):
    """What fp32 and bf16 reach of the rate of the middle convolution alone."""
    for precision in ("fp32", "bf16"):
        convolution = measure.references((precision,), CPU, 64, 8, 64)["convolution", precision]
        rate = measure.count(convolution)[0] / alternate({"convolution": convolution})["convolution"] / 1e9
        reached = measure.count(functions[precision])[0] / seconds[precision] / 1e9
        print(f"{precision}: {reached:.0f} GFLOP/s of {rate:.0f} of the middle convolution alone ({reached / rate:.0%})", flush=True)


def benchmark_evaluation(clips, test, folders):
    synset, epochs = PixelSet(clips.draw(random_numbers(clips, 1)), 8).frozen(), 20
    seconds = alternate({"plain": lambda: plain_evaluation(synset.videos, synset.labels, folders["test"], epochs),
                         "fp32": lambda: fast_evaluation(synset, test, epochs, "fp32"),
                         "bf16": lambda: fast_evaluation(synset, test, epochs, "bf16")})
    report(f"evaluation, {epochs} epochs of 8 videos, 288 test clips", seconds)


def benchmark_mtt(clips, test, folders):
    synset = PixelSet(clips.draw(random_numbers(clips, 1)), 8)
    for syn_steps in (5, 10, 20):
        unrolled = trajectory_matching(clips, syn_steps, build=lambda: contiguous(networks.ConvNet3D(8, 8, 64)))
        ours = trajectory_matching(clips, syn_steps)
        modes = [(precision, replay, trajectory_matching(clips, syn_steps, precision, replay))
                 for precision, replay in (("fp32", "all"), ("fp32", "auto"), ("fp32", "none"), ("bf16", "auto"))]
        functions = {"plain": lambda: unrolled_mtt(unrolled, synset), "unrolled, our layout": lambda: unrolled_mtt(ours, synset)}
        functions |= {f"{precision}, replay {replay}": lambda matching=matching: matching(synset).backward() for precision, replay, matching in modes}
        seconds = alternate(functions)
        kept = ours.count_kept(len(synset), sum(ours.student.sizes))
        report(f"MTT step, 8 videos, {syn_steps} inner steps, of which auto keeps {kept}", seconds)
        share({"fp32": functions["fp32, replay auto"], "bf16": functions["bf16, replay auto"]},
              {"fp32": seconds["fp32, replay auto"], "bf16": seconds["bf16, replay auto"]})


def benchmark_memory(clips, test, folders):
    """Each cell in a process of its own: peak memory of one MTT step, and how much of it is above what was there before."""
    for form in ("all", "auto", "none", "unrolled"):
        for syn_steps in (5, 10, 20, 40):
            subprocess.run([sys.executable, __file__, "memory", form, str(syn_steps)], check=True)


def memory(form, syn_steps):
    clips = load_clips("toy", split="train")
    synset, matching = PixelSet(clips.draw(random_numbers(clips, 1)), 8), trajectory_matching(clips, syn_steps, replay="auto" if form == "unrolled" else form)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if form == "unrolled":
        unrolled_mtt(matching, synset)
    else:
        matching(synset).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    name = form if form == "unrolled" else f"replay {form}"
    print(f"MTT step of 8 videos, {name}, {syn_steps} inner steps: peak {peak:.0f} MB, {peak - before:.0f} above the start", flush=True)


def benchmark_experts(clips, test, folders):
    preloaded = clips.draw(torch.arange(len(clips)))
    seconds = alternate({"plain": lambda: plain_epoch(preloaded, clips.labels), "fp32": lambda: fast_epoch(clips, "fp32"),
                         "bf16": lambda: fast_epoch(clips, "bf16")})
    report("an expert's epoch, 192 clips in batches of 16", seconds)


def benchmark_prepare(clips, test, folders, videos=12):
    """From files like UCF101's (mpeg4 in avi, 320×240, 128 frames) to folders of 112×112 JPEGs, on one core by a plain loop, and by prepare."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        paths = [folder / "videos" / "class" / f"{number}.avi" for number in range(videos)]
        for path, frames in zip(paths, folders["test"]):
            write_film(path, [Image.open(f"{frames}/{name}").resize((320, 240), Image.Resampling.BICUBIC) for name in frame_names(frames)] * 8)
        picture, tries = Picture((160, 120), 112), itertools.count()

        def jobs(times=1):
            """One for each video, so many times, into folders of their own."""
            out = folder / str(next(tries))
            return [([path], out / f"{path.stem}_{again}", folder / "partial" / f"{path.stem}_{again}", picture, None)
                    for again in range(times) for path in paths]

        def processes(workers):  # what starting them costs is spread over enough videos
            return sum(reason is None for _, reason in in_processes(make_folder, jobs(16), workers))

        seconds = alternate({"plain": lambda: [plain_extract(path, target) for (path,), target, *_ in jobs()],
                             "in this process": lambda: [make_folder(job) for job in jobs()],
                             **{f"{workers} processes": functools.partial(processes, workers) for workers in (1, 2, 4)}}, repeats=3)
    seconds = {name: value / videos / (16 if name.endswith("processes") else 1) for name, value in seconds.items()}
    report("a video of 128 frames, prepared", seconds)
    print(", ".join(f"{name} {1 / value:.1f} videos/s" for name, value in seconds.items()))


def write_film(path, pictures):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *pictures[0].size, "yuv420p", 400_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def plain_extract(path, folder):
    folder.mkdir(parents=True)
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(video=0), 1):
            frame.to_image().resize((160, 120)).crop((24, 4, 136, 116)).save(folder / f"frame{number:06d}.jpg", quality=95)


SECTIONS = {"prepare": benchmark_prepare, "loading": benchmark_loading, "dm": benchmark_dm, "evaluation": benchmark_evaluation, "mtt": benchmark_mtt,
            "memory": benchmark_memory, "experts": benchmark_experts}


def main(sections):
    torch.manual_seed(0)
    clips, test = load_clips("toy", split="train"), load_clips("toy", split="test")
    videos, _ = read_videos("toy")
    folders = {split: videos.folder[videos.split == split].tolist() for split in ("train", "test")}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        print("the launchers set the allocator's thresholds: set them here too (sh/launch.sh)")
    for section in sorted(sections or SECTIONS, key=lambda name: name != "memory"):  # first: its processes start with this one's peak
        SECTIONS[section](clips, test, folders)


if __name__ == "__main__":
    with random_stream(0):
        if len(sys.argv) == 4:
            memory(sys.argv[2], int(sys.argv[3]))
        else:
            main(sys.argv[1:])
