"""The evaluation protocol (methods.md 6): train fresh networks on a set, then test each on every test clip once."""
import time

import torch
import torch.nn.functional as F

import networks
from distill_utils.augment import NONE, augment, draw_operators
from distill_utils.clips import draw_flips
from distill_utils.compute import apply_network, clips_at_once
from distill_utils.options import LR_NET
from distill_utils.processes import gather, progress, rank_share
from distill_utils.synset import regression_labels
from distill_utils.temporal import random_segment
from networks.convnet3d import LEAST_FRAMES
from utils import load, random_stream, save


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
        keep: folder for the scores of finished networks, which are not trained again; for this set, these test clips
            and these settings only.

    Several ranks share the networks; all ranks return the same result, except for the seconds.

    Returns a dict of plain values:
        top1, top5: accuracy over clips; video_top1: over videos (logits averaged over a video's clips). Each is the
            mean over networks in percent, with its standard deviation under the name plus `_std`.
        per_class: top-1 of each class in percent.
        confusion: counts of clips, summed over networks; a row for each true class.
        train_top1: top-1 on the set itself in the last training epoch, in percent, with dropout and augmentation, each
            batch before its own step; networks_train_top1: that of each network.
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

    Protocol "standard" (methods.md 6): cross-entropy, SGD with momentum 0.9 and weight decay 5e-4, lr × 0.1 after half
    of the epochs. Protocol "frepo" (methods.md 14): squared error on synset.scores(), AdamW, cosine schedule to zero.
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


def train_epoch(net, synset, optimizer, batch_size, at_once, precision, dsa=NONE, targets=None, segments=1):
    """Train for one epoch in shuffled batches; return the mean loss and top-1 in percent.

    With a `dsa` strategy, a batch is changed by one random choice of it, each video with its own parameters. At most
    `at_once` videos go through the network together. With `targets` (n, K), one for each video of the set, the loss is
    the squared error instead of cross-entropy. With several `segments`, all videos of a batch show the same random one.
    """
    net.train()
    total = correct = 0
    for index in torch.randperm(len(synset)).split(batch_size):
        optimizer.zero_grad()
        draw, frames = draw_operators(dsa, len(index)), None
        for rows in torch.arange(len(index)).split(at_once):
            part = index[rows]
            videos, labels = synset(part)
            if frames is None:  # once for the batch, in however many pieces it is computed
                frames = random_segment(videos.shape[1], segments, LEAST_FRAMES)
            videos = augment(videos[:, frames], draw, rows)
            logits = apply_network(net, videos, precision)
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
        logits.append(apply_network(net, test.draw(index), precision).float().cpu())
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
    """Real training clips with the interface of a synthetic set."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __call__(self, index):
        return (self.clips.draw(index, flip=draw_flips(len(index), self.clips.mirror)),
                self.clips.labels[index].to(self.clips.device))

    def scores(self):
        return regression_labels(self.clips.labels, self.clips.K)

    def frozen(self):
        return self

    def state_dict(self):
        return {}

    def bytes(self):
        """Return the size of the uint8 clips, with each of their frames once."""
        frames = torch.arange(self.clips.T, device=self.clips.device)[self.clips.shown].unique()
        return len(self) * len(frames) * 3 * self.clips.size ** 2

    def bytes_fp32(self):
        return 4 * self.bytes()
