"""TESTA's pre-training: contrast, matching and captions of pictures and videos (recipes/pretrain.py)."""

from __future__ import annotations

from dataclasses import replace

from tempme_vl.data.reader import VideoReader
from tempme_vl.data.retrieval import TrainPairs
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.stills import is_still
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.recipes.build import optimizer, tower, video_reader, words_of
from tempme_vl.recipes.loop import fit
from tempme_vl.recipes.options.pretraining import Options
from tempme_vl.recipes.report import about_run, cost, write_report
from tempme_vl.recipes.start import announce, begin, check_files, facts, in_words
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.testa.create import create_testa_pretraining_model
from tempme_vl.tasks.testa.model import ContrastOptions
from tempme_vl.tasks.testa.pretraining import TestaPretrainingModel
from tempme_vl.training.engine import Trainer

# what a picture is augmented by where videos are so
OF_PICTURES = {"crop_augment": "crop_flip_augment"}


def main(options: Options) -> None:
    device = begin(options)
    train = options.source().captions(options.train_split)
    check_files(options, train)
    model = build_model(options, train).to(device)
    model.input = Inputs("uniform", model.text.max_words(options.max_words))
    trainer = Trainer(
        model,
        optimizer(options, model, model.is_new_parameter),
        TrainPairs(train, train_reader(options, model), model.words.tokenizer(model.input.max_words), options.seed),
        with_warmup(options, train),
        facts(options, model.frontend.full_config().to_dict(), train=train),
    )
    pictures = sum(is_still(video.path) for video in train.videos)
    kinds = f"{len(train.videos) - pictures} videos and {pictures} pictures"
    announce(options, in_words(options, model), f"train {train.name}: {kinds}, {train.num_captions} captions")

    trained = fit(options, trainer, model, None)
    if trained is None:
        return
    report = {"model": options.model, **about_run(options, trainer, trained, None), **cost(model)}
    shown = f"{train.num_captions} pairs, {trainer.total_steps} steps: {options.output / 'best'}"
    write_report(options, report, shown)


def build_model(options: Options, train: RetrievalSplit) -> TestaPretrainingModel:
    texts = [caption for captions in train.captions for caption in captions]
    model = create_testa_pretraining_model(
        options.model,
        words_of(options, texts, options.vocabulary),
        training=ContrastOptions(**options.of_contrast()),
        temporal_scaling=options.temporal_scaling,
        **tower(options, train.num_frames),
    )
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def train_reader(options: Options, model: TestaPretrainingModel) -> VideoReader:
    """With augmentation, of pictures another than of videos."""
    frontend = model.frontend
    videos = VideoTransform(frontend.preprocessing, options.augment, normalize=False)
    pictures = VideoTransform(
        frontend.preprocessing, OF_PICTURES.get(options.augment, options.augment), normalize=False
    )
    return replace(video_reader(options, frontend.schedule.frames, videos), pictures=pictures)


def with_warmup(options: Options, train: RetrievalSplit) -> Options:
    """With the share of steps that --warmup-steps are."""
    steps = train.num_captions // options.batch_size * options.epochs
    return (
        replace(options, warmup=min(1.0, options.warmup_steps / steps)) if options.warmup_steps and steps else options
    )
