"""The groups of flags that the scripts share, and what the scripts make of them."""
import argparse
import math
import os
import pathlib
import shutil

from distill_utils.augment import GROUPS, NONE, groups_of
from distill_utils.clips import load_clips
from distill_utils.compute import PRECISIONS, set_precision
from distill_utils.datasets import DATASETS, LIST, read_videos
from distill_utils.processes import broadcast, first_goes_ahead
from distill_utils.storage import FORMATS
from networks import INTERPOLATIONS, NETWORKS, WIDTH, build
from utils import ROOT, find_device

PROTOCOLS = ("standard", "frepo")  # of evaluation
WANDB_MODES = ("online", "offline", "disabled")


def script_parser(description, dataset="required", **options):
    """A script's parser with the flags that all have: those of the run and of the data."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    add_run_options(parser)
    add_data_options(parser, dataset)
    add_validation(parser.add_argument_group("validation"))
    add_augmentation(parser.add_argument_group("augmentation"))
    return parser


def add_run_options(parser):
    group = parser.add_argument_group("run")
    group.add_argument("--save_path", default=ROOT / "results", type=pathlib.Path, help="folder of the run folders (%(default)s)")
    group.add_argument("--device", default="cuda", help="cuda, cuda:1, mps, xpu or cpu (%(default)s)")
    group.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS),
                       help="number format of convolutions; sums, means and updates are float32 in all; auto: bf16 where a CPU or CUDA has it in hardware, "
                       "else fp32 (%(default)s)")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile the networks of distribution matching, experts and evaluation; gradient and trajectory matching differentiate "
                       "twice, which it cannot")
    group.add_argument("--seed", default=0, type=seed, help="of everything random (%(default)s)")
    group.add_argument("--checkpoint_seconds", default=60, type=rate, metavar="S",
                       help="a kill loses at most about so much work between evaluations; of experts, the one in the making (%(default)s)")
    group.add_argument("--wandb", default=os.environ.get("WANDB_MODE") or "offline", choices=WANDB_MODES,
                       help="weights & biases (WANDB_MODE, else offline)")


def add_validation(group):
    group.add_argument("--validation", type=share_or_list, default=0.0, metavar="F",
                       help="share of each class's training videos that is held out, in groups where the list has a column `group`, or `list`: the list's "
                       "own validation videos (else unused). Evaluations along the way are on these, and the result names the test accuracy at the last "
                       "and at the best of them (%(default)s: test videos instead)")


def add_augmentation(group):
    group.add_argument("--dsa", default=NONE, metavar="STRATEGY",
                       help=f"differentiable siamese augmentation of what networks are trained or matched on: {NONE}, or words joined by _, applied in this "
                       f"order, as {'_'.join(GROUPS)}. color: brightness ± 0.5, saturation × 0 to 2, contrast × 0.5 to 1.5, in normalised pixels. crop: moved by up "
                       "to an eighth of the side. cutout: a square of half the side becomes zero. flip: mirrored left-right, with probability 1/2. scale: each axis "
                       "× 1/1.2 to 1.2. rotate: by up to 15 degrees either way. A clip's frames are all changed alike. DC and DM apply one of the words at each step, and "
                       "change a class's real and synthetic clips alike. Experts, the steps of MTT, DC's network and evaluation apply all, to each clip by itself "
                       "(%(default)s, the paper's)")


def add_data_options(parser, dataset="required"):
    group = parser.add_argument_group("data")
    if dataset:
        group.add_argument("--dataset", required=dataset == "required", help=f"one of {', '.join(DATASETS)}")
    group.add_argument("--data_path", type=pathlib.Path, help="folder of the data sets (distill_utils/data); for custom the data set's own folder")
    group.add_argument("--list_path", type=pathlib.Path, help="custom: the folder_name,label,split csv, where the folder has several; split is train, test, "
                       "or validation (val), which is the test set where there is no test")
    group.add_argument("--frames_path", type=pathlib.Path, help="custom: the folder of frame folders, where there are several")
    group.add_argument("--frame_names", metavar="GLOB", help="which images of a frame folder are its frames, as 'img_#.jpg', # for a number (all; of several "
                       "series the one called img, image, frame, rgb, color or nothing but a number)")
    group.add_argument("--frames", type=positive, metavar="T", help="frames of a clip (the data set's: 16 or 8)")
    group.add_argument("--size", type=positive, help="height and width in pixels (the data set's: 112 or 64)")
    group.add_argument("--stride", type=positive, help="frames from one of a clip's frames to the next (4)")
    group.add_argument("--train_clips", type=positive, default=1, help="clips drawn from each training video, once (%(default)s)")
    group.add_argument("--test_clips", type=positive, default=3, help="evenly spaced clips of each test video (%(default)s)")
    group.add_argument("--pack_path", type=pathlib.Path, help="folder of the packed clips (distill_utils/data/packs)")
    group.add_argument("--no_pack", dest="pack", action="store_false", help="decode JPEGs each time instead of packing them once")
    group.add_argument("--workers", type=positive, help="decoding threads (the number of cores)")


def add_evaluation_options(parser, eval_it=None, lr_net=0.01):
    """The protocol's flags; `eval_it` is the default of those that evaluate along the way. Without `lr_net` the matching has a say."""
    group = parser.add_argument_group("evaluation")
    if eval_it:
        group.add_argument("--eval_it", type=positive, default=eval_it,
                           help="iterations from one evaluation to the next; more than --Iteration: only at the end (%(default)s)")
    group.add_argument("--network", default="ConvNet3D", help=f"trained on the set: one of {', '.join(NETWORKS)} (%(default)s)")
    add_width(group)
    group.add_argument("--num_eval", type=positive, default=3, help="fresh networks of each evaluation (%(default)s)")
    group.add_argument("--epoch_eval_train", type=positive, default=500, help="epochs that each is trained (%(default)s)")
    group.add_argument("--eval_protocol", default="standard", choices=PROTOCOLS,
                       help="how they are trained: cross-entropy by SGD, as all results of other methods, or FRePo's released one, squared error on learned labels by "
                       "AdamW (give it --lr_net 3e-4 --epoch_eval_train 1000); tables mark it (%(default)s)")
    group.add_argument("--lr_net", type=rate, default=lr_net, help="their learning rate, a tenth of it after half of the epochs "
                       f"({lr_net or 'the step size that trajectory matching learned, else 0.01'})")
    group.add_argument("--batch_train", type=positive, default=256, help="their batch size (%(default)s)")
    group.add_argument("--no_test", action="store_true",
                       help="leave the test videos alone: end after the last evaluation on validation videos, without a result, which the same command without "
                       "this flag adds")


