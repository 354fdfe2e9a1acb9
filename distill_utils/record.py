"""Evaluate a run and record it: metrics, the distilled set, its pictures, a checkpoint; at the end, the result."""
import itertools
import shutil

from distill_utils.datasets import DATASETS
from distill_utils.pictures import save_pictures
from distill_utils.processes import broadcast, gather, rank
from distill_utils.protocol import evaluate
from distill_utils.synset import load_set
from utils import json_digest, read_json, save, tensor_digest

ACCURACIES = ("top1", "top1_std", "top5", "top5_std", "video_top1", "video_top1_std")
FIGURES = (*ACCURACIES, "bytes", "bytes_fp32", "seconds_per_iteration", "steps", "peak_memory", "seconds")


def evaluate_and_record(run, synset, clips, matching=None, **values):
    """Evaluate the current set on the Clips `clips`, log the result, and save the set with what `matching` learned.

    `values` are arguments of `evaluate`. After a kill, networks that had finished are not trained again.
    """
    run.checkpoint()  # so that a resumed run evaluates this very set, on a GPU too
    log_and_save(run, synset, clips, evaluate_and_keep(run, synset, clips, **values), matching)
    remove_scores(run)


def evaluate_and_keep(run, synset, clips, **values):
    """Evaluate, and keep the scores of finished networks until `remove_scores`.

    The name of their folder depends on the set and the settings, so no other evaluation finds them.
    """
    content = [values, list(map(tensor_digest, synset.state_dict().values()))]
    return evaluate(synset, clips, **values, keep=run.folder / UNFINISHED / f"{clips.split}_{json_digest(content)[:16]}")


def remove_scores(run):
    if rank() == 0:
        shutil.rmtree(run.folder / UNFINISHED, ignore_errors=True)


def log_and_save(run, synset, clips, result, matching):
    """Log a result; write the set, its pictures and a checkpoint.

    The set with the best accuracy on validation clips also goes to a separate file.
    """
    learned = {"step_size": matching.eval_lr()} if matching and list(matching.parameters()) else {}
    best = log_evaluation(run, clips, result, **learned)
    if warning := matching and matching.warning(result):
        run.log_line(warning)
    if rank() == 0:
        content = {"kind": type(synset).__name__, **synset.content(), "ipc": synset.N, "class_names": clips.class_names,
                   "dataset": clips.dataset, "frames": clips.T, "size": clips.size, "storage": synset.storage,
                   "iteration": run.iteration, "lr": result["lr"], "width": result["width"], **learned}
        save(content, run.folder / "distilled.pt")
        if clips.split == "validation" and best["iteration"] == run.iteration:
            save(content, run.folder / BEST)
        save_pictures(synset, run.folder)
    run.checkpoint()


def log_evaluation(run, clips, result, **learned):
    """Log a result on these Clips, and print it; return the best evaluation so far."""
    headline = DATASETS[clips.dataset].headline
    best = run.keep_best(result[headline], std=result[f"{headline}_std"])
    run.result, run.evaluated = result, run.iteration
    run.log(split=clips.split, loss=run.loss, **learned, refused=run.refused, **logged(result))
    run.log_line(f"iteration {run.iteration}: {on(clips)}{summary(result, headline)}; "
                 f"best on {clips.split} {best['value']:.1f} at iteration {best['iteration']}")
    if warning := learned_too_little(result):
        run.log_line(warning)
    return best


BEST = "best_on_validation.pt"  # the set with the best accuracy on validation clips
UNFINISHED = "unfinished_evaluation"  # folder for the scores of its finished networks


def logged(result):
    """Return what goes into a line of metrics.jsonl: all but the confusion matrix, whose size is K squared."""
    return {name: value for name, value in result.items() if name != "confusion"}


def on(clips):
    return "on validation " if clips.split == "validation" else ""


def summary(result, headline="top1"):
    other = "top5" if headline == "top1" else "top1"
    return (f"{headline} {result[headline]:.1f} ± {result[f'{headline}_std']:.1f} %, {other} {result[other]:.1f} %, "
            f"videos {result['video_top1']:.1f} ± {result['video_top1_std']:.1f} % "
            f"({len(result['networks'])} networks, {result['bytes']:,} bytes, {result['seconds']:.0f} s)")


def learned_too_little(result):
    """Return a warning if a network did not learn half of the set on which it was trained; else None.

    With two classes, a network that always predicts one of them is right for half of the videos, and counts too.
    """
    two = len(result["per_class"]) == 2
    failed = [value for value in result.get("networks_train_top1", []) if value < 50 or two and value == 50]
    if not failed:
        return None
    return (f"warning: {len(failed)} of {len(result['networks'])} networks did not learn the set they were trained on "
            f"({', '.join(f'{value:.0f}' for value in failed)} % of its videos), so the accuracy says little about the "
            "set: lower --lr_net, or raise --epoch_eval_train")


