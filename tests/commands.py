"""Command lines of the scripts on tiny data, run by tests/server.py."""
import itertools
import json
import os
import pathlib
import subprocess
import sys

FLAGS = {
    "data": "--dataset custom --frames 8 --size 43 --test_clips 1 --width 8".split(),
    "evaluation": "--num_eval 1 --epoch_eval_train 1".split(),
    "distill_DM": "--ipc 1 --lr_img 10 --Iteration 3 --eval_it 2 --batch_real 2".split(),
    "distill_DC": "--spc 2 --lr_img 1 --Iteration 3 --eval_it 2 --outer_loop 2 --inner_loop 1 --batch_real 3".split(),
    "distill_MTT": "--ipc 1 --lr_img 100 --Iteration 3 --eval_it 2 --syn_steps 2 --max_start_epoch 2 --lr_lr 1e-6".split(),
    "buffer": "--num_experts 2 --train_epochs 2 --batch_train 3 --lr_teacher 0.1".split(),
    "distill_s2d": "--ipc 1 --lr_dynamic 10 --lr_hal 1e-3 --Iteration 3 --eval_it 2 --batch_real 2".split(),
    "distill_s2d MTT": "--method MTT --ipc 1 --lr_dynamic 100 --lr_hal 1e-3 --Iteration 3 --eval_it 2 --syn_steps 2 --max_start_epoch 2".split(),
    "distill_FRePo": "--ipc 1 --lr_img 0.01 --Iteration 3 --eval_it 2 --batch_target 3 --num_pool 2 --pool_steps 3 --storage uint8".split(),
    "distill_s2d FRePo": ("--method FRePo --ipc 1 --spc 1 --dpc 1 --static real --lr_dynamic 0.01 --lr_hal 1e-3 --Iteration 3 --eval_it 2 --batch_target 3 "
                          "--num_pool 2 --pool_steps 3").split(),
    "distill_s2d compact": ("--ipc 1 --spc 1 --dpc 2 --static real --select k-center --feature_epochs 1 --init_dynamic residual --init_hal identity --train_static "
                            "--storage uint4 --static_size 20 --dynamic_frames 3 --dynamic_size 11 --Iteration 3 --eval_it 2 --batch_real 2").split(),
    "distill_utils.coreset": [],
    "distill_utils.evaluate": [],
}


def only_folder(save_path):
    """The folder of the one run that results under `save_path` came from."""
    folder, = (path for path in save_path.glob("*/*") if path.is_dir())  # "*/*/" finds files too before Python 3.11
    return folder


class Commands:
    """Runs the scripts with the flags of the tiny data in `folder`. Each call returns (exit code, all that was printed)."""

    def __init__(self, folder):
        self.folder, self.numbers, self.running = folder, itertools.count(), False
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
        self.server = subprocess.Popen([sys.executable, pathlib.Path(__file__).with_name("server.py")], env=environment,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def arguments(self, script, save_path, flags=()):
        return [*FLAGS["data"], *(FLAGS["evaluation"] if script != "buffer" else ()), *FLAGS[script], "--data_path", str(self.folder / "data"),
                "--pack_path", str(self.folder / "packs"), "--save_path", str(save_path), "--device", "cpu",
                *map(str, flags)]

    def submit(self, script, arguments, processes=1, replace=0, call=None, **environment):
        """Starts the script as so many ranks; returns their process ids. `replace`, `call`: where it dies, as server.py says."""
        self.output = self.folder / f"output{next(self.numbers)}"
        job = {"script": script.split()[0], "arguments": list(map(str, arguments)), "output": str(self.output), "environment": environment,
               "processes": processes, "replace": replace, "call": call}
        if self.running:  # a test that failed did not ask
            self.codes()
        print(json.dumps(job), file=self.server.stdin, flush=True)
        self.running = True
        return json.loads(self.server.stdout.readline())

    def codes(self):
        """The exit codes of what was submitted, once all have ended."""
        self.running = False
        return json.loads(self.server.stdout.readline())

    def messages(self):
        """The last sentence of each of several ranks that failed."""
        return [json.loads(path.read_text())["message"] for path in sorted(self.folder.glob(f"{self.output.name}.[0-9]*"))]

    def calls(self):
        """How many functions were called by what was told to count them and was not killed."""
        return int(self.output.with_name(self.output.name + ".calls").read_text())

    def start(self, script, save_path, *flags, **options):
        child, = self.submit(script, self.arguments(script, save_path, flags), **options)
        return child

    def end(self):
        code, = self.codes()
        return code, self.output.read_text()

    def __call__(self, script, save_path, *flags, **options):
        self.start(script, save_path, *flags, **options)
        return self.end()

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
