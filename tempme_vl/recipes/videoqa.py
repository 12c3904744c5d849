"""Video question answering: a front end with a head (recipes/videoqa.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from tempme_vl.data.questions import TrainQuestions, most_options
from tempme_vl.data.reader import ClipReader
from tempme_vl.data.transforms import ClipTransform, Preprocess
from tempme_vl.data.videoqa import QASplit, answer_vocabulary, coverage, read_splits
from tempme_vl.evaluation.predict import predict
from tempme_vl.evaluation.videoqa import accuracy
from tempme_vl.recipes.loop import fit
from tempme_vl.recipes.options import LIMITS, RecipeOptions, TuningOptions, VisualOptions, first_look, merged_by
from tempme_vl.recipes.presets import DEEPSPEED, FROM_SCRATCH, MOTION, UMT
from tempme_vl.recipes.report import about_run, cost, write_answers
from tempme_vl.recipes.start import announce, begin, check_files, facts, in_words
from tempme_vl.tasks.qa import VideoQAModel, load_qa_model
from tempme_vl.tasks.qa.create import create_llm_qa_model, create_qa_model
from tempme_vl.training.engine import Trainer


@dataclass(frozen=True)
class Options(TuningOptions, VisualOptions, RecipeOptions):
    """Train a front end with a head that answers questions.

    The defaults shown are those of the data set and the model: --help together with --data-root, --dataset or --model
    shows its own. The options in use are written to OUTPUT/options.json.
    """

    dataset: Literal["motion", "msrvtt_qa", "msvd_qa", "activitynet_qa", "jsonl"] = "msrvtt_qa"
    """Default: motion, the embedded data set; msrvtt_qa as soon as --data-root is given."""
    head: Literal["classifier", "decoder", "llm"] = "classifier"
    """classifier: one of the answers; decoder: ranks the answers, or writes freely (--rule generate); llm: a language
    model writes, and its answers are compared without case, punctuation and leading articles."""
    num_answers: int = 1500
    """The most frequent answers of the training split, which are those that the model can give. Questions whose
    options differ are answered by choosing among these."""
    vocabulary: str | None = None
    """BERT's words: a folder with vocab.txt or a hub name; default: those of the training questions and answers."""
    text: str | None = None
    """Size of the text side: bert-base, bert-large or tiny; default: UMT's own, bert-base for CLIP."""
    text_pretrained: str | None = None
    """A BERT that the text side starts from: a folder with model.safetensors or a hub name."""
    max_words: int = 25
    """Word pieces kept of a question, [CLS] included."""
    answer_words: int = 5
    """Word pieces kept of an answer, [CLS] and [SEP] included."""
    rule: Literal["likelihood", "umt", "generate"] | None = None
    """How the decoder answers: by log p(answer); UMT's own, which counts the first word twice; or word by word."""
    candidates: int = 128
    """Answers that the decoder scores whole: those with the likeliest first words."""
    llm: str | None = None
    """The language model of --head llm: a folder or a hub name, with safetensors weights."""
    lora_rank: int = 0
    """LoRA on the language model; 0 for none."""
    train_llm: bool = False
    """Train the language model whole; without it and without LoRA it stays as it is."""


