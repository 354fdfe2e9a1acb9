"""Neural feature regression: learn videos whose features let kernel ridge regression predict the labels of real clips.

FRePo (Zhou et al. 2022, arXiv 2206.00719) on pixels, methods.md 14. The features come from a pool of networks of
different ages. With φ = embed, s the set, and t a batch of real clips:
p = K_ts (K_ss + λI)⁻¹ y_s, K_ss = φ(s)φ(s)ᵀ, K_ts = φ(t)φ(s)ᵀ, λ = 1e-6 · tr(K_ss) / |s|;
loss = mean over t of ‖p − y_t‖² − mean over s of min(y₍₁₎ − y₍₂₎, 1/K).
y_t is one-hot minus 1/K; y_s starts from the same divided by √(K/10). The two scales differ on purpose.

    bash sh/baseline/FRePo.sh GPU DATASET LR IPC
"""
import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

import networks
from distill_utils import budget, options
from distill_utils.augment import NONE, augment_each
from distill_utils.clips import draw_flips
from distill_utils.compute import KnownGradient, apply_network, clips_at_once
from distill_utils.coreset import add_start_options, choose
from distill_utils.identity import start_run
from distill_utils.processes import progress, rank_share, run_script, sum_gradients, sum_over_ranks
from distill_utils.record import evaluate_and_record, finish
from distill_utils.starts import initial_pixels
from utils import finite, seed_everything

RIDGE = 1e-6  # λ divided by the mean diagonal entry of K_ss


def predict(of_set, of_real, labels):
    """Return predictions (B, K) of kernel ridge regression.

    of_real: features (B, F) of the real clips. of_set: features (n, F) of the set. labels: of the set, (n, K). The
    predictions are nan if the network gives no features, all zero.
    """
    K_ss, K_ts = of_set @ of_set.T, of_real @ of_set.T
    ridge = RIDGE * K_ss.diagonal().mean() * torch.eye(len(K_ss), dtype=K_ss.dtype, device=K_ss.device)
    solution, singular = torch.linalg.solve_ex(K_ss + ridge, labels)
    return K_ts @ (solution * torch.nan if singular else solution)


def margin(labels):
    """Return the mean over labels (n, K) of min(largest − second largest entry, 1/K).

    The loss rewards it, so that learned labels keep a clear maximum.
    """
    first, second = labels.topk(2, 1).values.unbind(1)
    return (first - second).clamp(max=1 / labels.shape[1]).mean()


