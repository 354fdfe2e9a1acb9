"""Reference selections (methods.md 7): real clips chosen at random, by herding or by k-center, evaluated as a set.

    bash sh/baseline/coreset.sh GPU DATASET random|herding|k-center IPC

Herding (Welling 2009; Rebuffi et al. 2017) selects in each step the clip that brings the mean of the selected clips
nearest to the class mean. K-center (Sener & Savarese 2018) starts from the clip nearest to the class mean, and selects
in each step the clip farthest from all selected clips. Distances are between embeddings of a network trained on the
full set.
"""
import torch

import networks
from distill_utils import budget, options
from distill_utils.augment import choices_of
from distill_utils.compute import apply_network, clips_at_once
from distill_utils.identity import content_digest, list_digest, start_run
from distill_utils.processes import broadcast, progress, rank, run_script
from distill_utils.protocol import RealSet, train
from distill_utils.record import evaluate_and_record, finish
from distill_utils.starts import choose_random
from distill_utils.storage import PIXELS
from distill_utils.synset import PixelSet, load_set
from utils import code_digest, finite, load, random_stream, save, seed_everything, stream_seed


def herding(features, count):
    """Return the numbers of `count` rows of features (n, F) selected by herding, in the order of selection.

    Each row brings the mean of the selected rows nearest to the mean of all rows.
    """
    mean, taken, total = features.mean(0), [], torch.zeros_like(features[0])
    for number in range(1, count + 1):
        distance = ((total + features) / number - mean).norm(dim=1)
        distance[taken] = torch.inf
        taken.append(int(distance.argmin()))
        total = total + features[taken[-1]]
    return taken


def k_center(features, count):
    """Return the numbers of `count` rows of features (n, F) selected by k-center, in the order of selection.

    The first is nearest to the mean, each further one is farthest from all selected rows.
    """
    taken = [int((features - features.mean(0)).norm(dim=1).argmin())]
    distance = torch.full((len(features),), torch.inf, dtype=features.dtype)
    while len(taken) < count:
        distance = distance.minimum((features - features[taken[-1]]).norm(dim=1))
        distance[taken] = -1
        taken.append(int(distance.argmax()))
    return taken


METHODS = {"random": None, "herding": herding, "k-center": k_center}


def choose(run, args, clips, per_class, method) -> torch.Tensor:
    """Return the numbers of `per_class` real clips of each class, in class order, by one of METHODS.

    Herding and k-center first train a network on all clips (rank 0 does), or read it from beside the run's folder.
    """
    if method == "random":
        return choose_random(clips, per_class)
    chosen = None
    if rank() == 0:
        features = embed_all(feature_network(run, args, clips), clips, args.precision, args.width)
        chosen = select_per_class(clips, per_class, method, features)
    return broadcast(chosen)


def select_per_class(clips, ipc, method, features):
    """Return the numbers of `ipc` clips of each class, in class order, from the embeddings of all clips, (n, F)."""
    chosen = []
    for label in range(clips.K):
        index = (clips.labels == label).nonzero().flatten()
        chosen.append(index[METHODS[method](features[index], ipc)])
    return torch.cat(chosen)


@torch.inference_mode()
def embed_all(net, clips, precision, width=networks.WIDTH):
    """Return the embeddings of all clips, not mirrored, (n, F) float32 on the CPU."""
    net.eval()
    features = []
    for index in torch.arange(len(clips)).split(clips_at_once(clips.T, clips.size, clips.device, width)):
        features.append(apply_network(net.embed, clips.draw(index), precision).cpu())
    if not finite(features):
        raise ValueError("the feature network's embeddings are not finite: lower --feature_lr")
    return torch.cat(features)


def feature_network(run, args, clips):
    """Return a ConvNet3D trained on all clips; it is stored beside the run folders and reused for equal settings."""
    values = [args.feature_epochs, args.feature_lr, args.feature_batch, args.seed, args.precision, list_digest(args),
              content_digest(args), clips.T, clips.size, args.stride, args.train_clips, args.width,
              args.mirror, *choices_of(args.dsa)]
    code = code_digest("networks/*.py", "distill_utils/augment.py")
    path = run.folder.parent / f"feature_network_{stream_seed(*values, torch.__version__, code):015x}.pt"
    with random_stream(stream_seed("features", *values)):  # the run draws the same, whether the file exists or not
        net = networks.build("ConvNet3D", clips.K, clips.T, clips.size, args.width).to(clips.device)
        if path.exists():
            try:
                net.load_state_dict(load(path))
            except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{path} is damaged: delete it, and the next run trains the network again "
                                 f"({error})") from error
            return net
        with progress(total=args.feature_epochs, desc="feature network", unit="epoch") as bar:
            top1 = train(net, RealSet(clips), args.feature_epochs, args.feature_lr, args.feature_batch,
                         clips_at_once(clips.T, clips.size, clips.device, args.width), args.precision, bar, args.dsa)
    if not finite(net.state_dict().values()):
        raise ValueError("the feature network's weights are not finite: lower --feature_lr")
    run.log_line(f"the feature network has {top1:.1f} % top1 on its training clips")
    save(net.state_dict(), path)
    return net


def main(args):
    options.apply_byte_budget(args, budget.real_clips)
    options.check(args, args.ipc, convnet3d=args.method != "random")
    run = start_run(args, f"coreset_{args.method}_ipc{args.ipc}")
    seed_everything(args.seed)
    clips, eval_clips, test = options.load_splits(args)
    run.resume()
    if run.result:
        synset, _ = load_set(run.folder / "distilled.pt")
    else:
        with random_stream(args.seed):  # after a kill, resume has set another random state
            chosen = choose(run, args, clips, args.ipc, args.method)
        synset = PixelSet(clips.draw(chosen), clips.K, storage=PIXELS)
        evaluate_and_record(run, synset, eval_clips, **options.evaluation_values(args))
    finish(run, synset.to(eval_clips.device), eval_clips, test, **options.evaluation_values(args))


def parser():
    parser = options.script_parser(__doc__, prog="coreset")
    options.add_evaluation_options(parser)
    group = parser.add_argument_group("selection")
    group.add_argument("--method", default="random", choices=METHODS, help="selection method (%(default)s)")
    group.add_argument("--ipc", type=options.positive, default=1, help="real clips per class (%(default)s)")
    options.add_bytes(group, "--ipc")
    add_feature_options(group)
    return parser


def add_start_options(parser):
    """Add the flags for which real clips a set starts from."""
    group = parser.add_argument_group("start")
    group.add_argument("--select", default="random", choices=METHODS,
                       help="which real clips the set starts from (%(default)s)")
    add_feature_options(group)


def add_feature_options(group):
    group.add_argument("--feature_epochs", type=options.positive, default=60,
                       help="training epochs of the feature network, which is trained on all clips and gives the "
                       "features for herding and k-center (%(default)s)")
    group.add_argument("--feature_lr", type=options.rate, default=0.01,
                       help="learning rate of the feature network (%(default)s)")
    group.add_argument("--feature_batch", type=options.positive, default=32,
                       help="batch size of the feature network (%(default)s)")

if __name__ == "__main__":
    run_script(main, parser())