def finish(run, synset, eval_clips, test, **values):
    """Write the run's result: the accuracy on the test Clips at the last iteration (methods.md 6).

    If the evaluations were on validation clips, networks are now trained and tested, with `values` as the arguments of
    `evaluate`: on the current set, and on the best set on validation. Without test Clips there is no result.
    """
    if test is None:
        remove_scores(run)
        return run.log_line(f"not tested: run the same command without --no_test for the result; {run.folder}")
    headline, path = DATASETS[test.dataset].headline, run.folder / "result.json"
    result = broadcast(read_result(path) if rank() == 0 and path.exists() else None)
    if result is None:
        result = ({**run.result, "best_on_test": run.best} if eval_clips.split != "validation"
                  else tested(run, synset, test, **values))
        result |= {"start": run.start, "class_names": test.class_names,
                   "peak_memory": max(gather([run.update_peak_memory()]))}  # largest of all ranks
        run.finish(**result)
    remove_scores(run)
    run.log_line(f"result: {summary(result, headline)}; {run.seconds / max(run.steps, 1):.3f} s per iteration, "
                 f"peak memory {result['peak_memory'] / 2 ** 30:.2f} GB; {run.folder}")
    if warning := learned_too_little(result):
        run.log_line(warning)
    if "best_on_validation" in result:
        best = result["best_on_validation"]
        run.log_line(f"best on validation, at iteration {best['iteration']} "
                     f"({best['value']:.1f} ± {best['std']:.1f} %): "
                     f"{summary(best['test'], headline)}")
    if run.start is not None and run.result[headline] < run.start:
        run.log_line(f"accuracy on {eval_clips.split} fell during learning, from {run.start:.1f} % at the start to "
                     f"{run.result[headline]:.1f} % at the end: lower the learning rates, or use fewer steps")
    if run.refused:
        run.log_line(f"{run.refused} of {run.steps} steps were rolled back because the loss after them was not finite: "
                     "lower the learning rates")


def tested(run, synset, test, **values):
    """Return the result of a run with validation clips, tested at the last and at the best iteration.

    It holds the test figures of the last set; `validation`, the last validation figures; and `best_on_validation`: the
    best iteration, its validation accuracy, and the test figures of its set.
    """
    last = evaluate_and_keep(run, synset, test, **values)
    if run.best["iteration"] == run.iteration:
        best = last
    else:
        chosen, content = load_set(run.folder / BEST)
        best = evaluate_and_keep(run, chosen.to(test.device), test, **values | {"lr": content["lr"]})
    return {**last, "validation": logged(run.result), "best_on_validation": {**run.best, "test": logged(best)}}


# ---------------------------------------------------------------- results in files

def read_result(path):
    """Read result.json: FIGURES, per_class, class_names, confusion or None, networks; None for a buffer of experts.

    Values that older versions did not write are filled in. ValueError if a figure is not a number, or if the number of
    classes is inconsistent.
    """
    result = read_json(path)
    try:
        if "experts_top1" in result:
            return None
        result = {"bytes": result.get("storage"), "bytes_fp32": result.get("storage"), "networks": [],
                  "confusion": None, **result}  # older versions stored fp32 only
        classes = len(result["per_class"])
        result["class_names"] = result.get("class_names") or [f"class {number}" for number in range(classes)]
        rows = [result["per_class"], *(result["confusion"] or ())]
        best = result.get("best_on_validation") or {"iteration": 0, "value": 0, "std": 0, "test": result}
        figures = ([result[name] for name in FIGURES if name != "seconds_per_iteration"],
                   [result["seconds_per_iteration"] or 0], result["networks"],
                   result.get("networks_train_top1", []), *rows,
                   [best[name] for name in ("iteration", "value", "std")],
                   [best["test"][name] for name in ACCURACIES])
        for value in itertools.chain(*figures):
            check_figure(value)
        if (not all(len(row) == classes for row in rows) or len(rows) not in (1, classes + 1)
                or list(map(type, result["class_names"])) != [str] * classes):
            raise TypeError("the numbers of classes are inconsistent")
        return result
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of these scripts ({type(error).__name__}: {error})") from None


def check_figure(value):
    """Return the value if it is nan or a number from 0 to 1e38 (which a plot can show); else TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value > 1e38:
        raise TypeError(f"{value!r} is not a figure")
    return value