def add_distillation_options(parser, iterations, videos=True):
    """The flags of what is distilled and how long; static learning has frames instead of videos."""
    group = parser.add_argument_group("distillation")
    if videos:
        group.add_argument("--ipc", type=positive, default=1, help="synthetic videos per class (%(default)s)")
    group.add_argument("--Iteration", type=count, default=iterations, help="steps; 0 evaluates the start (%(default)s)")


def add_storage(group):
    group.add_argument("--storage", default="fp32", choices=FORMATS,
                       help="format that the set is stored in, and seen in by matching and evaluation; uint8 and uint4: that many bits a value, with a lowest and "
                       "a highest value of each frame. It is learned in float32 (%(default)s)")


def add_bytes(group, chooses):
    group.add_argument("--bytes", type=positive, metavar="B",
                       help=f"the largest set that is stored in so many bytes: chooses {chooses}, in the place of what is given for it, as distill_utils/budget.py "
                       "says, and prints it")


def add_static_size(group):
    group.add_argument("--static_size", type=positive, metavar="S",
                       help="height and width of a stored static memory in pixels, enlarged bilinearly to --size where it is used (--size)")


def add_pixel_options(parser, lr_img):
    """The flags of a set of pixels, the baselines' kind, and of the study of its temporal compression."""
    group = parser.add_argument_group("pixels")
    group.add_argument("--lr_img", type=rate, default=lr_img, help="learning rate of the pixels (%(default)s)")
    group.add_argument("--init", default="real", choices=("real", "mean", "noise", "still"),
                       help="start from random real clips, means of the class's clips, noise, or one real frame repeated (%(default)s)")
    add_storage(group)
    add_bytes(group, "--ipc")
    add_temporal_options(parser)


