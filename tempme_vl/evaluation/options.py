"""Options of the commands that evaluate and measure; plain data, read from a command line without importing torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tempme_vl.command_line import Command, Example
from tempme_vl.data.datasets import ASKED, CAPTIONED
from tempme_vl.data.options import EMBEDDED, DataOptions
from tempme_vl.registries import METHODS
from tempme_vl.tuning import TUNINGS


@dataclass(frozen=True)
class MeasuredNames:
    """What can be measured side by side: open_clip's own tower, methods, UMT's frames, and all that a model has."""

    def __iter__(self) -> Iterator[str]:
        return iter(("all", "open_clip", *METHODS, "joint", "per_frame", "per_frame+tempme"))


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How videos are read."""

    batch_size: int = 32
    """Videos, captions or questions that a rank takes at once, 1 or more."""
    workers: int = 2
    """Loader processes a rank; 0 loads in the rank's own."""
    frame_cache: Path | None = None
    """Folder that keeps decoded frames for the next evaluation."""
    decode_timeout: float | None = 60.0
    """Seconds after which a decoder is ended."""


@dataclass(frozen=True)
class RetrievalOptions(DataOptions, LoadingOptions):
    """Evaluate a retrieval checkpoint on one split of a data set, in both directions.

    The number of frames and the preprocessing are the checkpoint's.
    """

    checkpoint: Path
    """Folder that a retrieval model's save_pretrained wrote, such as a training run's OUTPUT/best."""
    dataset: Annotated[str, CAPTIONED]
    split: str | None = None
    """Default: the test split (msrvtt test_1k, activitynet val_1); of jsonl without any splits all videos."""
    sampling: Literal["fps1", "uniform", "segment", "strided", "headtail"] | None = None
    """Which frames. Default: as in training."""
    dual_softmax: bool = False
    """Reweight scores by a softmax over all queries of the split; named in the report."""
    rerank: int | None = None
    """Candidates of each query that a second stage ranks anew, both ways: UMT's or TESTA's layers that see both
    sides, or the head eercf. 0 leaves it out. Default: UMT and TESTA 128, eercf 50."""
    save_embeddings: Path | None = None
    """Write the L2-normalised embeddings of videos and captions to this .safetensors file."""
    json: Path | None = None
    """Write the report to this file."""
    on_broken: Literal["record", "raise"] = "record"
    """Videos that cannot be read: counted, listed and never found, or an error."""


@dataclass(frozen=True)
class VideoQAOptions(DataOptions, LoadingOptions):
    """Accuracy, overall and by type of question, in percent. Questions without a prediction count as wrong."""

    predictions: Path | None = None
    """Answers by question id: a JSON object or list, JSON lines, or a csv file."""
    prediction_key: str | None = None
    """The key or column of --predictions that holds the answers. Default: pred, prediction, output, response or
    another of tempme_vl.evaluation.predictions, else answer; the report says which."""
    id_key: str | None = None
    """The one that holds the question's id. Default: question_id, id, qid or questionId."""
    checkpoint: Path | None = None
    """Or the folder of a model, such as a training run's OUTPUT/best, to predict them."""
    annotations: Path | None = None
    """The questions of the split with their answers: .json, .csv or .jsonl. A model's videos: --video-root."""
    split: str | None = None
    """Of a .jsonl file, the lines of this split only; of --dataset, "test" by default."""
    vocabulary: Path | None = None
    """The answers the model can give, from the training split, the most frequent first: a JSON list or a text file
    with one a line. Gives the ceiling; a --checkpoint has its own."""
    vocabulary_size: int | None = None
    """Take that many answers from the front of --vocabulary."""
    normalize: bool = False
    """Compare without case, punctuation and leading articles, as is usual for generated answers. Default: exact."""
    json: Path | None = None
    """Write the report to this file."""
    dataset: Annotated[str, ASKED] | None = None
    """For --checkpoint; without it --annotations is a .jsonl file."""
    save_predictions: Path | None = None
    """Write what a --checkpoint answers to this file, as --predictions reads it."""


