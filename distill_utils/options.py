"""Command-line flags that the scripts share, and functions that turn parsed flags into data and settings."""
import argparse
import math
import os
import pathlib
import shutil

from distill_utils.augment import NONE, OPERATORS, operators_of
from distill_utils.clips import load_clips
from distill_utils.compute import PRECISIONS, set_precision
from distill_utils.datasets import DATASETS, LIST, read_videos
from distill_utils.processes import broadcast, rank_zero_first
from distill_utils.storage import FORMATS
from networks import INTERPOLATIONS, NETWORKS, WIDTH, build
from utils import ROOT, find_device

PROTOCOLS = ("standard", "frepo")  # how evaluation trains its networks
LR_NET = 0.01  # their learning rate, unless a flag or the matching gives another
WANDB_MODES = ("online", "offline", "disabled")


def script_parser(description, dataset="required", kind=argparse.ArgumentParser, **options):
    """Return a script's parser with the flags that all scripts have: run, data, validation and augmentation."""
    # Whole flag names only: a launcher must recognise the flags that it sets itself.
    parser = kind(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                  **options)
    add_run_options(parser)
    add_data_options(parser, dataset)
    add_validation(parser.add_argument_group("validation"))
    add_augmentation(parser.add_argument_group("augmentation"))
    return parser


def add_run_options(parser):
    group = parser.add_argument_group("run")
    group.add_argument("--save_path", default=ROOT / "results", type=pathlib.Path,
                       help="parent folder of the run folders (%(default)s)")
    group.add_argument("--device", default="cuda", help="cuda, cuda:1, mps, xpu or cpu (%(default)s)")
    group.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS),
                       help="number format of the convolutions; sums, means and updates are always float32; auto: bf16 "
                       "where a CPU or a CUDA GPU supports it in hardware and computes it well, else fp32 "
                       "(%(default)s)")
    group.add_argument("--compile", action="store_true",
                       help="use torch.compile on the networks of distribution matching, experts and evaluation; not "
                       "used in gradient and trajectory matching, because compiled networks cannot be differentiated "
                       "twice, nor in FRePo's pool")
    group.add_argument("--seed", default=0, type=seed, help="random seed of the run (%(default)s)")
    group.add_argument("--checkpoint_seconds", default=60, type=rate, metavar="S",
                       help="seconds between checkpoints, up to ten times more if saving takes over 1/20 of it; 0: "
                       "after each step; a killed run loses at most about this much learning, or the "
                       "network that was in training in an evaluation, buffer.py or a selection (%(default)s)")
    group.add_argument("--wandb", default=os.environ.get("WANDB_MODE") or "offline", choices=WANDB_MODES,
                       help="Weights & Biases mode (WANDB_MODE, else offline)")


def add_validation(group):
    group.add_argument("--validation", type=share_or_list, default=0.0, metavar="F",
                       help="share of each class's training videos to hold out for validation; if the list has a "
                       "column `group`, whole groups are held out; or `list`: use the list's own validation videos, "
                       "which are otherwise unused. Intermediate evaluations then use the validation videos, and the "
                       "result gives the test accuracy at the last and at the best intermediate evaluation "
                       "(%(default)s: use the test videos)")


def add_augmentation(group):
    group.add_argument("--dsa", default=NONE, metavar="STRATEGY",
                       help="differentiable siamese augmentation of everything that networks are trained or matched "
                       f"on: {NONE}, or operators joined by _, for example {'_'.join(OPERATORS)}. Each batch is "
                       "changed by one of them, chosen at random; operators joined by + are applied together "
                       "(crop_flip+color: crop, or flip and color). color: brightness ± 0.5, saturation × 0 to 2, "
                       "contrast × 0.5 to 1.5, in normalised pixels; networks standardise each clip, so alone only "
                       "saturation has an effect. crop: shift by up to an eighth of the side. cutout: set a square of "
                       "half the side to zero. flip: mirror left-right, with probability 1/2. scale: each axis × 1/1.2 "
                       "to 1.2. rotate: by up to 15 degrees either way. All frames of a clip get the same change. DC "
                       "and DM change the real and synthetic clips of a class alike; experts, the steps of MTT and "
                       "FRePo, DC's network and evaluation change each clip by itself; the real clips that FRePo "
                       "predicts are not changed (%(default)s, as in the paper)")


