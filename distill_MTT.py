"""Trajectory matching: learn videos that train a student along the trajectories of experts trained on the real clips.

MTT (Cazenavette et al. 2022, arXiv 2203.11932) on pixels, methods.md 5. A student starts at an expert's epoch t and
takes n = syn_steps steps θ_{i+1} = θ_i − α ∇CE(θ_i; videos).
Loss = ‖θ_n − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖², M = expert_epochs, equation 2.

    bash sh/baseline/buffer.sh GPU DATASET; bash sh/baseline/MTT.sh GPU DATASET LR IPC
"""
import argparse
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

import networks
from distill_utils import budget, options
from distill_utils.augment import NONE, augment_each
from distill_utils.compute import DiskStack, KnownGradient, apply_network, clips_at_once, count_kept_steps
from distill_utils.coreset import add_start_options, choose
from distill_utils.experts import check_experts, find_experts, mean_expert_top1, open_experts
from distill_utils.identity import start_run
from distill_utils.last_good import LastGood
from distill_utils.processes import rank_share, run_script, sum_over_ranks, world_size
from distill_utils.record import evaluate_and_record, finish
from distill_utils.starts import initial_pixels
from distill_utils.temporal import random_segment
from distill_utils.trajectories import buffer_files
from networks import FlatNetwork
from networks.convnet3d import LEAST_FRAMES
from utils import random_stream, seed_everything

LEAST_STEP_SIZE = 0.001  # lower limit of α
REPLAYS = ("auto", "all", "none")  # which inner steps the backward pass computes again