@dataclass(frozen=True)
class EfficiencyOptions:
    """GFLOPs and tokens of merging methods beside the paper's; with --measure, times and memory of this machine."""

    json: Path | None = None
    """Also write all numbers to this file."""
    costs: bool = True
    """Compute the table beside the paper's numbers; off, with --measure, that alone."""
    measure: bool = False
    """Time the rows in turn, on a GPU if there is one, with random weights and input."""
    train: bool = False
    """Measure one full-fine-tuning step (forward, backward, AdamW) of the retrieval model, not the tower's forward."""
    rows: tuple[Annotated[str, MeasuredNames()], ...] = ()
    """The rows to measure, the first being the reference: merging methods (without a published setting for the model at
    0.6 of the GFLOPs) and open_clip's own tower, which does not train alone; UMT has joint, per_frame and
    per_frame+tempme. all: those with a published setting. Default: open_clip, none, tome and tempme, or UMT's three."""
    ways: tuple[Literal["plain", "efficient", "flash", "compiled", "whole", "graph"], ...] = ()
    """Each row also so, beside as it is: without the fused kernels; with one kernel of attention alone; with compiled
    blocks; compiled whole (minutes); recorded as a CUDA graph."""
    share: bool = False
    """Also the share of each method's forward pass that matching and merging take."""
    model: str = "open_clip:ViT-B-32-quickgelu"
    """open_clip:NAME, open_clip:tiny, or umt:b16, umt:l16, umt:tiny."""
    frames: int = 12
    """Of a video."""
    batch: tuple[int, ...] = (1,)
    """Videos at a time; several numbers are measured one after the other."""
    repeats: int = 15
    """Turns that count; one more before them warms up."""
    memory: bool = True
    """Also the peak memory, of each row in a process of its own."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in a forward pass; training keeps float32 weights and autocasts."""
    against: Path | None = None
    """A file that --json wrote: it is an error if rows became slower since, beside their first row."""
    spread: float = 0.1
    """What a ratio may grow by meanwhile, as a share of it."""
    r: int | None = None
    """Pairs merged a frame in each early block (TempMe, ToMe). These five default to the paper's for B/32, B/16, and
    for UMT B/16 to a fit, not the paper's setting."""
    merge_layers: tuple[int, ...] | None = None
    """Blocks that join clips."""
    merge_frames: tuple[int, ...] | None = None
    """Neighbouring clips joined in each of them."""
    cross_percent: int | None = None
    """Percent of tokens merged across clips there."""
    intra_percent: int | None = None
    """Percent of tokens merged inside the clips from there on."""


@dataclass(frozen=True)
class CompareOptions(DataOptions):
    """Train merging methods and ways of tuning alike, and compare them.

    R-Sum over seeds against GFLOPs, tokens and measured milliseconds, and differences to the first row, paired by seed
    and query. Each run has a folder below --output; runs that are there already are kept, those begun go on.
    """

    methods: tuple[str, ...] = ("none", "tome", "tempme")
    """METHOD, METHOD:NAME=VALUE,NAME=VALUE with options of the method (r=4, or budget=0.5 for any), or METHOD+TUNING.
    All are compared with the first."""
    tunings: tuple[Annotated[str, TUNINGS], ...] = ()
    """Each of them for every method that has none of its own; default: the one of `train retrieval`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, order and augmentation; the same for every row."""
    output: Path = Path("runs/compare")
    """The runs' folders, comparison.json, comparison.md and its plot."""
    dataset: Annotated[str, CAPTIONED] = EMBEDDED
    """As `train retrieval` has it."""
    train: tuple[str, ...] = ()
    """NAME=VALUE of `train retrieval`, for all rows alike, such as epochs=2."""
    ranks: int = 1
    """Processes of a run, started by the deepspeed launcher."""
    parallel: int = 1
    """Runs at a time; where there are GPUs, each has its own --ranks of them."""
    batch: int = 1
    """Videos at a time, where the encoders are timed."""
    repeats: int = 15
    """Turns that count, where the encoders are timed one after the other; one more before them warms up."""
    page: Path | None = None
    """Also write the table and what it is of to this Markdown file, the plot beside it. Of a file that is there the
    data set's own section is replaced, and other text stays."""


