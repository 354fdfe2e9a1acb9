"""What a run keeps of an evaluation: metrics, the distilled set, its pictures, a checkpoint, and at the end its result."""
from distill_utils.datasets import DATASETS
from distill_utils.pictures import save_pictures
from utils import gather, peak_memory, rank, save


def record(run, synset, clips, result, matching=None):
    """Log the evaluation `result` of the run's iteration and write the set as it is now, with what the matching learned beside it."""
    learned = {"step_size": matching.eval_lr()} if matching and list(matching.parameters()) else {}
    headline = DATASETS[clips.dataset].headline
    best = run.keep_best(result[headline], std=result[f"{headline}_std"])
    run.evaluated = run.iteration
    run.log(loss=run.loss, **learned, refused=run.refused, **logged(result))
    run.say(f"iteration {run.iteration}: {summary(result, headline)}; best on test {best['value']:.1f} at iteration {best['iteration']}")
    if rank() == 0:
        save({"kind": type(synset).__name__, **synset.content(), "ipc": synset.N, "class_names": clips.class_names,
              "dataset": clips.dataset, "frames": clips.T, "iteration": run.iteration, "lr": result["lr"], "width": result["width"],
              **learned}, run.folder / "distilled.pt")
        save_pictures(synset, run.folder)
    run.result = result
    run.checkpoint()


def logged(result):
    """Of an evaluation, what every line of metrics holds: all but the confusion matrix, which grows with the square of the classes."""
    return {name: value for name, value in result.items() if name != "confusion"}


def summary(result, headline="top1"):
    other = "top5" if headline == "top1" else "top1"
    return (f"{headline} {result[headline]:.1f} ± {result[f'{headline}_std']:.1f} %, {other} {result[other]:.1f} %, "
            f"videos {result['video_top1']:.1f} ± {result['video_top1_std']:.1f} % ({len(result['networks'])} networks, "
            f"{result['storage']:,} bytes, {result['seconds']:.0f} s)")


def finish(run, clips):
    """The result of a run is the accuracy at its last iteration (METHOD 6)."""
    peak = max(gather([peak_memory(clips.device)]))  # of one process
    run.finish(**run.result, class_names=clips.class_names, peak_memory=peak)
    run.say(f"result: {summary(run.result, DATASETS[clips.dataset].headline)}; "
            f"{run.seconds / max(run.steps, 1):.3f} s per iteration, peak memory {peak / 2 ** 30:.2f} GB; {run.folder}")
    if run.refused:
        run.say(f"{run.refused} of {run.steps} steps were taken back because the loss after them was not finite: lower the learning rates")