class TrajectoryMatching(nn.Module):
    """`matching(synset)` returns the loss of one expert and one start epoch; its parameter is the step size α.

    The gradient is that of the unrolled steps. The backward pass needs the graph of each step. The graphs of the last
    steps are kept, as many as fit in the memory budget. Of the earlier steps only the vectors θ are kept (on a CPU: on
    disk), and the backward pass computes these steps again. So memory stays within the budget for any n. Each step
    draws from its own random stream, so both computations are the same. `replay`: "all" computes every step twice,
    "none" keeps every graph; loss and gradient do not depend on it, except for rounding.

    With a `dsa` strategy, each video of a step is augmented by itself, as the real clips were for the experts.

    Loss and gradient are means over `trajectories`, each with its own expert and start epoch. Several ranks share them.
    """

    def __init__(self, experts, student, clips, *, syn_steps, expert_epochs, max_start_epoch, step_size,
                 learn_step_size, batch_syn=None, precision="fp32", segments=1, trajectories=1, width=networks.WIDTH,
                 replay="auto", min_start_epoch=0, expand=0, current_max_start_epoch=None, experts_top1=None, dsa=NONE):
        super().__init__()
        self.experts, self.student, self.device, self.precision = experts, student, clips.device, precision
        self.syn_steps, self.expert_epochs, self.batch_syn = syn_steps, expert_epochs, batch_syn
        self.start_epochs = min_start_epoch, max_start_epoch               # the first, and one past the last
        self.expand, self.current_max_start_epoch = expand, current_max_start_epoch or min_start_epoch + 1
        self.experts_top1 = experts_top1
        self.segments, self.trajectories, self.replay, self.dsa = segments, trajectories, replay, dsa
        self.clip = clips.T, clips.size, width
        # Half as many as in a forward pass: a graph of gradients takes twice the memory.
        self.at_once = max(1, clips_at_once(clips.T, clips.size, clips.device, width) // 2)
        self.replayed = DiskStack() if self.device.type == "cpu" else []
        self.step_size = nn.Parameter(torch.tensor(float(step_size)), requires_grad=learn_step_size)
        self.register_buffer("visits", torch.tensor(0))

    def eval_lr(self):
        """Return α, the evaluation's learning rate if no flag gives one."""
        return max(self.step_size.item(), LEAST_STEP_SIZE)

    def warning(self, result):
        """Return a warning if the networks of an evaluation `result` are as accurate as the experts; else None."""
        if self.experts_top1 is None or result["top1"] < self.experts_top1:
            return None
        return (f"warning: networks trained on the set reach {result['top1']:.1f} % top1, the experts "
                f"{self.experts_top1:.1f} % at the last matched epoch, so the set cannot learn more from them: "
                "train the experts longer, and raise --max_start_epoch and --min_start_epoch")

    def start_range(self):
        """Return the range of a student's start epoch: the first, and one past the last.

        With `expand` = E, the end moves on by one epoch every E steps (DATM, methods.md 16).
        """
        first, end = self.start_epochs
        steps = int(self.visits) // self.trajectories
        return first, (min(end, self.current_max_start_epoch + steps // self.expand)
                       if self.expand else end)

    def forward(self, synset):
        with torch.no_grad():
            self.step_size.clamp_(min=LEAST_STEP_SIZE)
        plans = [(int(torch.randint(*self.start_range(), ())), self.plan(len(synset)))
                 for _ in range(self.trajectories)]
        learned = [parameter for parameter in synset.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(parameter) for parameter in (*learned, self.step_size)]
        loss = torch.zeros_like(self.step_size)
        for number in rank_share(self.trajectories):
            loss += self.match(synset, learned, gradients, int(self.visits) + number, *plans[number])
        self.visits += self.trajectories
        gradients = [gradient.div_(self.trajectories) for gradient in gradients]
        return KnownGradient.apply(sum_over_ranks(loss) / self.trajectories, gradients, *learned, self.step_size)

    def match(self, synset, learned, gradients, visit, epoch, steps):
        """Return the loss () of one trajectory, and add its gradients to `gradients`.

        The gradients are with respect to each tensor of `learned`, and last with respect to α.
        """
        start, target = (vector.to(self.device)
                         for vector in self.experts.draw(visit, (epoch, epoch + self.expert_epochs)))
        theta, alpha, graphs = start, self.step_size.item(), []
        replayed = len(steps) - self.count_kept(len(synset), len(theta))
        self.replayed.clear()                                              # will hold θ (P,) of the replayed steps
        for number, (index, seed) in enumerate(steps):
            if number < replayed:
                self.replayed.append(theta)
            gradient = self.step_gradient(theta, synset, index, seed,
                                          graphs if number >= replayed else None)
            theta = theta.sub(gradient, alpha=alpha)
        scale = (start - target).square().sum()
        remaining = theta.sub_(target)
        loss = remaining.square().sum() / scale
        if not loss.isfinite():
            return loss                                                    # no backward pass without a finite loss

        # Let v be the gradient of the loss with respect to θ_{i+1}, and g = ∇CE(θ_i; videos). Then the gradient with
        # respect to α is −v·g, and with respect to anything that g depends on it is −α ∂(v·g).
        *by_set, by_alpha = gradients
        v = remaining.mul_(2 / scale)
        for number, (index, seed) in reversed(list(enumerate(steps))):
            with random_stream(seed):
                step = graphs.pop() if graphs else self.compute_step(self.replayed.pop(), synset, index,
                                                                     create_graph=True)
                product, by_theta, by_learned = self.pull_back(v, *step, learned, onwards=number > 0)
            by_alpha -= product
            for gradient, piece in zip(by_set, by_learned):
                gradient.sub_(piece, alpha=alpha)
            v.sub_(by_theta, alpha=alpha)
        return loss

    def plan(self, videos):
        """Return for each step its video numbers (shuffled batches of all videos) and its random seed."""
        batches = []
        while len(batches) < self.syn_steps:
            batches += torch.randperm(videos).split(self.batch_syn or videos)
        return list(zip(batches, torch.randint(2 ** 62, (self.syn_steps,)).tolist()))

    def count_kept(self, videos, parameters):
        """Return how many of the last steps keep their graphs, for a set of this many videos."""
        if self.replay != "auto":
            return {"all": 0, "none": self.syn_steps}[self.replay]
        batch = min(self.batch_syn or videos, videos)
        return min(self.syn_steps, count_kept_steps(batch, self.at_once, *self.clip, parameters, self.device,
                                                    self.dsa != NONE))

    def step_gradient(self, theta, synset, index, seed, graphs=None):
        """Return g = ∇CE(θ; videos), (P,); if `graphs` is a list, append the step with its graph to it."""
        with random_stream(seed):
            *leaves, pieces = self.compute_step(theta, synset, index, create_graph=graphs is not None)
            gradient = sum(pieces)
        if graphs is not None:
            graphs.append((*leaves, [gradient]))
        return gradient.detach()

    def compute_step(self, theta, synset, index, create_graph):
        """Return the videos; a leaf copy of them; θ as a leaf; and the pieces of g = ∇CE(θ; videos), (P,).

        The pieces add up to g. They are a generator, which computes each piece on request. Consume it within the step's
        random stream, because the network's dropout draws from it.
        """
        theta = theta.detach().requires_grad_()
        with torch.set_grad_enabled(create_graph):
            videos, labels = self.draw(synset, index)
        leaf = videos.detach().requires_grad_()  # in both passes: it decides how the network computes (convnet3d.py)
        pieces = (torch.autograd.grad(loss, theta, create_graph=create_graph)[0]
                  for loss in self.losses(theta, leaf, labels))
        return videos, leaf, theta, pieces

    def pull_back(self, v, videos, leaf, theta, pieces, learned, onwards):
        """Return v·g, its gradient with respect to θ, and those with respect to the tensors `learned`.

        The step's tensors are the result of compute_step. With `onwards` False the gradient with respect to θ is zero.
        """
        product, by_theta, by_videos = 0, torch.zeros_like(theta), torch.zeros_like(leaf)
        wanted = (leaf, theta) if onwards else (leaf,)                     # θ_0 needs no gradient
        for gradient in pieces:
            for total, piece in zip((by_videos, by_theta), torch.autograd.grad(gradient, wanted, v)):
                total += piece
            product = product + v @ gradient.detach()
        return product, by_theta, torch.autograd.grad(videos, learned, by_videos, materialize_grads=True)

    def draw(self, synset, index):
        """Return the augmented videos of a step, or a random segment of them, and their labels."""
        videos, labels = synset(index)
        return augment_each(videos[:, random_segment(videos.shape[1], self.segments, LEAST_FRAMES)], self.dsa), labels

    def losses(self, theta, videos, labels):
        """Yield the mean cross-entropy of the batch in pieces that add up to it, each of at most `at_once` videos."""
        for part, target in zip(videos.split(self.at_once), labels.split(self.at_once)):
            logits = apply_network(lambda videos: self.student(theta, videos), part, self.precision)
            yield F.cross_entropy(logits, target, reduction="sum") / len(videos)


def prepare(args):
    """Check the flags, and return the files that the matching reads besides the clips: the experts' files.

    Sets --buffer_path to the folder that is found, if it was not given.
    """
    check_epochs(args)
    options.check_effect(args, parser(), {} if args.train_lr else {"lr_lr": "--train_lr"})
    if not args.buffer_path:
        args.buffer_path = find_experts(args)
    if (args.buffer_path / "config.json").exists():
        check_experts(args)
    open_experts(args, networks.build("ConvNet3D", len(options.list_videos(args)[1]), *options.clip_shape(args),
                                      args.width))  # refuses experts that do not fit
    return buffer_files(args.buffer_path)


def check_epochs(args):
    """ValueError if --lr_teacher or the start epochs are impossible."""
    if args.lr_teacher < LEAST_STEP_SIZE:
        raise ValueError(f"--lr_teacher {args.lr_teacher:g} must be at least {LEAST_STEP_SIZE}, the lower limit of the "
                         "step size")
    if args.min_start_epoch >= args.max_start_epoch:
        raise ValueError(f"--min_start_epoch {args.min_start_epoch} must be below --max_start_epoch "
                         f"{args.max_start_epoch}")
    if args.current_max_start_epoch and not args.min_start_epoch < args.current_max_start_epoch <= args.max_start_epoch:
        raise ValueError(f"--current_max_start_epoch {args.current_max_start_epoch} must be above --min_start_epoch "
                         f"{args.min_start_epoch} and at most --max_start_epoch {args.max_start_epoch}")
    if args.current_max_start_epoch and not args.expand:
        raise ValueError("--current_max_start_epoch is the start value of --expand: give --expand too")


def make_matching(args, clips):
    net = networks.build("ConvNet3D", clips.K, clips.T, clips.size, args.width).to(clips.device)
    if args.trajectories_per_step < world_size():
        print(f"{args.trajectories_per_step} of {world_size()} processes do the matching, because a step has no more "
              "trajectories; all take part in evaluation "
              f"(--trajectories_per_step {world_size()} uses all, but changes the algorithm)")
    return TrajectoryMatching(open_experts(args, net), FlatNetwork(net), clips, syn_steps=args.syn_steps,
                              expert_epochs=args.expert_epochs, max_start_epoch=args.max_start_epoch,
                              step_size=args.lr_teacher, learn_step_size=args.train_lr, batch_syn=args.batch_syn,
                              precision=args.precision, segments=args.segments,
                              trajectories=args.trajectories_per_step, width=args.width, replay=args.replay,
                              min_start_epoch=args.min_start_epoch, expand=args.expand,
                              current_max_start_epoch=args.current_max_start_epoch,
                              experts_top1=mean_expert_top1(args, args.max_start_epoch + args.expert_epochs - 1),
                              dsa=args.dsa).to(clips.device)


def make_optimizer(args, synset, groups, momentum):
    return torch.optim.SGD(groups, momentum=momentum)


def add_matching_options(parser):
    group = parser.add_argument_group("trajectory matching")
    group.add_argument("--buffer_path", type=pathlib.Path,
                       help="folder of replay_buffer_<n>.pt (the one from sh/baseline/buffer.sh for the same data)")
    group.add_argument("--syn_steps", type=options.positive, default=10,
                       help="number of student steps, n (%(default)s)")
    group.add_argument("--expert_epochs", type=options.positive, default=1,
                       help="number of expert epochs that the student's steps must match, M (%(default)s)")
    group.add_argument("--min_start_epoch", type=options.count, default=0,
                       help="the student starts at this epoch of the expert or later; later epochs teach harder "
                       "features (%(default)s)")
    group.add_argument("--max_start_epoch", type=options.positive, default=10,
                       help="the student starts at an epoch below this (%(default)s)")
    group.add_argument("--expand", type=options.count, default=0, metavar="E",
                       help="increase the upper bound of the start epoch by one every E steps, from "
                       "--current_max_start_epoch up to --max_start_epoch: easy epochs first (%(default)s: the full "
                       "range from the first step)")
    group.add_argument("--current_max_start_epoch", type=options.positive,
                       help="upper bound of the start epoch at the first step, with --expand (min_start_epoch + 1)")
    group.add_argument("--trajectories_per_step", type=options.positive, default=1,
                       help="trajectories per step; loss and gradient are their means; several GPUs share them "
                       "(%(default)s, as in the paper)")
    group.add_argument("--replay", default="auto", choices=REPLAYS,
                       help="which inner steps the backward pass computes again, to save memory. auto: keep the graphs "
                       "of as many of the last steps as fit in the memory budget (a quarter of the RAM, or half of the "
                       "GPU's memory), and replay the others. all: replay every step, least memory. none: keep all "
                       "graphs, most memory, the plain unrolled graph. They differ only by rounding (%(default)s)")
    group.add_argument("--batch_syn", type=options.positive, help="videos per student step (all)")
    group.add_argument("--lr_teacher", type=options.rate, default=0.01,
                       help="initial step size of the student, α (%(default)s)")
    group.add_argument("--train_lr", action=argparse.BooleanOptionalAction, default=True,
                       help="learn the step size (%(default)s)")
    group.add_argument("--lr_lr", type=options.rate, default=1e-5,
                       help="learning rate of the step size (%(default)s)")


def main(args):
    options.apply_byte_budget(args, budget.pixels, "n_syn", "interpolation", "storage")
    options.check(args, 1 if args.init == "noise" else args.ipc, convnet3d=True)
    files = prepare(args)
    run = start_run(args, f"MTT_ipc{args.ipc}_lr{args.lr_img:g}", *files)
    seed_everything(args.seed)

    # Real clips, and the synthetic videos that are learned from them.
    train, eval_clips, test = options.load_splits(args)
    chosen = None if args.init == "noise" else choose(run, args, train, args.ipc, args.select)
    synset = initial_pixels(train, args.ipc, args.init, args.n_syn, args.interpolation, args.storage, chosen)
    matching = make_matching(args, train)
    del train  # the experts stand for the clips, which may take gigabytes
    groups = [*synset.param_groups(args.lr_img, args.lr_interpolation),
              {"params": list(matching.parameters()), "lr": args.lr_lr}]
    optimizer = make_optimizer(args, synset, groups, momentum=0.5)
    last_good = LastGood(optimizer)
    run.resume(synset=synset, matching=matching, optimizer=optimizer, last_good=last_good)

    for _ in run.iterations(args.Iteration):
        if run.due(args.eval_it, args.Iteration):
            evaluate_and_record(run, synset, eval_clips, matching,
                                **options.evaluation_values(args, matching.eval_lr()))
        if run.iteration == args.Iteration:
            break
        run.step(lambda: matching(synset), optimizer, last_good)
    finish(run, synset, eval_clips, test, **options.evaluation_values(args, matching.eval_lr()))


def parser():
    parser = options.script_parser(__doc__)
    options.add_evaluation_options(parser, eval_it=500, lr_net=None)
    options.add_distillation_options(parser, 8000)
    options.add_pixel_options(parser, lr_img=1e5)
    add_start_options(parser)
    add_matching_options(parser)
    return parser


if __name__ == "__main__":
    run_script(main, parser())
