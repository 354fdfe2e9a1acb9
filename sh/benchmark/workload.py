"""The work that the benchmark measures: the scripts' operations on random clips of given sizes."""
import functools
import pathlib
import tempfile

import av
import numpy as np
import torch
from PIL import Image

import buffer
import distill_DM
import distill_FRePo
import distill_MTT
import networks
from distill_utils import options
from distill_utils.clips import draw_flips, select
from distill_utils.compute import clips_at_once
from distill_utils.datasets import read_lists
from distill_utils.decode import Picture, make_folder
from distill_utils.identity import list_digest
from distill_utils.packs import pack_header
from distill_utils.protocol import evaluate
from distill_utils.starts import initial_pixels
from distill_utils.trajectories import snapshot
from utils import check_space, save

SECTIONS = ("preparing", "loading", "dm", "pool", "mtt", "frepo", "evaluation", "experts")
FILM = 128, 320, 240  # frames, width and height of the video that is prepared, as in UCF101


class Workload:
    """Random clips with the sizes in `args`, as a custom data set in `folder`/data: a list and packs.

    Its methods return what is measured: calls without arguments, one method for each of SECTIONS. A `sparse` pack is
    all zeros and takes no disk space.
    """

    def __init__(self, args, folder, sparse=False):
        self.args, self.folder, self.sparse = args, pathlib.Path(folder), sparse
        self.data = self.folder / "data"
        self.flags = ["--dataset", "custom", "--data_path", str(self.data), "--pack_path", str(self.data),
                      "--frames", str(args.frames), "--size", str(args.size), "--test_clips", "1",
                      "--ipc", str(args.ipc), "--device", args.device]

    def parse(self, script, **flags):
        return script.parser().parse_args(
            self.flags + [word for name, value in flags.items() for word in (f"--{name}", str(value))])

    def write(self):
        (self.data / "frames").mkdir(parents=True)
        counts = {"train": self.args.classes * self.args.clips_per_class, "test": self.args.test_clips}
        rows = [f"v_class{number % self.args.classes:03}_{split}_{number:07},"
                f"class{number % self.args.classes:03},{split}\n"
                for split, videos in counts.items() for number in range(videos)]
        (self.data / "list.csv").write_text("folder_name,label,split\n" + "".join(rows))
        flags = self.parse(distill_DM)
        options.check(flags, self.args.ipc)
        for split in counts:
            write_pack(select("custom", split=split, **options.selection_values(flags)), self.data, self.sparse)
        return self

    @functools.cached_property
    def train(self):
        return options.load_data(self.parse(distill_DM), "train")

    @functools.cached_property
    def test(self):
        return options.load_data(self.parse(distill_DM), "test")

    @property
    def device(self):
        return torch.device(self.args.device)

    @property
    def at_once(self):
        return clips_at_once(self.args.frames, self.args.size, self.device)

    @property
    def batch(self):
        """Number of clips in the batches of all classes together."""
        return self.args.classes * min(self.args.batch_real, self.args.clips_per_class)

    def synset(self):
        return initial_pixels(self.train, self.args.ipc, "real")

    # ---------------------------------------------------------------- the sections

    def preparing(self, precision):
        film, picture = self.film(), Picture(self.enlarged(), self.args.size)

        def prepare():
            folder = pathlib.Path(tempfile.mkdtemp(prefix="ours", dir=self.folder))
            return make_folder(([film], folder / "frames", folder / "partial", picture, None))
        return prepare

    def loading(self, precision):
        index = self.train.class_batch(self.args.batch_real)
        return lambda: [self.train.draw(part, flip=draw_flips(len(part), self.train.mirror))
                        for part in index.split(self.at_once)]

    def dm(self, precision, pool=0):
        flags = self.parse(distill_DM, precision=precision, batch_real=self.args.batch_real, pool=pool)
        return self.step(distill_DM.make_matching(flags, self.train))

    def pool(self, precision):
        """Return an iteration of DM with a pool of one network; its class means are computed here, if they are not."""
        return self.dm(precision, pool=1)

    def mtt(self, precision):
        return self.step(self.trajectories(precision))

    def trajectories(self, precision):
        """Return trajectory matching with one expert, which has made one epoch."""
        weights = snapshot(networks.build("ConvNet3D", self.train.K, self.train.T, self.train.size), torch.float32)
        save([[weights, [1.001 * weight for weight in weights]]], self.folder / "replay_buffer_0.pt")
        flags = self.parse(distill_MTT, precision=precision, buffer_path=self.folder, syn_steps=self.args.syn_steps,
                           max_start_epoch=1)
        return distill_MTT.make_matching(flags, self.train)

    def frepo(self, precision):
        """Return an iteration of FRePo: the step on the set, and the network's step."""
        matching = distill_FRePo.make_matching(
            self.parse(distill_FRePo, precision=precision, batch_target=self.batch, num_pool=1), self.train)
        step = self.step(matching)
        step()                      # from the next iteration on, a network of the pool is to be trained
        return step

    def step(self, matching):
        """Return a step of the matching; with learning rate 0, all steps are the same."""
        synset = self.synset()
        optimizer = torch.optim.SGD([*synset.parameters(), *matching.parameters()], lr=0, momentum=0.5)

        def step():
            optimizer.zero_grad()
            matching(synset).backward()
            optimizer.step()
        return step

    def evaluation(self, precision):
        synset = self.synset()
        return lambda: evaluate(synset, self.test, num_eval=1, epochs=self.args.epoch_eval_train, precision=precision)

    def experts(self, precision):
        net = networks.build("ConvNet3D", self.train.K, self.train.T, self.train.size).to(self.train.device)
        return lambda: list(buffer.train_expert(
            net, self.train, 1, 0.0, self.args.batch_train, self.at_once, precision, ("benchmark",)))

    # ---------------------------------------------------------------- costs that grow with the number of clips

    def start_up(self, precision):
        """Return a script's start with existing packs: the list, its digest for the run folder, both splits' clips."""
        def start_up():
            read_lists.cache_clear()
            flags = self.parse(distill_DM)
            list_digest(flags)
            return [options.load_data(flags, split) for split in ("train", "test")]
        return start_up

    def class_batch(self, precision):
        return lambda: self.train.class_batch(self.args.batch_real)

    def gather(self, precision):
        index = self.train.class_batch(self.args.batch_real)
        return lambda: self.train.gather(index)

    # ---------------------------------------------------------------- files

    def film(self):
        """Return the path of a video of FILM's sizes, in the format of UCF101's files (mpeg4 in avi)."""
        path = self.folder / "film.avi"
        if not path.exists():
            frames, *size = FILM
            with av.open(str(path), "w") as container:
                stream = container.add_stream("mpeg4", rate=25)
                stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 400_000
                for picture in pictures(frames, size):
                    container.mux(stream.encode(av.VideoFrame.from_image(picture)))
                container.mux(stream.encode())
        return path

    def enlarged(self):
        """Return width and height of the film's frames before the crop: the short side is the clips' size."""
        _, width, height = FILM
        return width * self.args.size // height, self.args.size

    def folders(self, clips):
        """Return the paths of `clips` folders of JPEG frames of the clips' size."""
        size = (self.args.size, self.args.size)
        for number in range(clips):
            folder = self.folder / "clips" / f"{number:05}"
            if not folder.exists():
                folder.mkdir(parents=True)
                for frame, picture in enumerate(pictures(self.args.frames, size, number)):
                    picture.save(folder / f"frame{frame:06}.jpg", quality=95)
        return sorted((self.folder / "clips").iterdir())


def pictures(frames, size, seed=0):
    """Yield pictures of a smooth pattern that drifts: as costly to decode as pictures of a camera, unlike noise."""
    random = np.random.default_rng(seed)
    start, drift = random.integers(0, 256, (8, 8, 3)), random.integers(-4, 5, (8, 8, 3))
    for frame in range(frames):
        values = np.clip(start + frame * drift, 0, 255).astype(np.uint8)
        yield Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def write_pack(selection, folder, sparse):
    path, shape = selection.pack(folder), selection.shape
    if not sparse:
        check_space(folder, int(np.prod(shape)), "the generated clips",
                    "set TMPDIR to a larger disk, or lower --clips_per_class")
    with open(path, "wb") as file:
        file.write(pack_header(shape))
        if sparse:
            file.truncate(file.tell() + int(np.prod(shape)))
        else:
            random = np.random.default_rng(0)
            for _ in range(shape[0]):
                file.write(random.bytes(int(np.prod(shape[1:]))))
