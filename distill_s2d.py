"""Static-dynamic disentanglement: learn motion on top of a static memory.

Wang et al., CVPR 2024, arXiv 2312.00362, methods.md 3 and 5. The static memory S of distill_DC.py stays frozen. A
matching learns the dynamic memory D and the hallucinator H: x = H(S, D).

    bash sh/s2d/DM.sh GPU DATASET LR IPC; bash sh/s2d/MTT.sh GPU DATASET LR IPC; bash sh/s2d/FRePo.sh GPU DATASET LR IPC
"""
import argparse
import pathlib

import distill_DM
import distill_FRePo
import distill_MTT
from distill_utils import budget, options
from distill_utils.coreset import add_start_options, choose
from distill_utils.identity import differing_settings, find_run, start_run
from distill_utils.last_good import LastGood
from distill_utils.processes import run_script
from distill_utils.record import evaluate_and_record, finish
from distill_utils.run import read_config
from distill_utils.starts import initial_dynamic, real_memories
from distill_utils.synset import StaticDynamicSet, check_divides, load_static
from networks import Hallucinator
from utils import load, seed_everything

METHODS = {"DM": distill_DM, "MTT": distill_MTT, "FRePo": distill_FRePo}


def memory_counts(args):
    """Return the numbers of static and dynamic memories per class, spc and dpc; their default is the paper's, 2·ipc."""
    return args.spc or 2 * args.ipc, args.dpc or 2 * args.ipc


def find_static(args):
    """Return the file of the static memory that distill_DC.py learned from the same data, of as many frames."""
    spc, _ = memory_counts(args)
    same = ("data_path", "list_path", "frames_path", "frame_names", "size", "stride", "train_clips", "seed",
            "validation", "static_size", "mirror", "dsa")
    folder = find_run(args, f"DC_spc{spc}", same, f"static memory of {spc} frames per class",
                      ["bash", "sh/s2d/DC.sh", "GPU", args.dataset, str(spc)], "--path_static")
    return folder / "distilled.pt"


def check_static(args):
    """ValueError if --path_static does not fit, or is of an unfinished run or of other training videos."""
    config, content = args.path_static.with_name("config.json"), load(args.path_static)
    load_static(args.path_static, len(options.list_videos(args)[1]), memory_counts(args)[0], static_side(args))
    if not config.exists() or not isinstance(content, dict) or "iteration" not in content:
        return  # not a file of distill_DC.py in its run folder
    if other := differing_settings(args, config.parent, ("size", "static_size", "validation")):
        raise ValueError(f"the static memory {args.path_static} was learned with a different {' and '.join(other)}: "
                         "give the same settings, or another --path_static")
    total = read_config(config)["settings"]["Iteration"]
    if args.path_static.name == "distilled.pt" and content["iteration"] < total:
        raise ValueError(f"the static memory {args.path_static} has learned {content['iteration']} of {total} "
                         "iterations: repeat the command of distill_DC.py, which resumes")


def static_side(args):
    return args.static_size or options.clip_shape(args)[1]


def check_effect(args):
    """ValueError for a flag that has no effect beside the others."""
    chooses = args.static == "real" or args.init_dynamic == "motion"
    if args.select != "random" and not chooses:
        raise ValueError(f"--select {args.select} has no effect here: use it with --static real or --init_dynamic "
                         "motion, whose clips it chooses")
    needed = {"path_static": "--static DC"} if args.static == "real" else {"static_frame": "--static real"}
    if not args.train_static:
        needed["lr_static"] = "--train_static"
    if args.select == "random":
        select = "--select herding or k-center" if chooses else "--static real and --select herding or k-center"
        needed |= dict.fromkeys(("feature_epochs", "feature_lr", "feature_batch"), select)
    flags = {method: matching_flags(method) for method in METHODS}
    for flag in sorted(set().union(*flags.values()) - flags[args.method]):
        needed[flag] = f"--method {' or '.join(method for method in METHODS if flag in flags[method])}"
    options.check_effect(args, parser(), needed)


def matching_flags(method) -> set[str]:
    part = argparse.ArgumentParser()
    METHODS[method].add_matching_options(part)
    return set(vars(part.parse_args([])))


def clips_needed(args):
    """Return the number of real clips per class that the memories start from."""
    if args.static == "real":
        return max(memory_counts(args))
    return 1 if args.init_dynamic == "noise" else memory_counts(args)[1]


