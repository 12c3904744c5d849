"""An index's rows made by several machines: Ray Data decodes and encodes, and the process that asks for them writes.

    files -> Decode (a CPU) -> one segment a row -> Encode (a GPU, or a CPU) -> rows -> whole files

Ray holds each stage back while the one behind it is busy, runs what a lost node did once more, and passes results on in
no particular order.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import pickle
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tempme_vl.data.decoder_process import DecoderProcess
from tempme_vl.search.decoding import Reading
from tempme_vl.search.embed import Embedder
from tempme_vl.search.files import VideoFile, inside
from tempme_vl.search.options import IndexOptions
from tempme_vl.search.rows import Made, in_pieces, make_rows
from tempme_vl.search.store import IndexFolderError, IndexSettings, MissingPackageError

FILES_AT_ONCE = 8  # of a decoder's task, which is what a lost node repeats
CPU_SHARE = 0.5  # of a decoder, and of an encoder without a GPU: both fit where one CPU is left
ANSWER_SECONDS = 10.0  # in which a cluster must be there


@dataclass(frozen=True)
class Model:
    """What an encoder loads.

    Attributes:
        source: a folder that all machines see, or a name on the Hugging Face hub.
        device: "cpu", "cuda", or None for GPUs where the cluster has any.
        settings: of the index that it makes rows for.
    """

    source: str
    device: str | None
    settings: IndexSettings


class Decode:
    """A stage of Ray Data, a process: files -> `Waiting`, a segment each."""

    def __init__(self, reading: Reading):
        self.reading, self.process = reading, DecoderProcess()

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Raises IndexFolderError where this machine does not see the folder."""
        if not self.reading.folder.is_dir():
            raise IndexFolderError(_unseen(f"the machine {socket.gethostname()}", str(self.reading.folder)))
        for file in unpacked(batch):
            for piece in in_pieces(self.reading.decode(file, self.process), 1):
                yield packed([piece])


