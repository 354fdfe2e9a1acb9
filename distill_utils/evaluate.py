"""The evaluation protocol (METHOD 6): train fresh networks on a set, then test each on every test clip once.

As a program, evaluates the full training set (the upper bound of every table), or a distilled set with several
networks:

    bash sh/baseline/full.sh GPU DATASET
    python -m distill_utils.evaluate RUN --networks ConvNet3D,CNN+GRU,r3d_18
"""
import argparse
import json
import pathlib
import shutil
import time

import pandas as pd
import torch
import torch.nn.functional as F

import networks
from distill_utils.augment import NONE, augment_each
from distill_utils.clips import draw_flips
from distill_utils.compute import autocast, clips_at_once
from distill_utils.datasets import DATASETS
from distill_utils.identity import (
    DATA_PATHS,
    check_places,
    content_digest,
    digest,
    file_fingerprint,
    list_digest,
    start_run,
)
from distill_utils.options import (
    LR_NET,
    add_evaluation_options,
    check,
    evaluation_values,
    load_data,
    load_splits,
    positive,
    script_parser,
)
from distill_utils.processes import broadcast, error_line, gather, progress, rank, rank_share, run_script
from distill_utils.record import ACCURACIES, check_figure, finish, logged
from distill_utils.run import read_config
from distill_utils.synset import load_set, regression_labels
from distill_utils.temporal import random_segment
from networks.convnet3d import LEAST_FRAMES
from utils import load, random_stream, read_json, save, save_json, seed_everything


def evaluate(synset, test, *, network="ConvNet3D", num_eval=3, epochs=500, lr=LR_NET, batch_size=256, seed=0,
             precision="fp32", width=networks.WIDTH, compile=False, dsa=NONE, protocol="standard", keep=None) -> dict:
    """Train `num_eval` fresh networks on the set, test them, and return the result as a dict.

    Args:
        synset: a synthetic set, or RealSet; its videos are drawn again in each epoch.
        test: the test Clips.
        seed: seed of the evaluation's own random stream; the run's random state is unchanged afterwards.
        width: width of ConvNet3D.
        dsa: augmentation strategy for the drawn videos of the set; test clips are not augmented.
        protocol: "standard" or "frepo", see `train`.
        keep: folder for the scores of finished networks, which are not trained again after a kill; for this set, these
            test clips and settings only.

    Several ranks share the networks; all ranks return the same result, except for the seconds.

    Returns a dict of plain values:
        top1, top5: accuracy over clips; video_top1: over videos (logits averaged over a video's clips). Each is the
            mean over networks in percent, with its standard deviation under the name plus `_std`.
        per_class: top-1 of each class in percent.
        confusion: counts of clips, summed over networks; a row for each true class.
        train_top1: top-1 on the set itself, in percent; networks_train_top1: that of each network.
        networks: top1 of each network.
        bytes: size of the set as stored; bytes_fp32: at 32 bits per value.
        lr, width: as given. seconds: duration.
    """
    start, at_once = time.perf_counter(), networks.clips_together(
        network, clips_at_once(test.T, test.size, test.device, width if network == "ConvNet3D" else networks.WIDTH))
    frozen, scores = synset.frozen(), []
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    with progress(total=len(rank_share(num_eval)) * epochs, desc="evaluating", unit="epoch", leave=False) as bar:
        for number in rank_share(num_eval):
            path, begin = keep and keep / f"network{number}.pt", time.perf_counter()
            if path and path.exists():
                scores.append(load(path))
                start -= scores[-1]["seconds"]
                bar.update(epochs)
                continue
            with random_stream((seed * 1000 + 1 + number) % 2 ** 64):
                net = networks.build(network, test.K, test.T, test.size, width, compile).to(test.device)
                train_top1 = train(net, frozen, epochs, lr, batch_size, at_once, precision, bar, dsa, protocol)
            scores.append({**score(predict(net, test, at_once, precision), test), "train_top1": train_top1,
                           "seconds": time.perf_counter() - begin})
            if path:
                save(scores[-1], path)
    result, scores = {}, gather(scores)
    for name in ("top1", "top5", "video_top1"):
        values = torch.tensor([each[name] for each in scores], dtype=torch.float64)
        result |= {name: values.mean().item(), f"{name}_std": values.std(correction=0).item()}
    result["per_class"] = torch.stack([each["per_class"] for each in scores]).mean(0).tolist()
    result["confusion"] = torch.stack([each["confusion"] for each in scores]).sum(0).tolist()
    result |= {"networks": [each["top1"] for each in scores],
               "networks_train_top1": [each["train_top1"] for each in scores]}
    result["train_top1"] = sum(result["networks_train_top1"]) / num_eval
    return {**result, "bytes": synset.bytes(), "bytes_fp32": synset.bytes_fp32(), "lr": lr, "width": width,
            "seconds": time.perf_counter() - start}