def initial_memories(run, args, clips):
    """Return the start of the static memory (K, spc, 3, h, h) and of the dynamic memory (K, dpc, n, 1, h', h').

    The static memory comes from distill_DC.py or from real clips.
    """
    (spc, dpc), compact = memory_counts(args), (args.dynamic_frames, args.dynamic_size)
    chosen = (None if args.static == "DC" and args.init_dynamic != "motion"
              else choose(run, args, clips, clips_needed(args), args.select))
    if args.static == "DC":
        static = load_static(args.path_static, clips.K, spc, static_side(args))
    else:
        static, residual = real_memories(clips, chosen, args.ipc, spc, dpc, args.static_frame, args.static_size,
                                         *compact)
        if args.init_dynamic == "residual":
            return static, residual
        chosen = chosen.unflatten(0, (clips.K, args.ipc, -1))[:, :, :dpc // args.ipc].flatten()
    return static, initial_dynamic(clips, static, args.ipc, dpc, args.init_dynamic, *compact, chosen)


def main(args):
    check_effect(args)
    options.apply_byte_budget(args, budget.static_dynamic, "static_size", "dynamic_size", "dynamic_frames", "storage",
                  *(["learn_label"] if args.method == "FRePo" else []))
    if args.static == "real":  # several memories per video would pair one clip's picture with another's motion
        args.spc, args.dpc = args.spc or args.ipc, args.dpc or args.ipc
    spc, dpc = memory_counts(args)
    check_divides(args.ipc, spc=spc, dpc=dpc)
    device = options.check(args, clips_needed(args), convnet3d=True)
    files = METHODS[args.method].prepare(args)
    if args.static == "DC":
        if args.path_static is None:
            args.path_static = find_static(args)
            stored = read_config(args.path_static.with_name("config.json"))["settings"].get("storage", "fp32")
            print(f"static memory: {args.path_static}, stored as {stored}")
        if args.path_static.is_dir():
            args.path_static = args.path_static / "distilled.pt"
        check_static(args)
        files = [args.path_static, *files]
    run = start_run(args, f"s2d_{args.method}_ipc{args.ipc}_lr{args.lr_dynamic:g}", *files)
    seed_everything(args.seed)

    # Real clips; the static memory; and the dynamic memory and hallucinator, which are learned.
    train, eval_clips, test = options.load_splits(args)
    static, dynamic = initial_memories(run, args, train)
    synset = StaticDynamicSet(static, dynamic, Hallucinator(args.init_hal), args.ipc, train.T, train.size,
                              args.storage).to(device)
    matching = METHODS[args.method].make_matching(args, train)
    del train  # MTT keeps none of the clips, which may take gigabytes
    groups = synset.param_groups(args.lr_dynamic, args.lr_hal, args.lr_static if args.train_static else 0.0)
    groups.append({"params": list(matching.parameters()), "lr": args.lr_lr, "momentum": 0.5})
    optimizer = METHODS[args.method].make_optimizer(args, synset, groups, momentum=0.95)
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
    options.add_evaluation_options(parser, eval_it=400, lr_net=None)
    options.add_distillation_options(parser, 5000)
    group = parser.add_argument_group("static-dynamic disentanglement")
    group.add_argument("--method", default="DM", choices=METHODS, help="matching method (%(default)s)")
    group.add_argument("--spc", type=options.positive,
                       help="static memories per class (2·ipc; ipc with --static real)")
    group.add_argument("--dpc", type=options.positive,
                       help="dynamic memories per class (2·ipc; ipc with --static real)")
    group.add_argument("--static", default="DC", choices=("DC", "real"),
                       help="source of the static memory. DC: learned by distill_DC.py. real: frames of the real clips "
                       "that --select chooses; with --init_dynamic residual or motion, and as many static and dynamic "
                       "memories as videos, each is moved by its own clip (%(default)s)")
    group.add_argument("--static_frame", default="mean", choices=("mean", "middle"),
                       help="frame of a real clip used with --static real (%(default)s)")
    group.add_argument("--path_static", type=pathlib.Path,
                       help="run folder or file of the static memory (that of sh/s2d/DC.sh for the same data and spc)")
    options.add_static_size(group)
    group.add_argument("--dynamic_frames", type=options.positive, metavar="N",
                       help="frames of a stored dynamic memory; it is stretched linearly to --frames when used "
                       "(--frames)")
    group.add_argument("--dynamic_size", type=options.positive, metavar="S",
                       help="height and width of a stored dynamic memory in pixels; it is enlarged bilinearly to "
                       "--size when used (--size)")
    options.add_storage(group)
    options.add_bytes(group, "--ipc, --spc and --dpc (and --static_size, --dynamic_size and --dynamic_frames if not "
                      "given)")
    group.add_argument("--lr_dynamic", type=options.rate, default=1e-4,
                       help="learning rate of the dynamic memory (%(default)s)")
    group.add_argument("--lr_hal", type=options.rate, default=1e-5,
                       help="learning rate of the hallucinator (%(default)s)")
    group.add_argument("--train_static", action="store_true", help="learn the static memory too")
    group.add_argument("--lr_static", type=options.rate, default=1.0,
                       help="learning rate of the static memory with --train_static (%(default)s)")
    group.add_argument("--init_dynamic", default="noise", choices=("noise", "residual", "motion"),
                       help="start of the dynamic memory. noise: N(0, 1). residual: grey difference between a real "
                       "clip's frames and the static memory. motion: grey difference between a real clip's frames and "
                       "their own mean, which leaves out the clip's background (%(default)s)")
    group.add_argument("--init_hal", default="random", choices=("random", "identity"),
                       help="start of the hallucinator. random: PyTorch's default. identity: static plus dynamic "
                       "memory, on all three channels (%(default)s)")
    add_start_options(parser)
    parser.conflict_handler = "resolve"  # methods may share a flag of the same default: the last one counts
    for method in METHODS.values():
        method.add_matching_options(parser)
    parser.set_defaults(n_real=None, segments=1)  # temporal compression is studied on the baselines only
    return parser


if __name__ == "__main__":
    run_script(main, parser())