class Encode:
    """A stage of Ray Data, a process: `Waiting` -> `Made`."""

    def __init__(self, model: Model):
        self.model = model

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises IndexFolderError where this machine does not see the model, or sees another."""
        return packed(make_rows(unpacked(batch), self.model.settings, self._embedder))

    @cached_property
    def _embedder(self) -> Embedder:
        """Not loaded by `__init__`: an error in there would make Ray try for ever."""
        here = f"the machine {socket.gethostname()}"
        try:
            embedder = Embedder.from_pretrained(self.model.source, self.model.device)
        except (ValueError, OSError) as error:
            raise IndexFolderError(f"{_unseen(here, self.model.source)} ({error})") from error
        if embedder.fingerprint != self.model.settings.fingerprint:
            raise IndexFolderError(f"{here} has another model in {self.model.source} than the one of the index")
        return embedder


def check_cluster(options: IndexOptions) -> None:
    """Refuses options that do not go with `--ray`.

    Raises:
        ValueError: says which.
        MissingPackageError: Ray is not installed.
    """
    address = options.ray
    if address is None:
        return
    if options.workers != 1:
        raise ValueError(
            "--workers is for one machine; with --ray there are as many decoders as the cluster has room for"
        )
    if options.device not in (None, "cpu", "cuda"):
        raise ValueError(f"with --ray, --device is cpu or cuda, and Ray says which GPU; got {options.device}")
    host, _, port = address.rpartition(":")
    if address not in ("auto", "local") and not (host and port.isdigit() and "/" not in address):
        raise ValueError(
            f"--ray must be auto (the cluster that this machine is part of), local (this machine alone) or HOST:PORT "
            f"of the cluster's head; got {address}. The command runs on one of the cluster's machines"
        )
    _ray()


def embed_on_cluster(
    files: Sequence[VideoFile], reading: Reading, model: Model, batch_size: int, address: str
) -> Iterator[Made]:
    """All files, each once and with all of its rows.

    Args:
        batch_size: segments that the model takes at once.
        address: see `IndexOptions.ray`. A process that is connected already stays so.

    Raises:
        IndexFolderError: no cluster answers, it has no room, or a machine does not see the videos or the model.
    """
    left = {file.path: file for file in files}
    with _connected(address):
        while left:  # a second time only what another outcome of a repeated task has left out
            before = len(left)
            for made in whole_files(_stream(list(left.values()), reading, model, batch_size)):
                if made.error == os.strerror(errno.ENOENT) and inside(reading.folder, made.file.path).exists():
                    raise IndexFolderError(_unseen("a machine of the cluster", f"{reading.folder}/{made.file.path}"))
                if left.pop(made.file.path, None):
                    yield made
            if len(left) == before:
                raise IndexFolderError(f"Ray ended without {before} files; run the command again")


def whole_files(made: Iterable[Made]) -> Iterator[Made]:
    """Files as soon as all of their rows are there, each once, of rows that come in any order and perhaps twice."""
    waiting: dict[str, dict[int, Made]] = {}
    done: set[str] = set()
    for one in made:
        path = one.file.path
        if path in done:
            continue
        own = waiting.setdefault(path, {})
        own[one.first] = one
        end = next((other for other in own.values() if other.last), None)
        if end is not None and len(own) == end.first + 1:
            done.add(path)
            rows = tuple(row for _, other in sorted(waiting.pop(path).items()) for row in other.rows)
            yield replace(end, rows=rows, first=0)


def _stream(files: Sequence[VideoFile], reading: Reading, model: Model, batch_size: int) -> Iterator[Made]:
    """What the stages make, as it comes."""
    ray = _ray()
    decoders, encoders, device = _room(ray.cluster_resources(), model.device)
    stages = ray.data.from_items(
        [pickle.dumps(file) for file in files], override_num_blocks=math.ceil(len(files) / FILES_AT_ONCE)
    )
    stages = stages.map_batches(Decode, fn_constructor_args=(reading,), batch_size=FILES_AT_ONCE, **decoders)
    told = replace(model, device=device)
    stages = stages.map_batches(Encode, fn_constructor_args=(told,), batch_size=batch_size, **encoders)
    stages.context.enable_progress_bars = False  # there is one for the whole already
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error is raised, too
    try:
        for batch in stages.iter_batches(batch_size=None, batch_format="numpy"):
            yield from unpacked(batch)
    except ray.exceptions.RayError as error:
        raise IndexFolderError(f"{_first_line(error)}. What was written stays; run the command again") from error


def _room(resources: Mapping[str, float], device: str | None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What Ray is asked for, for decoders and encoders, and the device of these."""
    ray = _ray()
    cpus, gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0.0))
    if cpus < 2 * CPU_SHARE:
        raise IndexFolderError(f"expected a cluster of one CPU or more; this one has {cpus:g}")
    if device == "cuda" and not gpus:
        raise IndexFolderError("--device cuda, but the cluster has no GPU")
    most = max(1, int(cpus / CPU_SHARE) - 1)
    decoders = {"compute": ray.data.ActorPoolStrategy(min_size=1, max_size=most), "num_cpus": CPU_SHARE}
    if device == "cpu" or not gpus:
        return decoders, decoders, "cpu"
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=gpus)
    return decoders, {"compute": pool, "num_cpus": CPU_SHARE, "num_gpus": 1}, "cuda"


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """While Ray is there. It prints on stdout what happens to its machines; here that is for the report alone."""
    ray = _ray()
    with redirect_stdout(sys.stderr):
        if ray.is_initialized():
            yield
            return
        _start(ray, address)
        try:
            yield
        finally:
            ray.shutdown()


def _start(ray: Any, address: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of the cluster that this process makes
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise IndexFolderError(
            f"no Ray cluster answers at {address} ({_first_line(error)}): start one with ray start --head, and "
            "ray start --address HOST:PORT on the other machines, this one among them"
        ) from error


def _unseen(who: str, what: str) -> str:
    return (
        f"{who} does not see {what}: all machines must have the videos and the model in the same place (shared storage)"
    )


def _first_line(error: BaseException) -> str:
    """The message of an error, of one in another process without the way it came."""
    return str(getattr(error, "cause", None) or error).strip().partition("\n")[0].rstrip(".")


def packed(items: Iterable[object]) -> dict[str, np.ndarray]:
    """A batch of one column, of bytes: Arrow has no type for what is in them."""
    return {"item": np.array([pickle.dumps(item) for item in items], dtype=object)}


def unpacked(batch: Mapping[str, np.ndarray]) -> list[Any]:
    return [pickle.loads(item) for item in batch["item"]]


def _ray() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise MissingPackageError("--ray needs Ray Data: pip install 'tempme_vl[ray]'") from error
    return ray