@dataclass(frozen=True)
class VideoLLMCompareOptions(DataOptions, LoadingOptions):
    """Compare compression methods on one video-language model, without training.

    Accuracy on questions against visual tokens and measured time, each method at each budget, and differences to the
    host itself, paired by question. Always in: the host, and what is plain: fewer frames, smaller frames, tokens
    dropped at random or evenly, and pooled. What does not work on the host is told with its cause.
    """

    host: tuple[str, ...]
    """A host's folder or its name on the hub, or what `train videollm` exported, such as OUTPUT/best, whose own
    compression each row's replaces. Several: the same model of several seeds, over which rows are means."""
    methods: tuple[str, ...] = ()
    """METHOD, METHOD@tower, METHOD@behind, or one of them with :NAME=VALUE,NAME=VALUE of the method; budget=0.3 or
    tokens=64 among them stands in the place of --retention. Default: all methods in both places and all compressors."""
    retention: tuple[float, ...] = (0.25, 0.2, 0.15, 0.1)
    """Shares of the host's visual tokens that are left at most."""
    dataset: Annotated[str, ASKED] = EMBEDDED
    """Whose questions are asked, those of its test split."""
    questions: int | None = None
    """So many of them, drawn by --seed; default: all."""
    seed: int = 0
    """Of that choice, and of whatever a method draws."""
    num_frames: int | None = None
    """Of a video. Default: as the host was trained, or 8."""
    image_size: int | None = None
    """Side in pixels of the square frames that the host's own preprocessing gets. Default: as trained, or 224."""
    sampling: Literal["uniform", "fps1", "segment", "strided", "headtail"] | None = None
    """Which frames. Default: as trained, or uniform."""
    prompt: str | None = None
    """With {question} and the host's placeholder. Default: as trained, or the host's chat format."""
    answer_tokens: int | None = None
    """The most that are written. Default: as trained, or 8."""
    output: Path = Path("runs/videollm-compare")
    """Every answer, comparison.json, comparison.md and its plot. What is there already is not asked or timed again."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """A GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; bfloat16 on a GPU."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    new_tokens: int = 16
    """Written where answers are timed, 2 or more."""
    repeats: int = 10
    """Turns that count, where the rows are timed one after the other; one more before them warms up."""
    in_flight: tuple[int, ...] = (1, 8, 32)
    """Requests of one batch, where requests a second are measured; none without numbers."""
    page: Path | None = None
    """As `compare` has it; the section has the name of the data set."""
    lmms_tasks: tuple[str, ...] = ()
    """Write OUTPUT/lmms_eval.sh, which runs the rows on these tasks of lmms-eval; nothing of it is run here."""


EVAL_RETRIEVAL = Command(
    "eval retrieval",
    RetrievalOptions,
    "tempme_vl.evaluation.retrieval_command:main",
    (
        Example("what the first try of training wrote", "--checkpoint runs/motion-tempme/best --dataset motion"),
        Example(
            "MSRVTT 1k-A",
            "--checkpoint runs/msrvtt-tempme/best --dataset msrvtt --data-root /data/msrvtt --json report.json",
            gpus=8,
        ),
    ),
)
EVAL_VIDEOQA = Command(
    "eval videoqa",
    VideoQAOptions,
    "tempme_vl.evaluation.videoqa_command:main",
    (
        Example(
            "anybody's predictions, without torch",
            "--predictions predictions.json --annotations MSRVTT-QA/test_qa.json --json report.json",
        ),
        Example("a model", "--checkpoint runs/motion-decoder-tempme/best --dataset motion"),
    ),
)
EFFICIENCY = Command(
    "efficiency",
    EfficiencyOptions,
    "tempme_vl.evaluation.efficiency_command:main",
    (
        Example("computed, beside the paper's numbers"),
        Example("the tower's forward pass on this machine", "--measure --model open_clip:ViT-B-16-quickgelu"),
        Example(
            "all methods with a published setting, one video and eight at a time",
            "--measure --rows all --model open_clip:ViT-B-16-quickgelu --batch 1 8 --repeats 3 --no-memory --threads 2",
        ),
        Example("a step of full fine-tuning", "--measure --train --batch 2 --repeats 5"),
    ),
)
COMPARE = Command(
    "compare",
    CompareOptions,
    "tempme_vl.evaluation.compare_command:main",
    (
        Example("three methods on the embedded data set, 30 minutes on 2 CPU cores"),
        Example("at half the compute", "--methods none tome:budget=0.5 tempme:budget=0.5"),
        Example(
            "MSRVTT, four runs at a time on 8 GPUs",
            "--dataset msrvtt --data-root /data/msrvtt --ranks 2 --parallel 4",
        ),
    ),
)
VIDEOLLM_COMPARE = Command(
    "videollm-compare",
    VideoLLMCompareOptions,
    "tempme_vl.evaluation.videollm.command:main",
    (
        Example("all methods on what `train videollm` exported", "--host runs/motion-videollm-none/best"),
        Example(
            "three seeds of a host, three methods at half of the tokens",
            "--host runs/none-0/best runs/none-1/best runs/none-2/best --methods tempme@tower tempme@behind evs "
            "--retention 0.5",
        ),
        Example(
            "a public model on the first 500 questions, and commands for lmms-eval",
            "--host Qwen/Qwen2.5-VL-3B-Instruct --dataset msrvtt_qa --data-root /data/msrvtt --questions 500 "
            "--lmms-tasks videomme mvbench",
        ),
    ),
)
