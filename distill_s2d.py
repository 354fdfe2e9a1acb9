"""Static-dynamic disentanglement: motion is compensated on top of a static memory (Wang et al. CVPR 2024, arXiv 2312.00362, METHOD 3 and 5).

The static memory S of distill_DC.py stays frozen; the dynamic memory D and the hallucinator H are learned by a matching: x = H(S, D).

    bash sh/s2d/DM.sh GPU DATASET LR IPC
"""
import argparse
import pathlib
import shlex

import torch

from distill_DM import DistributionMatching
from distill_utils.evaluate import evaluate
from distill_utils import options
from distill_utils.record import finish, record
from distill_utils.synset import StaticDynamicSet, check_divides, initial_dynamic, load_static
from networks import Hallucinator
from utils import load, read_config, run_script, seed_everything

METHODS = {"DM": DistributionMatching}


def find_static(args, spc):
    """The static memory that distill_DC.py made of the same data with as many frames per class."""
    folder = args.save_path / options.dataset_label(args)
    same = ("data_path", "list_path", "frames_path", "size", "stride", "train_clips", "seed")
    wanted = {name: str(value.resolve()) if isinstance(value := getattr(args, name), pathlib.Path) else value for name in same}
    found = [path.parent / "distilled.pt" for path in sorted(folder.glob(f"DC_spc{spc}_*/result.json"))
             if wanted.items() <= read_config(path.parent / "config.json")["settings"].items()]
    if not found:
        command = ["bash", "sh/s2d/DC.sh", "GPU", args.dataset, str(spc)]
        for name in (*same, "save_path"):
            if getattr(args, name) != parser().get_default(name):
                command += [f"--{name}", str(getattr(args, name))]
        raise ValueError(f"no finished static memory of {spc} frames per class for these data in {folder}: "
                         f"run `{shlex.join(command)}` first, or give --path_static")
    if len(found) > 1:
        raise ValueError(f"several static memories fit: choose one by --path_static: {', '.join(map(str, found))}")
    return found[0]


def main(args):
    spc, dpc = args.spc or 2 * args.ipc, args.dpc or 2 * args.ipc
    check_divides(args.ipc, spc=spc, dpc=dpc)
    device = options.check(args, dpc if args.init_dynamic == "residual" else 1)
    args.path_static = args.path_static or find_static(args, spc)
    load(args.path_static)  # refuses what is no file of tensors
    run = options.start_run(args, f"s2d_{args.method}_ipc{args.ipc}_lr{args.lr_dynamic:g}", args.path_static)
    seed_everything(args.seed)

    # Real clips; the static memory, and the dynamic memory and hallucinator that are to move it.
    train, test = options.load_data(args, "train"), options.load_data(args, "test")
    static = load_static(args.path_static, train.K, spc, train.size)
    dynamic = initial_dynamic(train, static, args.ipc, dpc, args.init_dynamic)
    synset = StaticDynamicSet(static, dynamic, Hallucinator(args.init_hal), args.ipc).to(device)
    matching = METHODS[args.method](train, args.batch_real, args.precision)
    groups = synset.param_groups(args.lr_dynamic, args.lr_hal, args.lr_static if args.train_static else 0.0)
    optimizer = torch.optim.SGD(groups, momentum=0.95)
    run.resume(synset=synset, optimizer=optimizer)

    for _ in run.iterations(args.Iteration):
        if run.due(args.eval_it, args.Iteration):
            record(run, synset, test, evaluate(synset, test, **options.evaluation_values(args)))
        if run.iteration == args.Iteration:
            break
        run.step(lambda: matching(synset), optimizer)
    finish(run, test)


def parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_run_options(parser)
    options.add_data_options(parser)
    options.add_evaluation_options(parser, eval_it=400)
    options.add_distillation_options(parser)
    group = parser.add_argument_group("static-dynamic disentanglement")
    group.add_argument("--method", default="DM", choices=METHODS, help="the matching (%(default)s)")
    group.add_argument("--spc", type=options.positive, help="static memories per class (2·ipc)")
    group.add_argument("--dpc", type=options.positive, help="dynamic memories per class (2·ipc)")
    group.add_argument("--path_static", type=pathlib.Path, help="static memory file (the one that sh/s2d/DC.sh made for the same data and spc)")
    group.add_argument("--lr_dynamic", type=options.rate, default=1e-4, help="learning rate of the dynamic memory (%(default)s)")
    group.add_argument("--lr_hal", type=options.rate, default=1e-5, help="learning rate of the hallucinator (%(default)s)")
    group.add_argument("--train_static", action="store_true", help="learn the static memory too")
    group.add_argument("--lr_static", type=options.rate, default=1.0, help="its learning rate then (%(default)s)")
    group.add_argument("--init_dynamic", default="noise", choices=("noise", "residual"),
                       help="N(0, 1), or the grey difference between a real clip's frames and the static memory (%(default)s)")
    group.add_argument("--init_hal", default="random", choices=("random", "identity"),
                       help="PyTorch's, or static plus dynamic memory on all three channels (%(default)s)")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