def train(net, synset, epochs, lr, batch_size, at_once, precision, bar, dsa=NONE, protocol="standard") -> float:
    """Train a network on the set; return its top-1 on the set in the last epoch, in percent.

    Protocol "standard" (METHOD 6): cross-entropy, SGD with momentum 0.9 and weight decay 5e-4, lr × 0.1 after half of
    the epochs. Protocol "frepo" (METHOD 14): squared error on synset.scores(), AdamW, cosine schedule to zero.
    """
    if protocol == "frepo":
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        targets = synset.scores().detach()
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, epochs // 2)])
        targets = None
    for _ in range(epochs):
        _, top1 = train_epoch(net, synset, optimizer, batch_size, at_once, precision, dsa, targets)
        schedule.step()
        bar.update()
    return top1


def train_epoch(net, synset, optimizer, batch_size, at_once, precision, dsa=NONE, targets=None):
    """Train for one epoch in shuffled batches; return the mean loss and top-1 in percent.

    Each video is augmented independently. At most `at_once` videos go through the network together. With
    `targets` (n, K), one for each video of the set, the loss is the squared error instead of cross-entropy.
    """
    net.train()
    total = correct = 0
    for index in torch.randperm(len(synset)).split(batch_size):
        optimizer.zero_grad()
        for part in index.split(at_once):
            videos, labels = synset(part)
            videos = augment_each(videos, dsa)
            with autocast(videos.device, precision):
                logits = net(videos).float()
            if targets is not None:
                loss = F.mse_loss(logits, targets[part].to(logits), reduction="sum")
            else:
                loss = F.cross_entropy(logits, labels, reduction="sum")
            # Weight the part by its share of the batch, so that the parts' gradients add up to the batch gradient.
            # (Not with batch normalisation, which sees only one part at a time.)
            (loss / len(index)).backward()
            total, correct = (total + loss.detach(),
                              correct + (logits.argmax(1) == classes(labels)).sum())
        optimizer.step()
    return float(total) / len(synset), 100 * float(correct) / len(synset)


def classes(labels):
    """Return the classes (B,) of labels (B,) or of soft labels (B, K)."""
    return labels if labels.dim() == 1 else labels.argmax(1)


@torch.inference_mode()
def predict(net, test, at_once, precision="fp32") -> torch.Tensor:
    """Return the logits (n, K) of all test clips, float32 on the CPU; `at_once` clips go through together."""
    net.eval()
    logits = []
    for index in torch.arange(len(test)).split(at_once):
        with autocast(test.device, precision):
            logits.append(net(test.draw(index)).float().cpu())
    return torch.cat(logits)


def score(logits, test) -> dict:
    """Return a dict of accuracies in percent, and the confusion matrix.

    top1, top5: over clips. video_top1: over videos. per_class: top-1 of each class; nan for a class without test clips.
    confusion: number of clips of each class (rows) that are predicted as each class (columns).
    """
    labels, videos = test.labels, test.videos
    predicted = logits.argmax(1)  # not topk's first, which may be another one of equal logits
    hits = predicted == labels
    among_five = hits | (logits.topk(min(5, test.K)).indices == labels[:, None]).any(1)
    counts = torch.bincount(labels, minlength=test.K)
    sums = torch.zeros(int(videos.max()) + 1, test.K).index_add_(0, videos, logits)
    video_labels = torch.zeros(len(sums), dtype=torch.long).index_copy_(0, videos, labels)
    return {"top1": 100 * hits.double().mean().item(), "top5": 100 * among_five.double().mean().item(),
            "video_top1": 100 * (sums.argmax(1) == video_labels).double().mean().item(),
            "confusion": torch.bincount(labels * test.K + predicted, minlength=test.K ** 2).view(test.K, test.K),
            "per_class": 100 * torch.bincount(labels[hits], minlength=test.K) / counts}