def add_data_options(parser, dataset="required"):
    group = parser.add_argument_group("data")
    if dataset:
        group.add_argument("--dataset", required=dataset == "required", help=f"one of {', '.join(DATASETS)}")
    group.add_argument("--data_path", type=pathlib.Path,
                       help="folder of the data sets (distill_utils/data); for custom: the data set's own folder")
    group.add_argument("--list_path", type=pathlib.Path,
                       help="custom: the csv with columns folder_name,label,split, needed if the folder has several; "
                       "split is train, test or validation (val); validation is the test set if there is no test split")
    group.add_argument("--frames_path", type=pathlib.Path,
                       help="custom: the folder of the frame folders, needed if there are several")
    group.add_argument("--frame_names", metavar="GLOB",
                       help="which images of a frame folder are frames, for example 'img_#.jpg' with # for a number "
                       "(all images; if the names form several series: the one named img, image, frame, rgb, color, or "
                       "by number only)")
    group.add_argument("--frames", type=positive, metavar="T", help="frames per clip (the data set's: 16 or 8)")
    group.add_argument("--size", type=positive, help="height and width in pixels (the data set's: 112 or 64)")
    group.add_argument("--stride", type=positive,
                       help="distance between the frames of a clip, in video frames (4; toy: 1; not for Kinetics400 "
                       "and SSv2, where a clip is the whole video)")
    group.add_argument("--train_clips", type=positive, default=1,
                       help="clips per training video, drawn once (%(default)s)")
    group.add_argument("--mirror", type=probability, default=0.5, metavar="P",
                       help="probability with which a real training clip is mirrored left-right whenever a network is "
                       "trained or matched on it; 0 if left and right matter, as for a fixed camera or SSv2's classes "
                       "(%(default)s, as in the paper)")
    group.add_argument("--test_clips", type=positive, default=3,
                       help="clips per test video, evenly spaced (%(default)s)")
    group.add_argument("--pack_path", type=pathlib.Path, help="folder of the packed clips (distill_utils/data/packs)")
    group.add_argument("--no_pack", dest="pack", action="store_false",
                       help="decode the JPEGs in each run instead of packing the clips once")
    group.add_argument("--workers", type=positive, help="decoding threads (number of cores)")


def add_evaluation_options(parser, eval_it=None, lr_net=LR_NET):
    """Add the flags of the evaluation protocol.

    eval_it: default of --eval_it; None for scripts without intermediate evaluations.
    lr_net: default of --lr_net; None if the matching decides.
    """
    group = parser.add_argument_group("evaluation")
    if eval_it:
        group.add_argument("--eval_it", type=positive, default=eval_it,
                           help="iterations between evaluations; more than --Iteration: evaluate only at the end "
                           "(%(default)s)")
    group.add_argument("--network", default="ConvNet3D",
                       help=f"network trained on the set: one of {', '.join(NETWORKS)} (%(default)s)")
    add_width(group)
    group.add_argument("--num_eval", type=positive, default=3, help="fresh networks per evaluation (%(default)s)")
    group.add_argument("--epoch_eval_train", type=positive, default=500,
                       help="training epochs of each network (%(default)s)")
    group.add_argument("--eval_protocol", default="standard", choices=PROTOCOLS,
                       help="how the networks are trained. standard: cross-entropy and SGD, used for all results of "
                       "other methods. frepo: modelled on FRePo's, squared error on learned labels, AdamW with "
                       "PyTorch's defaults and a cosine schedule (use it with --lr_net 3e-4 --epoch_eval_train 1000); "
                       "tables mark it (%(default)s)")
    group.add_argument("--lr_net", type=rate, default=lr_net,
                       help="learning rate of the networks, divided by 10 after half of the epochs; DC also trains "
                       "its own network between two steps with it "
                       f"({lr_net or f'the step size that trajectory matching learned, else {LR_NET}'})")
    group.add_argument("--batch_train", type=positive, default=256,
                       help="batch size of the networks' training, also of DC's own between two steps (%(default)s)")
    group.add_argument("--no_test", action="store_true",
                       help="do not use the test videos: stop after the last evaluation on the validation videos, "
                       "without a result; the same command without this flag adds the result")


