"""What a run keeps of an evaluation: metrics, the distilled set, its pictures, a checkpoint, and at the end its result."""
import itertools

from distill_utils.datasets import DATASETS
from distill_utils.pictures import save_pictures
from distill_utils.processes import broadcast, gather, rank
from distill_utils.synset import load_set
from utils import peak_memory, read_json, save

FIGURES = ("top1", "top1_std", "top5", "top5_std", "video_top1", "video_top1_std", "bytes", "bytes_fp32", "seconds_per_iteration", "steps", "peak_memory", "seconds")


def record(run, synset, seen, result, matching=None):
    """Log the evaluation `result` of the run's iteration on the Clips `seen` and write the set as it is now, with what the matching learned beside it.

    The set that is best on validation clips has a file of its own.
    """
    learned = {"step_size": matching.eval_lr()} if matching and list(matching.parameters()) else {}
    headline = DATASETS[seen.dataset].headline
    best = run.keep_best(result[headline], std=result[f"{headline}_std"])
    run.evaluated = run.iteration
    run.log(split=seen.split, loss=run.loss, **learned, refused=run.refused, **logged(result))
    run.say(f"iteration {run.iteration}: {on(seen)}{summary(result, headline)}; best on {seen.split} {best['value']:.1f} at iteration {best['iteration']}")
    if matching and (warning := matching.warning(result)):
        run.say(warning)
    if rank() == 0:
        content = {"kind": type(synset).__name__, **synset.content(), "ipc": synset.N, "class_names": seen.class_names, "dataset": seen.dataset,
                   "frames": seen.T, "size": seen.size, "storage": synset.storage, "iteration": run.iteration, "lr": result["lr"], "width": result["width"], **learned}
        save(content, run.folder / "distilled.pt")
        if seen.split == "validation" and best["iteration"] == run.iteration:
            save(content, run.folder / BEST)
        save_pictures(synset, run.folder)
    run.result = result
    run.checkpoint()


BEST = "best_on_validation.pt"  # the set at its best evaluation on validation clips


def logged(result):
    """Of an evaluation, what every line of metrics holds: all but the confusion matrix, which grows with the square of the classes."""
    return {name: value for name, value in result.items() if name != "confusion"}


def on(clips):
    return "on validation " if clips.split == "validation" else ""


def summary(result, headline="top1"):
    other = "top5" if headline == "top1" else "top1"
    return (f"{headline} {result[headline]:.1f} ± {result[f'{headline}_std']:.1f} %, {other} {result[other]:.1f} %, "
            f"videos {result['video_top1']:.1f} ± {result['video_top1_std']:.1f} % ({len(result['networks'])} networks, "
            f"{result['bytes']:,} bytes, {result['seconds']:.0f} s)")


def finish(run, synset, seen, test, **values):
    """Write the run's result: the accuracy on the test Clips at its last iteration (METHOD 6).

    Where evaluations along the way were on validation clips, networks are trained by `values`, those of `evaluate`, and tested now: on the set as it
    is, and on the one that was best on validation. Without test Clips there is no result.
    """
    if test is None:
        return run.say(f"not tested: the same command without --no_test adds the result; {run.folder}")
    headline, path = DATASETS[test.dataset].headline, run.folder / "result.json"
    result = broadcast(read_result(path) if rank() == 0 and path.exists() else None)
    if result is None:
        result = {**run.result, "best_on_test": run.best} if seen.split != "validation" else tested(run, synset, test, **values)
        result |= {"start": run.start, "class_names": test.class_names, "peak_memory": max(gather([peak_memory(test.device)]))}  # of one process
        run.finish(**result)
    run.say(f"result: {summary(result, headline)}; {run.seconds / max(run.steps, 1):.3f} s per iteration, "
            f"peak memory {result['peak_memory'] / 2 ** 30:.2f} GB; {run.folder}")
    if "best_on_validation" in result:
        best = result["best_on_validation"]
        run.say(f"at iteration {best['iteration']}, the best on validation ({best['value']:.1f} ± {best['std']:.1f} %): {summary(best['test'], headline)}")
    last = run.result[headline] if run.result else None
    if run.start is not None and last is not None and last < run.start:
        run.say(f"learning lost accuracy on {seen.split}: {run.start:.1f} % at the start, {last:.1f} % at the end; lower the learning rates, or use fewer steps")
    if run.refused:
        run.say(f"{run.refused} of {run.steps} steps were taken back because the loss after them was not finite: lower the learning rates")


def tested(run, synset, test, **values):
    """The result of a run with validation clips: figures of the set at the last iteration on the test Clips; `validation`, the last figures there; and
    `best_on_validation`, with the iteration, its value there and the figures on the test Clips of that iteration's set."""
    from distill_utils.evaluate import evaluate  # its program is a run that ends here

    last = evaluate(synset, test, **values)
    if run.best["iteration"] == run.iteration:
        best = last
    else:
        chosen, content = load_set(run.folder / BEST)
        best = evaluate(chosen.to(test.device), test, **values | {"lr": content["lr"]})
    return {**last, "validation": logged(run.result), "best_on_validation": {**run.best, "test": logged(best)}}


# ---------------------------------------------------------------- results in files

def read_result(path):
    """A run's result.json: FIGURES, per_class, class_names, confusion or None, networks; None where it is that of a buffer of experts.

    What older versions left out is there. ValueError where a figure is none, or the classes are not as many everywhere.
    """
    result = read_json(path)
    try:
        if "experts_top1" in result:
            return None
        result = {"bytes": result.get("storage"), "bytes_fp32": result.get("storage"), "networks": [], "confusion": None, **result}  # older: fp32 only
        classes = len(result["per_class"])
        result["class_names"] = result.get("class_names") or [f"class {number}" for number in range(classes)]
        rows = [result["per_class"], *(result["confusion"] or ())]
        best = result.get("best_on_validation") or {"iteration": 0, "value": 0, "std": 0, "test": result}
        figures = [result[name] for name in FIGURES if name != "seconds_per_iteration"], [result["seconds_per_iteration"] or 0], result["networks"], *rows, [
            best[name] for name in ("iteration", "value", "std")], [best["test"][name] for name in FIGURES[:6]]
        for value in itertools.chain(*figures):
            check_figure(value)
        if not all(len(row) == classes for row in rows) or len(rows) not in (1, classes + 1) or list(map(type, result["class_names"])) != [str] * classes:
            raise TypeError("figures and names are not of the same classes")
        return result
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of these scripts ({type(error).__name__}: {error})") from None


def check_figure(value):
    """The value, if it is a number of at least 0 that a plot can show, or nan; else TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value > 1e38:
        raise TypeError(f"{value!r} is no figure")
    return value