class RealSet:
    """Real training clips with the interface of a synthetic set.

    With several segments, all clips of one call show the same random segment.
    """

    def __init__(self, clips, segments=1):
        self.clips, self.segments = clips, segments

    def __len__(self):
        return len(self.clips)

    def __call__(self, index):
        clips = self.clips.draw(index, flip=draw_flips(len(index), self.clips.mirror))
        return (clips[:, random_segment(clips.shape[1], self.segments, LEAST_FRAMES)],
                self.clips.labels[index].to(self.clips.device))

    def scores(self):
        return regression_labels(self.clips.labels, self.clips.K)

    def frozen(self):
        return self

    def bytes(self):
        """Return the size of the uint8 clips, with each of their frames once."""
        frames = torch.arange(self.clips.T, device=self.clips.device)[self.clips.shown].unique()
        return len(self) * len(frames) * 3 * self.clips.size ** 2

    def bytes_fp32(self):
        return 4 * self.bytes()


# ---------------------------------------------------------------- as a program

def main(args):
    if args.run and not args.run.exists():
        raise ValueError(f"{args.run} does not exist")
    if not args.dataset:
        raise ValueError("a set's file needs --dataset and the other data flags"
                         if args.run else "give a RUN, or --dataset for the full training set")
    if args.run and args.n_real or args.networks and not args.run:
        raise ValueError("--n_real applies only to the full set, and --networks only to a RUN: leave out the flag that "
                         "does not apply")
    if args.run and args.no_test:
        raise ValueError("--no_test does not apply to a RUN, whose set is evaluated on the test videos: leave it out")
    check(args, networks=args.networks)
    if args.run:
        across_networks(args)
    else:
        full_data(args)


def full_data(args):
    """Evaluate the full training set; with --n_real, training and test clips keep only that many frames."""
    run = start_run(args, "full" if args.n_real is None else f"full_{args.n_real}frames")
    seed_everything(args.seed)
    train_clips, eval_clips, test = (clips and clips.reduced(args.n_real) for clips in load_splits(args))
    synset, values = RealSet(train_clips), evaluation_values(args, LR_NET)
    keep = run.folder / "scores"  # a network of a large data set takes hours
    run.resume()
    if run.result is None:
        run.result = evaluate(synset, eval_clips, **values, keep=keep / eval_clips.split)
        headline = DATASETS[args.dataset].headline
        run.keep_best(run.result[headline], std=run.result[f"{headline}_std"])
        run.log(split=eval_clips.split, **logged(run.result))
        run.checkpoint()
    finish(run, synset, eval_clips, test, **values, keep=keep / "test")
    if rank() == 0:
        shutil.rmtree(keep, ignore_errors=True)


