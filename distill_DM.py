"""Distribution matching: videos whose class means in random feature spaces are those of the real clips.

DM (Zhao & Bilen 2023, arXiv 2110.04181) on pixels, METHOD 5. Loss = Σ_c ‖ mean_b embed(clip_cb) − mean_n embed(video_cn) ‖².

    bash sh/baseline/DM.sh GPU DATASET LR IPC
"""
import torch
from torch import nn

import networks
from distill_utils.compute import KnownGradient, autocast, clips_at_once
from distill_utils.evaluate import evaluate
from distill_utils import options
from distill_utils.record import finish, record
from distill_utils.synset import initial_pixels
from distill_utils.temporal import random_segment
from networks.convnet3d import LEAST_FRAMES
from utils import run_script, seed_everything


class DistributionMatching(nn.Module):
    """`matching(synset)` is the loss in the feature space of a fresh ConvNet3D.

    Neither branch ever holds more than `clips_at_once` clips, so that memory does not grow with the number of classes.
    """

    def __init__(self, clips, batch_real, precision="fp32", segments=1):
        super().__init__()
        self.clips, self.batch_real, self.precision, self.segments = clips, batch_real, precision, segments
        self.at_once = clips_at_once(clips.T, clips.size, clips.device)

    def forward(self, synset):
        net = networks.build("ConvNet3D", self.clips.K, self.clips.T, self.clips.size).to(self.clips.device).requires_grad_(False)
        frames = random_segment(self.clips.T, self.segments, LEAST_FRAMES // 2)   # of a step, clips and videos alike
        real = self.real_means(net, frames)                                # (K, F)
        videos = synset(torch.arange(len(synset)))[0][:, frames]           # (K·N, T, 3, H, W), in class order
        loss, gradient = 0, torch.empty_like(videos)
        for classes in torch.arange(synset.K).split(max(1, self.at_once // synset.N)):
            rows = slice(int(classes[0]) * synset.N, int(classes[-1] + 1) * synset.N)
            piece = videos[rows].detach().requires_grad_()
            means = self.embed(net, piece).unflatten(0, (-1, synset.N)).mean(1)
            distance = (real[classes] - means).square().sum()              # this piece's terms of the sum over c
            gradient[rows], = torch.autograd.grad(distance, piece)
            loss = loss + distance.detach()
        return KnownGradient.apply(loss, [gradient], videos)

    @torch.inference_mode()
    def real_means(self, net, frames=slice(None)):
        """Mean embedding of `batch_real` random clips of each class, (K, F) float32."""
        index = self.clips.class_batch(self.batch_real)
        labels = self.clips.labels[index]
        sums = 0
        for part, part_labels in zip(index.split(self.at_once), labels.split(self.at_once)):
            membership = torch.nn.functional.one_hot(part_labels, self.clips.K).T.float().to(self.clips.device)
            sums = sums + membership @ self.embed(net, self.clips.draw(part, flip=True)[:, frames])
        return (sums / torch.bincount(labels, minlength=self.clips.K)[:, None].to(self.clips.device))

    def embed(self, net, clips):
        with autocast(clips.device, self.precision):
            return net.embed(clips).float()

    def eval_lr(self):
        """The learning rate that networks are trained with on the set, where no flag gives one."""
        return 0.01


def prepare(args):
    """Files besides the clips that the matching reads; none."""
    return []


def make_matching(args, clips):
    return DistributionMatching(clips.reduced(args.n_real), args.batch_real, args.precision, args.segments)


def add_matching_options(parser):
    options.add_batch_real(parser.add_argument_group("distribution matching"), 64)


def main(args):
    # Everything that can be refused is, before long work starts.
    options.check(args, args.ipc)
    run = options.start_run(args, f"DM_ipc{args.ipc}_lr{args.lr_img:g}")
    seed_everything(args.seed)

    # Real clips, and the videos that are to stand for them.
    train, test = options.load_data(args, "train"), options.load_data(args, "test")
    synset = initial_pixels(train, args.ipc, args.init, args.n_syn, args.interpolation)
    matching = make_matching(args, train)
    optimizer = torch.optim.SGD(synset.param_groups(args.lr_img, args.lr_interpolation), momentum=0.5)
    run.resume(synset=synset, optimizer=optimizer)

    for _ in run.iterations(args.Iteration):
        if run.due(args.eval_it, args.Iteration):
            record(run, synset, test, evaluate(synset, test, **options.evaluation_values(args)))
        if run.iteration == args.Iteration:
            break
        run.step(lambda: matching(synset), optimizer)
    finish(run, test)


def parser():
    parser = options.script_parser(__doc__)
    options.add_evaluation_options(parser, eval_it=500)
    options.add_distillation_options(parser, 5000)
    options.add_pixel_options(parser, lr_img=30)
    add_matching_options(parser)
    return parser


if __name__ == "__main__":
    run_script(main, parser())
