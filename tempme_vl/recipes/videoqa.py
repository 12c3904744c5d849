"""Video question answering: a front end with a head (recipes/videoqa.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from tempme_vl.data.questions import TrainQuestions, most_options
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.data.videoqa import QASplit, answer_vocabulary, coverage
from tempme_vl.evaluation.predict import predict
from tempme_vl.evaluation.videoqa import accuracy
from tempme_vl.recipes.build import optimizer, tower, video_reader, words_of
from tempme_vl.recipes.loop import fit
from tempme_vl.recipes.options.videoqa import Options
from tempme_vl.recipes.report import about_run, cost, write_answers, write_results
from tempme_vl.recipes.start import announce, begin, check_files, facts, in_words
from tempme_vl.tasks.heads import find_head
from tempme_vl.tasks.inputs import VideoInput
from tempme_vl.tasks.qa import QAHead, VideoQAModel, create_qa_model, load_qa_model
from tempme_vl.training.engine import Trainer


def main(options: Options) -> None:
    device = begin(options)
    train, val, test = options.source().all_questions()
    check_files(options, train, val, test)
    head = head_of(options)
    for asked in (split for split in (val, test) if split is not None):  # now, and not after an epoch
        if not most_options(asked) and most_options(train) and head.only_options:
            raise ValueError(f"{train.name} teaches to choose among options; the questions of {asked.name} have none")
    listed = head.uses_answers and not most_options(train)  # else one of the question's options, or written
    answers = answer_vocabulary(train, options.num_answers) if listed else ()
    model = build_model(options, train, answers).to(device)
    preprocess = model.frontend.preprocessing
    reader = video_reader(options, model.frontend.schedule.frames, VideoTransform(preprocess, normalize=False))
    train_reader = replace(reader, transform=VideoTransform(preprocess, options.augment, normalize=False))

    trainer = Trainer(
        model,
        optimizer(options, model, model.is_new_parameter),
        TrainQuestions(train, train_reader, model.tokenizer(), options.seed),
        options,
        facts(options, model.frontend.full_config().to_dict(), train=train, val=val, test=test),
    )
    announce(options, in_words(options, model), describe(train, val, test, answers))

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
        **cost(model),
    }
    write_answers(options, report, predictions, test)
    write_results(options, model, test.name, {"accuracy": report["accuracy"]})


def head_of(options: Options) -> type[QAHead]:
    return cast(type[QAHead], find_head(options.head, "qa"))


def build_model(options: Options, train: QASplit, answers: tuple[str, ...]) -> VideoQAModel:
    texts = [text for q in train.questions for text in (q.question, *q.answers, *q.options)]
    words = words_of(options, texts, options.vocabulary) if head_of(options).needs_vocabulary else ()
    model = create_qa_model(options.model, words, options.head, answers, **tower(options, 12), **options.of_head())
    model.tune(options.tuned())
    model.input = VideoInput(options.sampling)
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def evaluate(
    model: VideoQAModel, encode: Any, split: QASplit, reader: VideoReader, device: torch.device, workers: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Accuracy and predictions on a split, all ranks together; `encode` is the model or its DeepSpeed engine."""
    encode.eval()
    predictions = predict(model, encode, split, reader, device, workers=workers)
    return accuracy(predictions, split, model.answers or None, normalize=not model.head.uses_answers), predictions


def describe(train: QASplit, val: QASplit | None, test: QASplit, answers: tuple[str, ...]) -> str:
    lines = [
        f"{name}: {len(s.questions)} questions" for name, s in (("train", train), ("val", val), ("test", test)) if s
    ]
    if answers:
        covered = f"{coverage(answers, test):.2f} % of {test.name}"
        lines.append(f"{len(answers)} answers of the training split, which hold an answer to {covered}")
    return "\n".join(lines)
