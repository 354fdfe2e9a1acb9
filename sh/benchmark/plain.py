"""The operations of the benchmark as they are usually written, to compare with: `bash sh/benchmark.sh GPU --plain`.

Plain means: float32 tensors that are loaded before, one class at a time, the whole batch in one graph, the unrolled
graph of all the student's steps, PyTorch's default memory layout; JPEGs read by PIL, and videos by a loop over PyAV's
frames. Each function takes the Workload and returns the call that is measured, the counterpart of its method.
"""
import tempfile

import av
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

import distill_FRePo
import networks
from distill_utils.clips import MEAN, STD
from distill_utils.frames import frame_names
from networks import FlatNetwork


def preparing(workload):
    film, size = workload.film(), workload.args.size
    enlarged = workload.enlarged()
    left = (enlarged[0] - size) // 2

    def prepare():
        folder = tempfile.mkdtemp(prefix="plain", dir=workload.folder)
        with av.open(str(film)) as container:
            for number, frame in enumerate(container.decode(video=0), 1):
                picture = frame.to_image().resize(enlarged).crop((left, 0, left + size, size))
                picture.save(f"{folder}/frame{number:06}.jpg", quality=95)
    return prepare


def loading(workload):
    folders, mean, std = workload.folders(workload.batch), MEAN.flatten().tolist(), STD.flatten().tolist()
    return lambda: torch.stack([torch.stack([
        normalize(to_tensor(Image.open(folder / name)), mean, std) for name in frame_names(folder)])
        for folder in folders]).to(workload.device)


def dm(workload):
    videos, of_classes = workload.synset().videos, real_clips(workload)
    n = workload.args.ipc

    def step():
        net, loss = network(workload).requires_grad_(False), 0
        for label, real in enumerate(of_classes):
            of_set = net.embed(videos[label * n:(label + 1) * n])
            loss = loss + (net.embed(real).mean(0) - of_set.mean(0)).square().sum()
        loss.backward()
    return step


def mtt(workload):
    synset, matching = workload.synset(), workload.trajectories("fp32")
    student = FlatNetwork(network(workload))
    start, target = (vector.to(workload.device) for vector in matching.experts.draw(0, (0, 1)))

    def step():
        theta = start.clone().requires_grad_()
        for _ in range(matching.syn_steps):
            videos, labels = synset(torch.arange(len(synset)))
            loss = F.cross_entropy(student(theta, videos), labels)
            gradient, = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - matching.step_size * gradient
        ((theta - target).square().sum() / (start - target).square().sum()).backward()
    return step


def frepo(workload):
    synset, net = workload.synset(), network(workload)
    real, labels = torch.cat(real_clips(workload)), synset.scores().to(workload.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    classes = torch.arange(workload.train.K).repeat_interleave(len(real) // workload.train.K)
    targets = (F.one_hot(classes, workload.train.K) - 1 / workload.train.K).to(real)

    def step():
        net.requires_grad_(False)
        of_real, of_set = net.embed(real), net.embed(synset.videos)
        errors = distill_FRePo.predict(of_set, of_real, labels) - targets
        errors.square().sum(1).mean().backward()
        net.requires_grad_(True)
        optimizer.zero_grad()
        F.mse_loss(net(synset.videos.detach()), labels).backward()
        optimizer.step()
    return step


def evaluation(workload):
    videos, labels = workload.synset().videos.detach(), workload.synset().labels.to(workload.device)
    test = workload.test.draw(torch.arange(len(workload.test)))

    def evaluate():
        net = network(workload)
        train(net, videos, labels, workload.args.epoch_eval_train, 256, momentum=0.9, weight_decay=5e-4)
        net.eval()
        with torch.no_grad():
            for part in test.split(workload.at_once):
                net(part)
    return evaluate


def experts(workload):
    clips, labels = workload.train.draw(torch.arange(len(workload.train))), workload.train.labels.to(workload.device)
    return lambda: train(network(workload), clips, labels, 1, workload.args.batch_train)


def network(workload):
    """Return ConvNet3D in PyTorch's default memory layout."""
    net = networks.ConvNet3D(workload.train.K, workload.train.T, workload.train.size).to(workload.device)
    net.features = lambda clips: net.blocks(networks.standardize(clips).transpose(1, 2))
    return net


def real_clips(workload):
    """Return one batch of real clips of each class."""
    index = workload.train.class_batch(workload.args.batch_real)
    return workload.train.draw(index).chunk(workload.train.K)


def train(net, clips, labels, epochs, batch_size, **settings):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.005, **settings)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(clips, labels), batch_size, shuffle=True)
    for _ in range(epochs):
        for batch, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(batch), target).backward()
            optimizer.step()