# What differs from the defaults above, which are UMT's and ALPRO's.
LARGE: dict[str, Any] = {"vocabulary": "bert-base-uncased", "lr": 2e-5, "num_frames": 12, "epochs": 8}
CLIP: dict[str, Any] = {**LARGE, "text_pretrained": "bert-base-uncased"}
LLM: dict[str, Any] = {"max_words": 64, "answer_words": 8}  # pieces of a language model, the template's among them
MODELS: dict[str, dict[str, Any]] = {
    "open_clip:tiny": FROM_SCRATCH,
    "umt:tiny": {**FROM_SCRATCH, "model": "umt:tiny"},
    "umt:b16": {**UMT, **LARGE, "head": "decoder", "warmup": 1 / 8},
    "umt:l16": {**UMT, **LARGE, "head": "decoder", "warmup": 1 / 8, "vocabulary": "bert-large-uncased"},
}


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line, on top of the defaults of their data set and model."""
    given = first_look(arguments, ("dataset", "data-root", "model", "method", "head", *LIMITS))
    dataset = given.dataset or ("motion" if given.data_root is None else "msrvtt_qa")
    model = given.model or ("open_clip:tiny" if dataset == "motion" else "")
    preset = {**MODELS.get(model, CLIP), **(MOTION if dataset == "motion" else {})}
    if given.dataset is None:  # a given one is for tyro to check
        preset["dataset"] = dataset
    head = given.head or preset.get("head", "classifier")
    preset |= LLM if head == "llm" else {}
    preset["output"] = Path("runs") / f"{dataset}-{head}-{given.method or 'tempme'}"
    preset["deepspeed_config"] = DEEPSPEED / "zero1.json"
    options = tyro.cli(Options, args=arguments, default=Options(**merged_by(preset, given)))
    options.tuned()  # says what is wrong before anything starts
    return options


def main(options: Options) -> None:
    device = begin(options)
    train, val, test = read_splits(options.dataset, options.data_root, options.video_root, options.annotations)
    check_files(options, train, val, test)
    for asked in (split for split in (val, test) if split is not None):  # now, and not after an epoch
        if not most_options(asked) and most_options(train) and options.head == "classifier":
            raise ValueError(f"{train.name} teaches to choose among options; the questions of {asked.name} have none")
    free = options.head == "llm" or most_options(train)  # an answer is written, or one of the question's options
    answers = () if free else answer_vocabulary(train, options.num_answers)
    model = build_model(options, train, answers).to(device)
    preprocess = Preprocess.from_dict(model.frontend.config["preprocess"])
    reader = options.reader(model.frontend.schedule.frames, ClipTransform(preprocess), options.output)
    train_reader = replace(reader, transform=ClipTransform(preprocess, options.augment))

    trainer = Trainer(
        model,
        options.build_optimizer(model, model.is_new_parameter),
        TrainQuestions(train, train_reader, model.tokenizer(), options.seed),
        options.config(),
        facts(options, model.frontend.full_config(), train=train, val=val, test=test),
    )
    announce(options, in_words(options, model.frontend), describe(train, val, test, answers))

    def validate() -> tuple[float, dict[str, Any]]:
        assert val is not None
        score = evaluate(model, trainer.engine, val, reader, device, options.workers)[0]["accuracy"]
        return score, {"val_accuracy": score}

    trained = fit(options, trainer, model, None if val is None else validate)
    if trained is None:
        return
    best = load_qa_model(options.output / "best").to(device)
    report, predictions = evaluate(best, best, test, reader, device, options.workers)
    report |= {
        "head": options.head,
        "model": options.model,
        **about_run(options, trainer, trained, val),
        **cost(model.frontend),
    }
    write_answers(options, report, predictions, test)


def build_model(options: Options, train: QASplit, answers: tuple[str, ...]) -> VideoQAModel:
    model = build_llm(options) if options.head == "llm" else build_bert(options, train, answers)
    model.tune(options.tuned())
    model.input["sampling"] = options.sampling
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def build_llm(options: Options) -> VideoQAModel:
    if options.llm is None:
        raise ValueError("--head llm needs --llm, a folder or the hub name of a causal language model")
    return create_llm_qa_model(
        options.model,
        options.llm,
        max_words=options.max_words,
        answer_words=options.answer_words,
        train_llm=options.train_llm,
        lora_rank=options.lora_rank,
        **options.tower(12),
    )


def build_bert(options: Options, train: QASplit, answers: tuple[str, ...]) -> VideoQAModel:
    texts = [text for q in train.questions for text in (q.question, *q.answers, *q.options)]
    assert options.head != "llm"
    return create_qa_model(
        options.model,
        options.words(texts, options.vocabulary),
        options.head,
        answers,
        text=options.text,
        text_pretrained=options.text_pretrained,
        max_words=options.max_words,
        rule=options.rule,
        candidates=options.candidates,
        answer_words=options.answer_words,
        **options.tower(12),
    )


def evaluate(
    model: VideoQAModel, encode: Any, split: QASplit, reader: ClipReader, device: torch.device, workers: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Accuracy and predictions on a split, all ranks together; `encode` is the model or its DeepSpeed engine."""
    encode.eval()
    predictions = predict(model, encode, split, reader, device, workers=workers)
    return accuracy(predictions, split, model.answers or None, normalize=model.head.name == "llm"), predictions


def describe(train: QASplit, val: QASplit | None, test: QASplit, answers: tuple[str, ...]) -> str:
    lines = [
        f"{name}: {len(s.questions)} questions" for name, s in (("train", train), ("val", val), ("test", test)) if s
    ]
    if answers:
        covered = f"{coverage(answers, test):.2f} % of {test.name}"
        lines.append(f"{len(answers)} answers of the training split, which hold an answer to {covered}")
    return "\n".join(lines)