def add_temporal_options(parser, synthetic=True):
    """The paper's study of temporal compression (METHOD 7); experts have no `synthetic` videos."""
    group = parser.add_argument_group("temporal compression")
    if synthetic:
        group.add_argument("--n_syn", type=positive, help="frames of a synthetic video that are learned (all T)")
        group.add_argument("--interpolation", default="duplicate", choices=INTERPOLATIONS, help="what stretches them to T (%(default)s)")
        group.add_argument("--lr_interpolation", type=rate, default=1e-3, help="learning rate of parametric's matrix (%(default)s)")
    group.add_argument("--n_real", type=positive, help="evenly spaced frames of a real clip that are matched, each repeated (all T); MTT: of its experts")
    group.add_argument("--segments", type=positive, default=1,
                       help="pieces of T/segments frames that clips and videos are cut into; each step matches a random one (%(default)s)")


def add_width(group):
    group.add_argument("--width", type=even, default=WIDTH,
                       help="channels of ConvNet3D's second and third block, twice its first's, wherever a script builds it; 32 is a tenth of the work "
                       "and explores, the paper's 128 reports (%(default)s)")


def add_batch_real(group, default):
    group.add_argument("--batch_real", type=positive, default=default, metavar="B",
                       help="real clips per class and step, as far as there are so many (%(default)s)")


MOST = 2 ** 31 - 1  # of a count: all that it is multiplied with stays within int64, or is refused as too much memory


def positive(text):
    return number(text, int, 1, MOST, "a whole number of at least 1")


def count(text):
    return number(text, int, 0, MOST, "a whole number of at least 0")


def seed(text):
    return number(text, int, 0, 2 ** 64 - 1, "a whole number of at least 0")  # PyTorch's


def share(text):
    return number(text, float, 0, 0.9, "a share from 0 to 0.9")


def share_or_list(text):
    return LIST if text == LIST else share(text)


def even(text):
    if (value := number(text, int, 2, MOST, "an even number of at least 2")) % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not an even number of at least 2")
    return value


def rate(text):
    return number(text, float, 0, 1e38, "a number from 0 to 1e38")  # what fits float32


def number(text, kind, least, most, description):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}" + (f" and at most {most}" if kind is int and value > most else ""))
    return value


def list_videos(args):
    return read_videos(args.dataset, args.data_path, args.list_path, args.frames_path, args.validation)


def check(args, per_class=1, networks=()):
    """Refuse impossible settings before any work is done, among them classes of fewer than `per_class` clips; returns the device.

    `--precision auto` becomes the one that is meant. networks: those that are evaluated in the place of --network.
    """
    for name, table in (("dataset", DATASETS), ("network", NETWORKS), ("wandb", WANDB_MODES)):
        if getattr(args, name) not in table:
            raise ValueError(f"unknown --{name} {getattr(args, name)!r}: choose one of {', '.join(table)}")
    if getattr(args, "no_test", False) and not args.validation:
        raise ValueError("--no_test evaluates on validation videos only: give --validation")
    dataset, device = DATASETS[args.dataset], find_device(args.device)
    args.precision = broadcast(set_precision(device, args.precision))
    language, variable, compiler = ("C++", "CXX", "g++") if device.type == "cpu" else ("C", "CC", "gcc")
    if args.compile and not shutil.which(os.environ.get(variable, compiler)):
        raise ValueError(f"--compile needs a {language} compiler here: install {compiler}, or leave it out")
    for network in networks or [args.network]:
        build(network, 1, args.frames or dataset.T, args.size or dataset.size, args.width)  # refuses clips that are too small
    check_temporal(args, args.frames or dataset.T)
    check_compact(args, args.frames or dataset.T, args.size or dataset.size)
    if "flip" in groups_of(args.dsa) and dataset.directed:
        raise ValueError(f"--dsa {args.dsa}: leave out flip, as classes of {dataset.name} tell left from right")
    counts = clips_per_class(args)
    if counts.min() < per_class:
        raise ValueError(f"class {counts.idxmin()} has fewer training clips than the {per_class} asked for: "
                         "lower --ipc, --spc or --dpc, or give more --train_clips")
    return device