class Learner:
    """A network of the pool, its optimizer, and its age, the number of steps taken.

    missing: steps to take before the network is first used.
    """

    def __init__(self, net, lr, missing=0):
        self.net, self.optimizer = net, torch.optim.Adam(net.parameters(), lr=lr)
        self.age, self.missing = 0, missing

    def state(self):
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "age": self.age,
                "missing": self.missing}

    def set_state(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.age, self.missing = state["age"], state["missing"]


class FeatureRegression(nn.Module):
    """`matching(synset)` returns the loss in the features of one randomly drawn network of the pool.

    After the set's update, that network takes one step on the set. A network takes `steps` Adam steps on the set and is
    then replaced by a fresh one. The ages of the first pool are spread over these steps: each network takes its missing
    steps when it is first drawn.

    The features of real clips and of the set are computed in pieces without a graph, the regression in float64 on the
    CPU, and then the backward pass piece by piece. So memory does not grow with the batch. Several ranks share the real
    clips, and the videos of the backward pass. With a `dsa` strategy, each video is augmented by itself whenever a
    network sees it.
    """

    def __init__(self, clips, batch_target, precision="fp32", width=networks.WIDTH, pool=10, steps=100, lr_pool=1e-4,
                 dsa=NONE):
        super().__init__()
        self.dsa = dsa
        self.clips, self.batch_target, self.precision, self.width = clips, batch_target, precision, width
        self.steps, self.lr_pool = steps, lr_pool
        self.at_once = clips_at_once(clips.T, clips.size, clips.device, width)
        self.pool = [self.new_learner(missing=number * steps // pool) for number in range(pool)]
        self.behind = None             # number of the network that has not yet taken its step on the updated set

    def forward(self, synset):
        if self.behind is not None:
            self.train_step(self.behind, synset)
        number = int(torch.randint(len(self.pool), ()))
        self.take_missing_steps(number, synset)
        net, n = self.pool[number].net, len(synset)

        # Features without a graph, and the gradient of the regression with respect to the set's features.
        videos = self.show(synset)
        labels = synset.scores()                                           # (n, K)
        of_set = to_float64(self.features(net, videos.detach().split(self.at_once))).requires_grad_()
        index = torch.randperm(len(self.clips))[:self.batch_target]
        flips, ours = draw_flips(len(index), self.clips.mirror), rank_share(len(index))
        ours = slice(ours.start, ours.stop)
        of_real = to_float64(self.features(net, self.draw(index[ours], flips[ours])))
        known = to_float64(labels).detach().requires_grad_()
        errors = predict(of_set, of_real, known) - (
            F.one_hot(self.clips.labels[index[ours]], self.clips.K) - 1 / self.clips.K)
        loss = errors.square().sum() / len(index)                          # this rank's share
        if labels.requires_grad:                                           # the margin of fixed labels is constant
            loss = loss - margin(known) * len(errors) / len(index)
        by_features, by_labels = torch.autograd.grad(loss, (of_set, known))
        by_features = sum_over_ranks(by_features.to(videos))

        # Backward pass to the videos, shared by the ranks.
        gradient = torch.zeros_like(videos)
        for part in self.parts(rank_share(n)):
            piece = videos[part].detach().requires_grad_()
            gradient[part], = torch.autograd.grad(
                apply_network(net.embed, piece, self.precision), piece, by_features[part])
        self.behind = number
        total = sum_over_ranks(loss.detach().to(videos))
        return KnownGradient.apply(total, [gradient, by_labels.to(labels)], videos, labels)

    def take_missing_steps(self, number, synset):
        learner = self.pool[number]
        if not learner.missing:
            return
        for _ in progress(range(learner.missing), desc="missing steps of a network", unit="step", leave=False):
            self.train_step(number, synset)
        learner.missing = 0

    def train_step(self, number, synset):
        """Train a network of the pool for one step on the current set; after its last step, replace it by a fresh one.

        The loss is the mean squared error on the set's labels, without dropout.
        """
        learner, self.behind = self.pool[number], None
        videos, labels = self.show(synset).detach(), synset.scores().detach().to(self.clips.device)
        learner.optimizer.zero_grad()
        for part in self.parts(rank_share(len(synset))):
            logits = apply_network(learner.net, videos[part], self.precision)
            (F.mse_loss(logits, labels[part], reduction="sum") / labels.numel()).backward()
        sum_gradients(learner.optimizer)
        # Otherwise the set is bad: its own step will be rolled back, or the run ends.
        if finite(parameter.grad for parameter in learner.net.parameters()):
            learner.optimizer.step()
        learner.age += 1
        if learner.age >= self.steps:
            self.pool[number] = self.new_learner()

    def parts(self, rows):
        """Return the range `rows` in parts of half of `at_once`, because a graph takes twice the memory."""
        return torch.arange(rows.start, rows.stop).split(max(1, self.at_once // 2))

    def new_learner(self, missing=0):
        net = networks.build("ConvNet3D", self.clips.K, self.clips.T, self.clips.size, self.width)
        return Learner(net.to(self.clips.device).eval(), self.lr_pool, missing)

    def show(self, synset):
        """Return all videos of the set, augmented, (n, T, 3, H, W)."""
        return augment_each(synset(torch.arange(len(synset)))[0], self.dsa)

    def draw(self, index, flips):
        """Yield the real clips in pieces."""
        for part, flip in zip(index.split(self.at_once), flips.split(self.at_once)):
            yield self.clips.draw(part, flip=flip)

    @torch.no_grad()
    def features(self, net, pieces):
        """Return the embeddings of all clips in `pieces`, (B, F)."""
        return torch.cat([apply_network(net.embed, piece, self.precision) for piece in pieces])

    def eval_lr(self):
        """Return the evaluation's learning rate if no flag gives one."""
        return options.LR_NET

    def warning(self, result):
        """Return None: this method has no warning about an evaluation."""

    def get_extra_state(self):
        return {"pool": [learner.state() for learner in self.pool], "behind": self.behind}

    def set_extra_state(self, state):
        for learner, each in zip(self.pool, state["pool"]):
            learner.set_state(each)
        self.behind = state["behind"]


def to_float64(tensor):
    """Return the tensor as float64 on the CPU.

    The regression is small and ill-conditioned, and this makes its result the same on every machine.
    """
    return tensor.cpu().double()  # in this order: Apple GPUs have no float64


class CosineAdam(torch.optim.Adam):
    """Adam with learning rates that decay to a tenth along half a cosine over `iterations` steps."""

    def __init__(self, groups, iterations):
        super().__init__(groups)
        self.iterations = max(1, iterations)
        for group in self.param_groups:
            group |= {"full_lr": group["lr"], "taken": 0}

    def step(self, closure=None):
        for group in self.param_groups:
            share = min(1.0, group["taken"] / self.iterations)
            group |= {"lr": group["full_lr"] * (0.55 + 0.45 * math.cos(math.pi * share)),
                      "taken": group["taken"] + 1}
        return super().step(closure)


def prepare(args):
    """Check the flags, and return the files that the matching reads besides the clips: none."""
    options.check_effect(args, parser(), {} if args.learn_label else {"lr_label": "--learn_label"})
    return []


def make_matching(args, clips):
    return FeatureRegression(clips.reduced(args.n_real), args.batch_target, args.precision, args.width, args.num_pool,
                             args.pool_steps, args.lr_pool, args.dsa)


def make_optimizer(args, synset, groups, momentum):
    """Add labels to the set (with --learn_label), and return Adam for all it learns.

    Call it before `run.resume`, which fills the labels. momentum: for SGD only, not used.
    """
    if args.learn_label:
        synset.soft_labels = nn.Parameter(synset.scores().to(next(synset.parameters()).device))
        groups = [*groups, {"params": [synset.soft_labels], "lr": args.lr_label}]
    return CosineAdam(groups, args.Iteration)


def add_matching_options(parser):
    group = parser.add_argument_group("neural feature regression")
    group.add_argument("--batch_target", type=options.positive, default=512, metavar="B",
                       help="real clips to predict per step (%(default)s)")
    group.add_argument("--num_pool", type=options.positive, default=10,
                       help="number of networks in the pool (%(default)s)")
    group.add_argument("--pool_steps", type=options.positive, default=100,
                       help="steps on the set after which a network of the pool is replaced by a fresh one "
                       "(%(default)s)")
    group.add_argument("--lr_pool", type=options.rate, default=1e-4,
                       help="learning rate of these networks, with Adam (%(default)s)")
    group.add_argument("--learn_label", action=argparse.BooleanOptionalAction, default=True,
                       help="learn the labels of the set, and store them with it (%(default)s)")
    group.add_argument("--lr_label", type=options.rate, default=1e-3, help="learning rate of the labels (%(default)s)")


def main(args):
    options.apply_byte_budget(args, budget.pixels, "n_syn", "interpolation", "storage", "learn_label")
    options.check(args, 1 if args.init == "noise" else args.ipc, convnet3d=True)
    prepare(args)
    run = start_run(args, f"FRePo_ipc{args.ipc}_lr{args.lr_img:g}")
    seed_everything(args.seed)

    # Real clips, and the synthetic videos that are learned from them.
    train, eval_clips, test = options.load_splits(args)
    chosen = None if args.init == "noise" else choose(run, args, train, args.ipc, args.select)
    synset = initial_pixels(train, args.ipc, args.init, args.n_syn, args.interpolation, args.storage, chosen)
    matching = make_matching(args, train)
    optimizer = make_optimizer(args, synset, synset.param_groups(args.lr_img, args.lr_interpolation), momentum=None)
    run.resume(synset=synset, matching=matching, optimizer=optimizer)

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
    options.add_distillation_options(parser, 10000)
    options.add_pixel_options(parser, lr_img=1e-2, segments=False)
    add_start_options(parser)
    add_matching_options(parser)
    return parser


if __name__ == "__main__":
    run_script(main, parser())