def across_networks(args):
    """Evaluate a distilled set with several networks, and print a table.

    The results are added to networks.json beside the set; networks that are already there, with the same settings, are
    not trained again.
    """
    check_places(args)
    synset, content = load_set(args.run)
    test = load_data(args, "test")
    if (content["class_names"] != test.class_names
            or synset.of_class(0).shape[1:] != (test.T, 3, test.size, test.size)):
        raise ValueError(f"{args.run} and the test clips differ in classes, number of frames or size: give the data "
                         "flags of its run")
    path, file = ((args.run / "networks.json", args.run / "distilled.pt") if args.run.is_dir()
                  else (args.run.with_suffix(".networks.json"), args.run))
    if args.run.is_dir() and (args.run / "config.json").exists():
        steps, total = content.get("iteration"), read_config(args.run / "config.json")["settings"].get("Iteration")
        if isinstance(steps, int) and isinstance(total, int) and steps < total:
            print(f"{args.run} is not finished: this is its set after {steps} of {total} iterations")
    clips = {"set": digest([file_fingerprint(file)]), "list": list_digest(args), "content": content_digest(args),
             "test_clips": args.test_clips, "stride": args.stride}
    rows = []
    for name in args.networks or [args.network]:
        values = evaluation_values(args, content["lr"]) | {"network": name}
        done, settings = broadcast(read_networks(path) if rank() == 0 else None), values | clips
        result = next((each for each in done.values() if each.get("settings") == settings), None)
        if result is None:
            if rank() == 0 and not path.exists():
                save_json({}, path)  # an error now, before hours of training, if nothing can be written there
            result = {"settings": settings, **evaluate(synset.to(test.device), test, **values)}
            if rank() == 0:  # read again: another command may have added results
                key = digest([json.dumps(settings, sort_keys=True).encode()])[:8]
                save_json(read_networks(path) | {f"{name}_{key}": result}, path)
        rows.append({"network": name,
                     **{top: f"{result[top]:.1f} ± {result[top + '_std']:.1f}"
                        for top in ("top1", "top5", "video_top1")},
                     "train top1": f"{result['train_top1']:.1f}", "seconds": f"{result['seconds']:.0f}"})
    print(pd.DataFrame(rows).to_string(index=False))
    print(f"all figures: {path}")


def read_networks(path):
    """Return {network and a hash of its settings: result} from a networks.json; ValueError if it is damaged."""
    try:
        done = read_json(path) if path.exists() else {}
        for result in done.values():
            for name in (*ACCURACIES, "train_top1", "seconds"):
                check_figure(result[name])
        return done
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: delete it, and its networks are trained again "
                         f"({type(error).__name__}: {error})") from None


class RunParser(argparse.ArgumentParser):
    """A parser in which the settings of RUN are the defaults of the other flags."""

    TAKEN = ("dataset", *DATA_PATHS, "frame_names", "frames", "size", "stride", "train_clips", "test_clips", "seed",
             "precision", "validation", "network", "num_eval", "epoch_eval_train", "lr_net", "batch_train", "width",
             "dsa", "eval_protocol")

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        if found.run is None or not (found.run / "config.json").is_file():
            return found, rest
        flags = {flag.dest: flag for flag in self._actions}
        try:
            settings = read_config(found.run / "config.json")["settings"]
            self.set_defaults(**{name: taken(flags[name], settings[name]) for name in self.TAKEN
                                 if settings.get(name) is not None})
        except (ValueError, OSError, argparse.ArgumentTypeError) as error:
            self.error(f"{found.run / 'config.json'}: {error_line(error)}")
        return super().parse_known_args(args, namespace)  # again: now with these defaults


def taken(flag, value):
    """Return a setting, parsed as if it were given on the command line for this flag."""
    value = (flag.type or str)(str(value))
    if flag.choices and value not in flag.choices:
        raise ValueError(f"--{flag.dest} {value!r} is unknown: choose one of {', '.join(flag.choices)}")
    return value


def network_names(text):
    names = text.split(",")
    for name in names:
        if name not in networks.NETWORKS:
            raise argparse.ArgumentTypeError(f"unknown network {name!r}: choose from {', '.join(networks.NETWORKS)}")
    return names


def parser():
    parser = script_parser(__doc__, dataset="optional", prog="evaluate", kind=RunParser)
    add_evaluation_options(parser, lr_net=None)
    group = parser.add_argument_group("what is evaluated")
    group.add_argument("run", nargs="?", type=pathlib.Path, metavar="RUN",
                       help="run folder of a finished run, whose settings become the defaults, or the file of a set "
                       "(default: the full training set)")
    group.add_argument("--networks", type=network_names, metavar="A,B",
                       help=f"networks to train on the set of RUN, from {', '.join(networks.NETWORKS)} (--network)")
    group.add_argument("--n_real", type=positive,
                       help="full set only: keep this many frames of each clip, in training and testing (all)")
    return parser


if __name__ == "__main__":
    run_script(main, parser())