def add_distillation_options(parser, iterations, videos=True):
    """Add the flags for the size and length of a distillation; `videos` is False for static learning (frames)."""
    group = parser.add_argument_group("distillation")
    if videos:
        group.add_argument("--ipc", type=positive, default=1, help="synthetic videos per class (%(default)s)")
    group.add_argument("--Iteration", type=count, default=iterations,
                       help="iterations; 0 evaluates the initial set (%(default)s)")


def add_storage(group):
    group.add_argument("--storage", default="fp32", choices=FORMATS,
                       help="storage format of the set; matching and evaluation see the set in this format too. uint8 "
                       "and uint4: 8 or 4 bits per value, plus the minimum and maximum of each frame. The set is "
                       "learned in float32 (%(default)s)")


def add_bytes(group, chooses):
    group.add_argument("--bytes", type=byte_count, metavar="B",
                       help=f"size limit of the stored set in bytes: replaces {chooses} by the values of the largest "
                       "set that fits, by the rules of distill_utils/budget.py, and prints them")


def add_static_size(group):
    group.add_argument("--static_size", type=positive, metavar="S",
                       help="height and width of a stored static memory in pixels; it is enlarged bilinearly to --size "
                       "when used (--size)")


def add_pixel_options(parser, lr_img, segments=True):
    """Add the flags of a PixelSet, the baselines' set, and of the study of its temporal compression."""
    group = parser.add_argument_group("pixels")
    group.add_argument("--lr_img", type=rate, default=lr_img, help="learning rate of the pixels (%(default)s)")
    group.add_argument("--init", default="real", choices=("real", "mean", "noise", "still"),
                       help="start from the real clips that --select chooses, means of the class's clips, noise, or "
                       "the first frame of a chosen clip, repeated (%(default)s)")
    add_storage(group)
    add_bytes(group, "--ipc")
    add_temporal_options(parser, segments=segments)


def add_temporal_options(parser, synthetic=True, segments=True):
    """Add the flags of the paper's study of temporal compression (methods.md 7).

    Experts have no `synthetic` videos, and not every matching takes `segments`.
    """
    group = parser.add_argument_group("temporal compression")
    if synthetic:
        group.add_argument("--n_syn", type=positive, help="learned frames per synthetic video (all T)")
        group.add_argument("--interpolation", default="duplicate", choices=INTERPOLATIONS,
                           help="how the learned frames are stretched to T frames (%(default)s)")
        group.add_argument("--lr_interpolation", type=rate, default=1e-3,
                           help="learning rate of the matrix of parametric interpolation (%(default)s)")
    group.add_argument("--n_real", type=positive,
                       help="frames of a real clip that are matched, evenly spaced and each repeated (all T); MTT: the "
                       "value that its experts were trained with")
    if not segments:
        parser.set_defaults(segments=1)
        return
    group.add_argument("--segments", type=positive, default=1,
                       help="segments of T/segments frames that clips and videos are cut into; each step matches a "
                       "random one (%(default)s)")


def add_width(group):
    group.add_argument("--width", type=even, default=WIDTH,
                       help="channels of the second and third block of ConvNet3D, wherever a script builds it; the "
                       "first block has half as many; 32 takes a tenth of the work and is for exploring; the paper's "
                       "128 is for reported results (%(default)s)")


def add_batch_real(group, default):
    group.add_argument("--batch_real", type=positive, default=default, metavar="B",
                       help="real clips per class and step, or all if a class has fewer (%(default)s)")


MOST = 2 ** 31 - 1  # upper limit of integer flags: products with them fit in int64, or are refused as too much memory


def positive(text):
    return number(text, int, 1, MOST, "a whole number of at least 1")


