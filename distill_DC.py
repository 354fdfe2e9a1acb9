"""Static learning: learn still frames that give the gradients of real frames. The result is the static memory.

Dataset condensation by gradient matching (DC, Zhao et al. 2021, arXiv 2006.05929) on single frames, methods.md 4.
The distance of a class is Σ over layers Σ over output rows of 1 − cos(g_syn, g_real).

    bash sh/s2d/DC.sh GPU DATASET SPC
"""
import torch
import torch.nn.functional as F

from distill_utils import budget, options
from distill_utils.augment import NONE, augment, augment_each, draw_operators
from distill_utils.clips import draw_flips
from distill_utils.compute import apply_network
from distill_utils.identity import start_run
from distill_utils.processes import rank_share, run_script, sum_gradients, sum_over_ranks
from distill_utils.record import evaluate_and_record, finish
from distill_utils.starts import initial_static
from distill_utils.synset import StillSet, check_divides
from networks import ConvNet
from utils import seed_everything

LOOPS = {  # spc: (outer_loop, inner_loop)
    1: (1, 1), 2: (1, 1), 5: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


class GradientMatching:
    """One iteration of DC on a StillSet: matching steps on the frames, with training of a fresh ConvNet between steps.

    With a `dsa` strategy, a matching step applies the same augmentation draw to the real and the synthetic frames of a
    class; the network's training augments each frame by itself.
    """

    def __init__(self, clips, batch_real, outer_loop, inner_loop, lr_net, batch_train, precision, dsa=NONE):
        self.clips, self.batch_real, self.outer_loop, self.inner_loop = clips, batch_real, outer_loop, inner_loop
        self.lr_net, self.batch_train, self.precision, self.dsa = lr_net, batch_train, precision, dsa

    def iterate(self, synset, optimizer, check_loss):
        """Take `outer_loop` steps on the frames; call `check_loss` with the loss of each."""
        net = ConvNet(self.clips.K, self.clips.size).to(self.clips.device)
        for step in range(self.outer_loop):
            optimizer.zero_grad()
            loss = self.match(net, synset)
            check_loss(loss)
            sum_gradients(optimizer)
            optimizer.step()
            if step < self.outer_loop - 1:  # the network is not used after the last step
                self.train(net, synset)

    def match(self, net, synset):
        """Return the distance summed over classes, and add its gradient to the frames.

        Works class by class, so that only one graph is in memory. Several ranks share the classes; they draw the same
        frames as a single process. The returned sum is over all ranks; a rank's gradient covers its own classes only.
        """
        total, index = synset.static.new_zeros(()), self.clips.class_batch(self.batch_real)
        labels, flips = self.clips.labels[index], draw_flips(len(index), self.clips.mirror)
        draw = draw_operators(self.dsa, synset.K)
        for label in rank_share(synset.K):
            clips = self.clips.draw(index[labels == label], flip=flips[labels == label])
            real = self.gradient(net, clips[:, 0], label, draw)
            synthetic = self.gradient(net, synset.decode(synset.static[label]), label, draw, create_graph=True)
            loss = sum(row_distance(s, r.detach()) for s, r in zip(synthetic, real))
            loss.backward(inputs=[synset.static])
            total += loss.detach()
        return sum_over_ranks(total).item()

    def gradient(self, net, frames, label, draw, create_graph=False):
        """Return the gradient of the cross-entropy of one class's augmented frames.

        It is with respect to the weights of two or more axes.
        """
        weights = [parameter for parameter in net.parameters() if parameter.dim() > 1]
        labels = torch.full((len(frames),), label)
        frames = augment(frames, draw, labels)
        loss = F.cross_entropy(apply_network(net, frames, self.precision), labels.to(frames.device))
        return torch.autograd.grad(loss, weights, create_graph=create_graph)

    def train(self, net, synset):
        """Train the network for `inner_loop` epochs on the frames, by SGD without momentum."""
        optimizer = torch.optim.SGD(net.parameters(), lr=self.lr_net)
        frames = synset.decode(synset.static.detach().flatten(0, 1))
        labels = torch.arange(synset.K, device=frames.device).repeat_interleave(len(frames) // synset.K)
        for _ in range(self.inner_loop):
            for part in torch.randperm(len(frames)).split(self.batch_train):
                optimizer.zero_grad()
                shown = augment_each(frames[part], self.dsa)
                F.cross_entropy(apply_network(net, shown, self.precision), labels[part]).backward()
                optimizer.step()


def row_distance(synthetic, real):
    """Return Σ over output rows of 1 − cos, each row flattened over its other axes (arXiv 2006.05929, equation 10)."""
    synthetic, real = synthetic.flatten(1), real.flatten(1)
    # Add a small number to the product of norms: the row of a dead filter is zero, and must not give nan.
    return (1 - (synthetic * real).sum(1) / (synthetic.norm(dim=1) * real.norm(dim=1) + 1e-6)).sum()


def loops(spc, outer_loop, inner_loop):
    """Return outer_loop and inner_loop: the given values, or the paper's for this spc."""
    if spc not in LOOPS and None in (outer_loop, inner_loop):
        raise ValueError(f"--spc {spc} has no loops in the paper (it has {', '.join(map(str, LOOPS))}): "
                         "give --outer_loop and --inner_loop")
    outer, inner = LOOPS.get(spc, (None, None))
    return outer_loop or outer, inner_loop or inner


def main(args):
    options.apply_byte_budget(args, budget.stills, "ipc", "static_size", "storage", still=True)
    check_divides(args.ipc or args.spc, spc=args.spc)
    device = options.check(args, 1 if args.init == "noise" else args.spc, still=True)
    outer_loop, inner_loop = loops(args.spc, args.outer_loop, args.inner_loop)
    run = start_run(args, f"DC_spc{args.spc}")
    seed_everything(args.seed)

    # One random frame of each training video. The test clips are whole; the evaluated videos repeat a frame.
    train, eval_clips, test = options.load_splits(args, T=1)
    static = initial_static(train, args.spc, args.init, args.static_size)
    synset = StillSet(static, args.ipc or args.spc, eval_clips.T, eval_clips.size, args.storage).to(device)
    matching = GradientMatching(train, args.batch_real, outer_loop, inner_loop, args.lr_net, args.batch_train,
                                args.precision, args.dsa)
    optimizer = torch.optim.SGD(synset.parameters(), lr=args.lr_img, momentum=0.5)
    run.resume(synset=synset, optimizer=optimizer)

    for _ in run.iterations(args.Iteration):
        if run.due(args.eval_it, args.Iteration):
            evaluate_and_record(run, synset, eval_clips, **options.evaluation_values(args))
        if run.iteration == args.Iteration:
            break
        with run.timed_step():
            matching.iterate(synset, optimizer, run.check_loss)
    finish(run, synset, eval_clips, test, **options.evaluation_values(args))


def parser():
    parser = options.script_parser(__doc__)
    options.add_evaluation_options(parser, eval_it=1000)
    options.add_distillation_options(parser, 3000, videos=False)
    group = parser.add_argument_group("static learning")
    options.add_batch_real(group, 256)
    group.add_argument("--spc", type=options.positive, default=2, help="frames per class (%(default)s)")
    group.add_argument("--ipc", type=options.positive,
                       help="videos per class in evaluation; they share the frames, each draws one of its spc/ipc "
                       "(spc)")
    group.add_argument("--lr_img", type=options.rate, default=0.1, help="learning rate of the frames (%(default)s)")
    group.add_argument("--outer_loop", type=options.positive,
                       help="steps on the frames per network (the paper's for this spc)")
    group.add_argument("--inner_loop", type=options.positive,
                       help="epochs of network training between two steps (the paper's for this spc)")
    group.add_argument("--init", default="real", choices=("real", "mean", "noise"),
                       help="start from real frames, means of the class's frames, or noise (%(default)s)")
    options.add_static_size(group)
    options.add_storage(group)
    options.add_bytes(group, "--spc")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
