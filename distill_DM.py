"""Distribution matching: learn videos whose class means in random feature spaces equal those of the real clips.

DM (Zhao & Bilen 2023, arXiv 2110.04181) on pixels, methods.md 5.
Loss = Σ_c ‖ mean_b embed(clip_cb) − mean_n embed(video_cn) ‖².

    bash sh/baseline/DM.sh GPU DATASET LR IPC
"""
import torch
from torch import nn

import networks
from distill_utils import budget, options
from distill_utils.augment import NONE, augment, choices_of, draw_operators
from distill_utils.clips import draw_flips
from distill_utils.compute import (
    KnownGradient,
    apply_network,
    clips_at_once,
    memory_budget,
    parameter_bytes,
    total_memory,
)
from distill_utils.coreset import add_start_options, choose
from distill_utils.identity import start_run
from distill_utils.pool import Pool, pool_path
from distill_utils.processes import rank_share, run_script, sum_over_ranks
from distill_utils.record import evaluate_and_record, finish
from distill_utils.starts import initial_pixels
from distill_utils.temporal import random_segment
from networks.convnet3d import LEAST_FRAMES
from utils import random_stream, seed_everything, stream_seed


class DistributionMatching(nn.Module):
    """`matching(synset)` returns the loss in the feature space of one random ConvNet3D.

    Without a pool, each step uses a fresh network and random real clips. With `pool` = P, each step draws one of P
    networks, whose means over all real clips are computed once (methods.md 13).

    With a `dsa` strategy, a step applies the same augmentation draw to the real clips and the videos of a class. With a
    pool, the draw belongs to the network.

    The real branch holds at most `clips_at_once` clips. The synthetic branch needs more memory for its graph and holds
    half as many, but at least the videos of one class. So only the synthetic videos and their gradient grow with the
    number of classes. Several ranks share the classes; they draw the same clips and videos as a single process.
    """

    def __init__(self, clips, batch_real, precision="fp32", segments=1, width=networks.WIDTH, compile=False, pool=0,
                 dsa=NONE):
        super().__init__()
        self.clips, self.batch_real, self.precision, self.segments = clips, batch_real, precision, segments
        self.width, self.compiled, self.dsa = width, compile, dsa
        self.at_once = clips_at_once(clips.T, clips.size, clips.device, width)
        self.pool, self.kept = None, {}  # number of a network of the pool: what pool_network returns for it
        if pool:
            path = pool_path(clips, precision, segments, width, compile, *choices_of(dsa))
            self.pool = Pool(path, pool, (clips.K, self.embedding_length()), self.pool_means)

    def forward(self, synset):
        classes = rank_share(synset.K)                                            # a range
        if self.pool:
            number = int(torch.randint(len(self.pool), ()))
            net, frames, draw = self.pool_network(number)
            real = self.pool.means(number)[classes.start:classes.stop].to(self.clips.device)
        else:
            net, frames, draw = self.fresh_network()
            real = self.real_means(net, frames, draw, classes, self.clips.class_batch(self.batch_real))  # (classes, F)
        labels = torch.arange(classes.start, classes.stop).repeat_interleave(synset.N)
        ours = slice(classes.start * synset.N, classes.stop * synset.N)
        videos = synset(torch.arange(len(synset)), ours)[0][:, frames]     # (classes·N, T, 3, H, W), in class order
        loss, gradient, step = videos.new_zeros(()), torch.empty_like(videos), max(1, self.at_once // 2 // synset.N)
        for start in range(0, len(classes), step):
            rows = slice(start * synset.N, (start + step) * synset.N)
            piece = videos[rows].detach().requires_grad_()
            means = self.embed(net, augment(piece, draw, labels[rows])).unflatten(0, (-1, synset.N)).mean(1)
            distance = (real[start:start + step] - means).square().sum()   # this piece's part of the sum over c
            gradient[rows], = torch.autograd.grad(distance, piece)
            loss += distance.detach()
        return KnownGradient.apply(sum_over_ranks(loss), [gradient], videos)

    def fresh_network(self):
        """Return a network with random weights, a frame index for clips and videos, and an augmentation draw."""
        net = networks.build("ConvNet3D", self.clips.K, self.clips.T, self.clips.size, self.width, self.compiled)
        frames = random_segment(self.clips.T, self.segments, LEAST_FRAMES // 2)
        return net.to(self.clips.device).requires_grad_(False), frames, draw_operators(self.dsa, self.clips.K)

    def pool_network(self, number):
        """As fresh_network, for a network of the pool: returns the same for each call with the same number.

        Networks are kept, up to a memory limit: drawing their weights takes longer than a small step.
        """
        if number in self.kept:
            return self.kept[number]
        with random_stream(stream_seed("pool", number)):
            made = self.fresh_network()
        most = min(memory_budget(self.clips.device), total_memory(self.clips.device) / 16)
        if (len(self.kept) + 1) * parameter_bytes(made[0]) <= most:
            self.kept[number] = made
        return made

    def pool_means(self, number):
        """Return the class means (K, F) of all clips in network `number` of the pool.

        Each clip is mirrored with probability `clips.mirror`.
        """
        net, frames, draw = self.pool_network(number)
        with random_stream(stream_seed("pool clips", number)):
            return self.real_means(net, frames, draw, range(self.clips.K), torch.arange(len(self.clips)))

    def embedding_length(self):
        """Return F, the length of an embedding."""
        with random_stream(0), torch.inference_mode():
            net, frames, _ = self.fresh_network()
            return self.embed(net, self.clips.draw(torch.arange(1))[:, frames]).shape[1]

    @torch.inference_mode()
    def real_means(self, net, frames, draw, classes, index):
        """Return the mean embedding of the clips `index` for each of `classes`, a range: (classes, F).

        Each clip is mirrored with probability `clips.mirror`.
        """
        labels, flips = self.clips.labels[index], draw_flips(len(index), self.clips.mirror)
        ours = (labels >= classes.start) & (labels < classes.stop)
        index, labels, flips = index[ours], labels[ours], flips[ours]
        sums = 0
        for start in range(0, len(index), self.at_once):
            part = slice(start, start + self.at_once)
            clips = self.clips.draw(index[part], flip=flips[part])[:, frames]
            features = self.embed(net, augment(clips, draw, labels[part]))
            membership = torch.nn.functional.one_hot(labels[part] - classes.start, len(classes)).T
            sums = sums + membership.to(features) @ features
        return sums / torch.bincount(labels - classes.start,
                                     minlength=len(classes))[:, None].to(self.clips.device)

    def embed(self, net, clips):
        return apply_network(net.embed, clips, self.precision)

    def eval_lr(self):
        """Return the evaluation's learning rate if no flag gives one."""
        return options.LR_NET

    def warning(self, result):
        """Return None: this method has no warning about an evaluation."""


def prepare(args):
    """Check the flags, and return the files that the matching reads besides the clips: none."""
    if args.pool and not args.pack:
        raise ValueError("--pool stores its class means beside the packed clips: leave out --no_pack, or --pool")
    options.check_effect(args, parser(), {"batch_real": "--pool 0"} if args.pool else {})
    return []


def make_matching(args, clips):
    pool = args.pool if args.Iteration else 0  # a set that is not learned needs none
    return DistributionMatching(clips.reduced(args.n_real), args.batch_real, args.precision, args.segments, args.width,
                                args.compile, pool, args.dsa)


def make_optimizer(args, synset, groups, momentum):
    return torch.optim.SGD(groups, momentum=momentum)


def add_matching_options(parser):
    group = parser.add_argument_group("distribution matching")
    options.add_batch_real(group, 64)
    group.add_argument("--pool", type=options.count, default=0, metavar="P",
                       help="number of random networks whose class means over all real clips are computed once and "
                       "stored beside the packs; each step draws one of them and computes only the synthetic videos. "
                       "For exploring: if P is much smaller than --Iteration, the videos fit these networks only. 0: a "
                       "fresh network and random clips in each step, as in the paper (%(default)s)")


def main(args):
    # Check all settings before long work starts.
    options.apply_byte_budget(args, budget.pixels, "n_syn", "interpolation", "storage")
    options.check(args, 1 if args.init == "noise" else args.ipc, convnet3d=True)
    prepare(args)
    run = start_run(args, f"DM_ipc{args.ipc}_lr{args.lr_img:g}")
    seed_everything(args.seed)

    # Real clips, and the synthetic videos that are learned from them.
    train, eval_clips, test = options.load_splits(args)
    chosen = None if args.init == "noise" else choose(run, args, train, args.ipc, args.select)
    synset = initial_pixels(train, args.ipc, args.init, args.n_syn, args.interpolation, args.storage, chosen)
    matching = make_matching(args, train)
    optimizer = make_optimizer(args, synset, synset.param_groups(args.lr_img, args.lr_interpolation), momentum=0.5)
    run.resume(synset=synset, optimizer=optimizer)

    for _ in run.iterations(args.Iteration):
        if run.due(args.eval_it, args.Iteration):
            evaluate_and_record(run, synset, eval_clips, **options.evaluation_values(args))
        if run.iteration == args.Iteration:
            break
        run.step(lambda: matching(synset), optimizer)
    finish(run, synset, eval_clips, test, **options.evaluation_values(args))


def parser():
    parser = options.script_parser(__doc__)
    options.add_evaluation_options(parser, eval_it=500)
    options.add_distillation_options(parser, 5000)
    options.add_pixel_options(parser, lr_img=30)
    add_start_options(parser)
    add_matching_options(parser)
    return parser


if __name__ == "__main__":
    run_script(main, parser())