def clips_per_class(args):
    """How many training clips each class has."""
    videos, _ = list_videos(args)
    return videos.label[videos.split == "train"].value_counts() * (args.train_clips if DATASETS[args.dataset].rule == "stride" else 1)


def spend(args, rule, *flags):
    """Give the flags that --bytes stands for the values that a rule of distill_utils/budget.py chooses; `flags` are those that have a say in it."""
    if args.bytes is None:
        return
    names, dataset = list_videos(args)[1], DATASETS[args.dataset]
    chosen, total = rule(args.bytes, len(names), int(clips_per_class(args).min()), args.frames or dataset.T, args.size or dataset.size,
                         **{flag: getattr(args, flag) for flag in flags})
    vars(args).update(chosen)
    print(f"--bytes {args.bytes}: {' '.join(f'--{flag} {value}' for flag, value in chosen.items())}, {total} bytes")


def check_temporal(args, T):
    for flag in ("n_syn", "n_real", "segments"):
        value = getattr(args, flag, None) or 1
        if value > T or flag == "segments" and T % value:
            raise ValueError(f"--{flag} {value} does not fit clips of {T} frames")


def check_compact(args, T, size):
    for flag, most, unit in (("dynamic_frames", T, "frames"), ("dynamic_size", size, "pixels"), ("static_size", size, "pixels")):
        if (getattr(args, flag, None) or 1) > most:
            raise ValueError(f"--{flag} {getattr(args, flag)} is more than the {most} {unit} of the clips")


def load_data(args, split, **other):
    """The training or test Clips that the flags describe; `other` replaces flags, as T=1 for static learning."""
    values = dict(pack=args.pack, pack_path=args.pack_path, device=args.device, workers=args.workers)
    with first_goes_ahead():
        return load_clips(args.dataset, split=split, **(values | selection_values(args) | other))


def load_splits(args, **other):
    """The training Clips, those that evaluations along the way are on, and the test Clips, None with --no_test. The second are of the videos that
    --validation holds out, or the test Clips themselves. `other` replaces flags of the training clips."""
    train, test = load_data(args, "train", **other), None if getattr(args, "no_test", False) else load_data(args, "test")
    return train, load_data(args, "validation") if args.validation else test, test


def selection_values(args):
    """The named values of `select` that the flags give."""
    return dict(data_path=args.data_path, list_path=args.list_path, frames_path=args.frames_path, T=args.frames, size=args.size,
                stride=args.stride, train_clips=args.train_clips, test_clips=args.test_clips, seed=args.seed,
                validation=args.validation, names=args.frame_names)


def evaluation_values(args, lr=None):
    """The named values of `evaluate` that the flags give; `lr` where they give no --lr_net."""
    return dict(network=args.network, num_eval=args.num_eval, epochs=args.epoch_eval_train, lr=lr if args.lr_net is None else args.lr_net,
                batch_size=args.batch_train, seed=args.seed, precision=args.precision, width=args.width, compile=args.compile,
                dsa=args.dsa, protocol=args.eval_protocol)