def byte_count(text):
    return number(text, int, 1, 2 ** 63 - 1, "a whole number of at least 1")


def count(text):
    return number(text, int, 0, MOST, "a whole number of at least 0")


def seed(text):
    return number(text, int, 0, 2 ** 64 - 1, "a whole number of at least 0")  # PyTorch's range


def share(text):
    return number(text, float, 0, 0.9, "a share from 0 to 0.9")


def probability(text):
    return number(text, float, 0, 1, "a probability from 0 to 1")


def share_or_list(text):
    return LIST if text == LIST else share(text)


def even(text):
    if (value := number(text, int, 2, MOST, "an even number of at least 2")) % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not an even number of at least 2")
    return value


def rate(text):
    # Within float32's range, also where Adam divides its first step's rate by 0.1.
    return number(text, float, 0, 1e37, "a number from 0 to 1e37")


def number(text, kind, least, most, description):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}"
                                         + (f" and at most {most}" if kind is int and value > most else ""))
    return value


def clip_shape(args) -> tuple[int, int]:
    """Return a clip's frames T, and its height and width in pixels."""
    dataset = DATASETS[args.dataset]
    return args.frames or dataset.T, args.size or dataset.size


def list_videos(args):
    return read_videos(args.dataset, args.data_path, args.list_path, args.frames_path, args.validation)


def check(args, per_class=1, networks=(), still=False, convnet3d=False):
    """Check the settings before any work is done, and return the device.

    Replaces `--precision auto` in `args` by the precision that it stands for.

    per_class: the least number of training clips that each class must have.
    networks: names of the networks to evaluate, instead of --network.
    still: whether the training clips have one frame.
    convnet3d: whether the run builds ConvNet3D for whole clips, whatever --network is.

    ValueError for impossible settings.
    """
    for name, table in (("dataset", DATASETS), ("network", NETWORKS), ("wandb", WANDB_MODES)):
        if getattr(args, name) not in table:
            raise ValueError(f"unknown --{name} {getattr(args, name)!r}: choose one of {', '.join(table)}")
    if getattr(args, "no_test", False) and not args.validation:
        raise ValueError("--no_test needs validation videos to evaluate on: give --validation")
    dataset, device, (T, size) = DATASETS[args.dataset], find_device(args.device), clip_shape(args)
    args.precision = set_precision(device, broadcast(set_precision(device, args.precision)))  # rank 0's for all
    language, variable, compiler = ("C++", "CXX", "g++") if device.type == "cpu" else ("C", "CC", "gcc")
    if args.compile and not shutil.which(os.environ.get(variable, compiler)):
        raise ValueError(f"--compile needs a {language} compiler: install {compiler}, or leave out --compile")
    for network in [*(networks or [args.network]), *(["ConvNet3D"] if convnet3d else [])]:
        build(network, 1, T, size, args.width)  # refuses too small clips
    for flag, default in (("stride", None), ("test_clips", 3)):  # in a RUN's settings they do no harm
        if dataset.rule != "stride" and not networks and getattr(args, flag) != default:
            raise ValueError(f"--{flag} has no effect on {dataset.name}, where a clip is the whole video: leave it out")
    check_temporal(args, T)
    check_compact(args, T, size)
    if "flip" in operators_of(args.dsa) and dataset.directed:
        raise ValueError(f"--dsa {args.dsa}: leave out flip, because classes of {dataset.name} distinguish left and "
                         "right")
    if getattr(args, "init", None) in ("mean", "noise") and getattr(args, "select", "random") != "random":
        raise ValueError(f"--select {args.select} has no effect with --init {args.init}, which starts from no chosen "
                         "clips: give --init real or still")
    if not (getattr(args, "no_test", False) or (list_videos(args)[0].split == "test").any()):
        raise ValueError(f"the list of {args.dataset} has no test videos: give another list by --list_path")
    counts = clips_per_class(args, still)
    if len(counts) < 2:
        raise ValueError(f"the list has one class, {counts.index[0]}: two or more are needed")
    if counts.min() < per_class:
        more = ", or raise --train_clips" if still or dataset.rule == "stride" else ""
        raise ValueError(f"class {counts.idxmin()} has fewer training clips than the required {per_class}: "
                         f"lower --ipc, --spc or --dpc{more}")
    return device


