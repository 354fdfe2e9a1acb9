"""The experts that a trajectory matching reads: find the run of buffer.py, check it, and open its files."""
import pandas as pd

from distill_utils.identity import DATA_PATHS, differing_settings, find_run
from distill_utils.run import read_config
from distill_utils.trajectories import Experts, buffer_files, check_complete

SAME = ("frames", "size", "n_real", "segments", "width", "validation", "mirror", "dsa")  # as the experts were trained


def find_experts(args):
    """Return the folder of the experts that buffer.py trained on the same clips."""
    epochs = args.max_start_epoch + args.expert_epochs - 1
    return find_run(args, "buffer", (*SAME, "stride", "train_clips", "frame_names", *DATA_PATHS), "buffer of experts",
                    ["bash", "sh/baseline/buffer.sh", "GPU", args.dataset,
                     *(["--train_epochs", str(epochs)] if epochs > 10 else [])],  # its default is 10
                    "--buffer_path")


def check_experts(args):
    """ValueError if the experts of --buffer_path are unfinished or were trained with other settings."""
    if other := differing_settings(args, args.buffer_path, SAME):
        raise ValueError(f"the experts in {args.buffer_path} were trained with a different {' and '.join(other)}: give "
                         "the same settings, or another --buffer_path")
    if not (args.buffer_path / "result.json").exists():
        raise ValueError(f"the experts in {args.buffer_path} are not finished: let buffer.py finish first")
    check_complete(args.buffer_path, read_config(args.buffer_path / "config.json")["settings"].get("num_experts", 0))


def open_experts(args, net):
    return Experts(buffer_files(args.buffer_path), [parameter.shape for parameter in net.parameters()],
                   args.max_start_epoch + args.expert_epochs, args.seed, args.min_start_epoch)


def mean_expert_top1(args, epoch):
    """Return the mean top-1 of the experts after `epoch`, in percent, or None if their run folder does not have it.

    It is on the videos of the intermediate evaluations: validation videos with --validation, else test videos.
    """
    path, split = args.buffer_path / "metrics.jsonl", "validation" if args.validation else "test"
    try:
        metrics = pd.read_json(path, lines=True)
        top1 = metrics.top1[(metrics.epoch == epoch) & (metrics.split == split)].mean()
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return None if pd.isna(top1) else float(top1)
