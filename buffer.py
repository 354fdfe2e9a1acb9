"""Expert trajectories: train networks on the real clips, and save their parameters after each epoch (methods.md 5).

Trajectory matching (MTT, Cazenavette et al. 2022, arXiv 2203.11932) reads them. SGD, no momentum, no weight decay.

    bash sh/baseline/buffer.sh GPU DATASET
"""
import argparse
import math

import pandas as pd
import torch

import networks
from distill_utils import options
from distill_utils.augment import NONE
from distill_utils.compute import clips_at_once
from distill_utils.identity import start_run
from distill_utils.processes import gather, progress, rank, run_script, world_size
from distill_utils.protocol import RealSet, predict, score, train_epoch
from distill_utils.trajectories import check_complete, check_epoch, expert_bytes, snapshot
from utils import check_space, random_stream, save, stream_seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train_expert(net, clips, epochs, lr, batch_size, at_once, precision, seeds, segments=1, dsa=NONE):
    """Train `net`; yield the epoch, its mean loss and its top-1 in percent after each epoch.

    At most `at_once` clips go through the network together. seeds: names of the expert's random streams. Each epoch
    has its own stream, so it depends only on its start and on these names.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for epoch in range(1, epochs + 1):
        with random_stream(stream_seed(*seeds, epoch)):
            loss, top1 = train_epoch(net, RealSet(clips), optimizer, batch_size, at_once, precision, dsa,
                                     segments=segments)
        if not math.isfinite(loss):
            raise ValueError(f"an expert's loss is {loss} in epoch {epoch}: lower --lr_teacher")
        yield epoch, loss, top1


def make_expert(folder, number, train, eval_clips, dtype, args):
    """Train an expert and write its file; return a dict of metrics per epoch, evaluated on the Clips `eval_clips`."""
    seeds, lines, kept = ("expert", args.seed, number), [], kept_epochs(args)
    at_once = clips_at_once(eval_clips.T, eval_clips.size, eval_clips.device, args.width)
    with random_stream(stream_seed(*seeds)):
        net = networks.build(args.network, train.K, train.T, train.size, args.width,
                             args.compile).to(train.device)
    trajectory = [snapshot(net, dtype)]
    with progress(total=args.train_epochs, desc=f"expert {number}", unit="epoch", leave=False) as bar:
        for epoch, loss, top1 in train_expert(net, train.reduced(args.n_real), args.train_epochs, args.lr_teacher,
                                              args.batch_train, at_once, args.precision, seeds, args.segments,
                                              args.dsa):
            trajectory.append(snapshot(net, dtype))
            check_epoch(*trajectory[-2:])
            if epoch - 1 not in kept:
                trajectory[-2] = None
            figures = score(predict(net, eval_clips, at_once, args.precision), eval_clips)
            lines.append({"iteration": number, "epoch": epoch, "split": eval_clips.split, "loss": loss,
                          "train_top1": top1, **{name: figures[name] for name in ("top1", "top5", "video_top1")}})
            bar.set_postfix(loss=f"{loss:.3f}", train=f"{top1:.1f}", **{eval_clips.split: f"{figures['top1']:.1f}"},
                            refresh=False)
            bar.update()
    if args.train_epochs not in kept:
        trajectory[-1] = None
    save([trajectory], folder / f"replay_buffer_{number}.pt")
    return lines


def kept_epochs(args):
    """Return the range of the epochs whose snapshots are kept; epoch 0 is the start."""
    first, last = args.keep or (0, args.train_epochs)
    if last > args.train_epochs:
        raise ValueError(f"--keep {first}:{last} ends after --train_epochs {args.train_epochs}: lower LAST or raise "
                         "--train_epochs")
    return range(first, last + 1)


def epoch_range(text):
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of epochs: give FIRST:LAST, for example 5:20")
    return int(first), int(last)


def main(args):
    options.check(args)
    kept = kept_epochs(args)
    run = start_run(args, "buffer")
    train, eval_clips, _ = options.load_splits(args)
    dtype = DTYPES[args.buffer_dtype]
    size = expert_bytes(networks.build(args.network, train.K, train.T, train.size, args.width), len(kept), dtype)
    run.resume()
    check_complete(run.folder, run.iteration)
    run.log_line(f"{args.num_experts} experts of {args.train_epochs} epochs take "
                 f"{args.num_experts * size / 1e9:.2f} GB in {run.folder}")
    check_space(run.folder, (args.num_experts - run.iteration) * size, "a buffer",
                "give another --save_path, fewer --num_experts or --train_epochs, or --buffer_dtype bfloat16")

    # Each rank trains one expert at a time.
    for number in run.iterations(args.num_experts, "experts", "expert", at_once=world_size()):
        if number == args.num_experts:
            break
        experts = range(number, min(number + world_size(), args.num_experts))
        with run.timed_step(len(experts)):
            lines = gather([line for mine in experts[rank():rank() + 1]
                            for line in make_expert(run.folder, mine, train, eval_clips, dtype, args)])
        for line in lines:
            run.log(**line)
        run.checkpoint(experts.stop)

    peak = max(gather([run.update_peak_memory()]))  # largest of all ranks
    if rank() > 0:
        return
    metrics = pd.read_json(run.metrics, lines=True)
    accuracy = metrics[metrics.epoch == args.train_epochs].top1
    run.finish(experts_top1=accuracy.mean(), experts_top1_std=accuracy.std(ddof=0), bytes=args.num_experts * size,
               peak_memory=peak)
    run.log_line(f"result: {args.num_experts} experts of {accuracy.mean():.1f} ± {accuracy.std(ddof=0):.1f} % top1; "
                 f"{run.seconds / max(run.steps, 1):.1f} s per expert with its tests, "
                 f"peak memory {peak / 2 ** 30:.2f} GB; {run.folder}")


def parser():
    parser = options.script_parser(__doc__)
    group = parser.add_argument_group("experts")
    group.add_argument("--num_experts", type=options.positive, default=30,
                       help="number of experts, one file each (%(default)s)")
    group.add_argument("--train_epochs", type=options.positive, default=10,
                       help="training epochs of each expert; matching reads up to epoch max_start_epoch + "
                       "expert_epochs - 1 (%(default)s)")
    group.add_argument("--keep", type=epoch_range, metavar="FIRST:LAST",
                       help="epochs whose snapshots are kept, both included; matching reads min_start_epoch to "
                       "max_start_epoch + expert_epochs - 1 (all)")
    group.add_argument("--lr_teacher", type=options.rate, default=0.01, help="learning rate (%(default)s)")
    group.add_argument("--batch_train", type=options.positive, default=256, help="batch size (%(default)s)")
    group.add_argument("--buffer_dtype", default="float32", choices=DTYPES,
                       help="number format on disk; bfloat16 halves the file size, but its rounding is about as large "
                       "as a few small training steps (%(default)s)")
    options.add_width(group)
    options.add_temporal_options(parser, synthetic=False)
    parser.set_defaults(network="ConvNet3D")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