def check_effect(args, parser, needed):
    """ValueError if a flag has another value than its default, and no effect.

    needed: names of flags without effect, and what each needs.
    """
    for flag, other in needed.items():
        if (value := getattr(args, flag)) != parser.get_default(flag):
            given = f"--no-{flag}" if value is False else f"--{flag}"
            raise ValueError(f"{given} has no effect without {other}: give {other}, or leave out {given}")


def clips_per_class(args, still=False):
    """Return the number of training clips per class, a Series; `still`: of clips of one frame."""
    videos, _ = list_videos(args)
    several = still or DATASETS[args.dataset].rule == "stride"
    return videos.label[videos.split == "train"].value_counts() * (args.train_clips if several else 1)


def apply_byte_budget(args, rule, *flags, still=False):
    """Replace the flags that --bytes decides by the values of `rule`, a function of distill_utils/budget.py.

    flags: names of the flags that the rule takes into account. still: whether the training clips have one frame.
    """
    if args.bytes is None:
        return
    chosen, total = rule(args.bytes, len(list_videos(args)[1]), int(clips_per_class(args, still).min()),
                         *clip_shape(args), **{flag: getattr(args, flag) for flag in flags})
    vars(args).update(chosen)
    print(f"--bytes {args.bytes}: {' '.join(f'--{flag} {value}' for flag, value in chosen.items())}, {total} bytes")


def check_temporal(args, T):
    for flag in ("n_syn", "n_real", "segments"):
        value = getattr(args, flag, None) or 1
        if value > T or flag == "segments" and T % value:
            raise ValueError(f"--{flag} {value} does not fit clips of {T} frames")
    if getattr(args, "interpolation", None) == "linear" and args.n_syn in (None, 1, T):
        raise ValueError(f"--interpolation linear has no effect unless --n_syn is from 2 to {T - 1}: give another "
                         "--n_syn, or leave out --interpolation")


def check_compact(args, T, size):
    for flag, most, unit in (("dynamic_frames", T, "frames"), ("dynamic_size", size, "pixels"),
                             ("static_size", size, "pixels")):
        if (getattr(args, flag, None) or 1) > most:
            raise ValueError(f"--{flag} {getattr(args, flag)} is more than the {most} {unit} of the clips")


def load_data(args, split, **other):
    """Return the Clips of a split, as the flags describe them; `other` overrides flags (T=1 in static learning)."""
    values = dict(pack=args.pack, pack_path=args.pack_path, device=args.device, workers=args.workers,
                  mirror=args.mirror)
    with rank_zero_first():
        return load_clips(args.dataset, split=split, **(values | selection_values(args) | other))


def load_splits(args, **other):
    """Return the training Clips, the Clips of intermediate evaluations, and the test Clips (None with --no_test).

    The Clips of intermediate evaluations are from the videos that --validation holds out; without --validation they
    are the test Clips. `other` overrides flags of the training clips.
    """
    train, test = (load_data(args, "train", **other),
                   None if getattr(args, "no_test", False) else load_data(args, "test"))
    return train, load_data(args, "validation") if args.validation else test, test


def selection_values(args):
    """Return the keyword arguments of `select` from the flags."""
    return dict(data_path=args.data_path, list_path=args.list_path, frames_path=args.frames_path, T=args.frames,
                size=args.size, stride=args.stride, train_clips=args.train_clips, test_clips=args.test_clips,
                seed=args.seed, validation=args.validation, names=args.frame_names)


def evaluation_values(args, lr=None):
    """Return the keyword arguments of `evaluate` from the flags; `lr` is used if --lr_net is not given."""
    return dict(network=args.network, num_eval=args.num_eval, epochs=args.epoch_eval_train,
                lr=lr if args.lr_net is None else args.lr_net, batch_size=args.batch_train, seed=args.seed,
                precision=args.precision, width=args.width, compile=args.compile,
                dsa=args.dsa, protocol=args.eval_protocol)
