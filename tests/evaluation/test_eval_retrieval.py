"""eval/retrieval.py on a tiny random model and a few rendered videos."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from evaluation.predict_runs import run_script
from safetensors import safe_open
from safetensors.torch import load_file
from training.processes import exit_codes, start

from tempme_vl.data import motion
from tempme_vl.data.motion import render_motion
from tempme_vl.data.retrieval import EvalCaptions, EvalVideos
from tempme_vl.data.video import VideoError
from tempme_vl.evaluation import retrieval_command as command
from tempme_vl.evaluation.metrics import dual_softmax, multi_caption_metrics, retrieval_metrics
from tempme_vl.evaluation.options import RetrievalOptions
from tempme_vl.evaluation.retrieval import Embeddings, embed, retrieval_report
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model
from tempme_vl.text.tokenizers import CLIPTokenizer, word_vocabulary

COMMAND = Path(__file__).parents[2] / "eval" / "retrieval.py"
CPU = torch.device("cpu")
NUM_TEST = 7
render_small = partial(
    render_motion, num_train=8, num_test=NUM_TEST, num_order_train=0, num_order_val=0, num_order_test=0
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_small(tmp_path_factory.mktemp("eval") / "motion")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    options = {"r": 1, "merge_layers": (2, 3), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 10}
    folder = tmp_path_factory.mktemp("eval") / "best"
    create_retrieval_model("open_clip:tiny", None, "tempme", 4, clip_position_std=0.5, **options).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def run(checkpoint, data):
    """run(...) -> embeddings and report of the rendered test split, with other options where given."""

    def evaluate(**options):
        given = {"dataset": "msrvtt", "data_root": data, "sampling": "uniform", "workers": 0, **options}
        chosen = RetrievalOptions(checkpoint=checkpoint, **given)
        return command.evaluate(chosen, command.split_of(chosen), CPU)

    return evaluate


@pytest.fixture
def one_broken(tmp_path):
    """Another data set of the same kind whose second test video is cut off."""
    root = render_small(tmp_path / "motion")
    file = root / "videos" / "video9.mp4"
    file.write_bytes(file.read_bytes()[:200])
    return root


def random_embeddings(captions_per_video: list[int], width: int = 6, seed: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    owners = [video for video, count in enumerate(captions_per_video) for _ in range(count)]
    video, text = (
        torch.randn(len(captions_per_video), width, generator=generator),
        torch.randn(len(owners), width, generator=generator),
    )
    unit = torch.nn.functional.normalize
    return Embeddings(unit(video), unit(text), torch.tensor(owners), torch.ones(len(video), dtype=torch.bool))


def test_embeddings_and_report_are_those_of_the_functions(run, checkpoint, data):
    embeddings, report = run()
    options = RetrievalOptions(checkpoint=checkpoint, dataset="msrvtt", data_root=data)
    split, model = command.split_of(options), RetrievalModel.from_pretrained(checkpoint).eval()
    preprocess = model.frontend.preprocessing
    reader = command.VideoReader(4, command.VideoTransform(preprocess), "uniform", timeout=None, on_broken="raise")
    captions = EvalCaptions(split, CLIPTokenizer(32))
    expected = embed(model, EvalVideos(split.videos, reader), captions, captions.video_of_caption, CPU, workers=0)
    torch.testing.assert_close(embeddings.video, expected.video)
    torch.testing.assert_close(embeddings.text, expected.text)
    metrics = retrieval_report(expected)
    assert metrics["videos"] == NUM_TEST
    assert {key: report[key] for key in metrics} == metrics
    assert (report["split"], report["num_frames"]) == ("msrvtt/test_1k", 4)
    assert report["broken_videos"] == {}


def test_umt_is_re_ranked(data, tmp_path, one_broken):
    """The report holds both rankings; a broken video is nobody's candidate in either."""
    split = command.split_of(RetrievalOptions(checkpoint=tmp_path, dataset="msrvtt", data_root=data))
    vocabulary = word_vocabulary([caption for captions in split.captions for caption in captions])
    torch.manual_seed(0)
    model = create_retrieval_model("umt:tiny", None, "none", 4, vocabulary=vocabulary, mode="joint")
    model.save_pretrained(tmp_path / "best")
    options = RetrievalOptions(
        checkpoint=tmp_path / "best",
        dataset="msrvtt",
        data_root=one_broken,
        sampling="uniform",
        workers=0,
        rerank=3,
        decode_timeout=None,
    )
    embeddings, report = command.evaluate(options, command.split_of(options), CPU)
    assert embeddings.fine_video["tokens"].shape == (NUM_TEST, 4 * 16, 64)
    assert len(embeddings.fine_text["states"]) == NUM_TEST
    again = report["reranked"]
    assert again["rerank_top_k"] == 3 and 3 * (NUM_TEST - 1) <= again["rerank_pairs"] <= NUM_TEST * (NUM_TEST - 1)
    assert report["unreadable_videos"] == again["unreadable_videos"] == 1
    assert max(again[way]["r5"] for way in ("t2v", "v2t")) <= 100 * (NUM_TEST - 1) / NUM_TEST
    assert "re-ranked t2v" in command.format_evaluation(report)
    plain, report = command.evaluate(replace(options, rerank=0), split, CPU)
    assert not plain.fine_video and "reranked" not in report


def test_motion_is_rendered_where_asked(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(motion, "render_motion", render_small)
    monkeypatch.chdir(tmp_path)
    assert len(command.split_of(RetrievalOptions(checkpoint=checkpoint, dataset="motion")).videos) == NUM_TEST
    assert (tmp_path / "runs" / "motion-data" / "motion.json").is_file()


def test_options_that_miss_each_other(checkpoint):
    with pytest.raises(ValueError, match="--dataset jsonl needs --annotations FILE and --video-root"):
        command.split_of(RetrievalOptions(checkpoint=checkpoint, dataset="jsonl"))
    with pytest.raises(ValueError, match="--dataset didemo needs --data-root"):
        command.split_of(RetrievalOptions(checkpoint=checkpoint, dataset="didemo"))


def test_saved_embeddings_are_unit_vectors_and_give_the_metrics(run, checkpoint, data, tmp_path):
    embeddings, report = run()
    file = tmp_path / "out" / "embeddings.safetensors"
    split = command.split_of(RetrievalOptions(checkpoint=checkpoint, dataset="msrvtt", data_root=data))
    command.save_embeddings(file, embeddings, split)
    saved = load_file(file)
    for side in ("video", "text"):
        torch.testing.assert_close(saved[side].norm(dim=-1), torch.ones(NUM_TEST))
    assert saved["video_of_caption"].tolist() == list(range(NUM_TEST)) and bool(saved["valid"].all())
    similarity = saved["text"] @ saved["video"].T
    assert report["t2v"] == pytest.approx(retrieval_metrics(similarity))
    assert report["v2t"] == pytest.approx(retrieval_metrics(similarity.T))
    with safe_open(file, "pt") as stored:
        assert json.loads(stored.metadata()["video_ids"]) == [video.video_id for video in split.videos]
        assert json.loads(stored.metadata()["captions"]) == [texts[0] for texts in split.captions]


@pytest.mark.parametrize("captions_per_video", [[1] * 9, [1, 3, 2, 1, 4, 1, 2, 1, 1]], ids=["one", "several"])
@pytest.mark.parametrize("use_dual_softmax", [False, True], ids=["plain", "dual softmax"])
def test_chunk_size_never_matters(captions_per_video, use_dual_softmax):
    embeddings = random_embeddings(captions_per_video)
    embeddings.valid[3] = False
    whole = retrieval_report(embeddings, use_dual_softmax)
    for chunk in (1, 2, 5, 9):
        assert retrieval_report(embeddings, use_dual_softmax, chunk) == whole


def test_dual_softmax_is_that_of_the_whole_matrix(run):
    embeddings, report = run(dual_softmax=True)
    similarity = embeddings.text @ embeddings.video.T
    assert report["dual_softmax"] is True
    assert report["t2v"] == pytest.approx(retrieval_metrics(dual_softmax(similarity)))
    assert report["v2t"] == pytest.approx(retrieval_metrics(dual_softmax(similarity.T)))

    embeddings = random_embeddings([1] * 40)
    similarity = embeddings.text @ embeddings.video.T
    report, plain = retrieval_report(embeddings, dual_softmax=True), retrieval_report(embeddings)
    assert report["t2v"] == pytest.approx(retrieval_metrics(dual_softmax(similarity)))
    assert report["v2t"] == pytest.approx(retrieval_metrics(dual_softmax(similarity.T)))
    assert report["t2v"] != plain["t2v"]


def test_unreadable_videos_are_counted_and_rank_last(run, one_broken):
    embeddings, report = run(data_root=one_broken)
    assert embeddings.valid.tolist() == [True, False] + [True] * (NUM_TEST - 2)
    assert (report["videos"], report["captions"], report["unreadable_videos"]) == (NUM_TEST, NUM_TEST, 1)
    assert list(report["broken_videos"]) == ["video9"]
    # the same scores with the broken video below everything: last as a candidate, and its own caption last for it
    similarity = embeddings.text @ embeddings.video.T
    similarity[:, 1] = -2.0
    by_video = similarity.T.clone()
    by_video[1] = 0.0
    by_video[1, 1] = -2.0
    for way, scores in (("t2v", similarity), ("v2t", by_video)):
        expected = retrieval_metrics(scores)
        # among 7 videos the last is among the first 10; what was not read is not found all the same
        assert report[way].pop("r10") == pytest.approx(100 * (NUM_TEST - 1) / NUM_TEST)
        assert expected.pop("r10") == 100
        assert report[way].pop("rsum") == pytest.approx(expected.pop("rsum") - 100 / NUM_TEST)
        assert report[way] == pytest.approx(expected)
    described = command.format_evaluation(report)
    assert "1 videos could not be read" in described and "could not read video9" in described


def test_unreadable_videos_are_an_error_when_asked(run, one_broken):
    with pytest.raises(VideoError, match=r"video9\.mp4"):
        run(data_root=one_broken, on_broken="raise")


def test_several_captions_give_both_definitions(run, data, tmp_path):
    annotations = tmp_path / "videos.jsonl"
    lines = [{"file": f"video{i}.mp4", "captions": [f"a thing {i} {j}" for j in range(1 + i % 3)]} for i in range(6)]
    annotations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    embeddings, report = run(
        dataset="jsonl", data_root=None, annotations=annotations, video_root=data / "videos", frame_cache=tmp_path
    )
    assert (report["videos"], report["captions"], report["split"]) == (6, 12, "videos/all")
    expected = multi_caption_metrics(embeddings.text @ embeddings.video.T, embeddings.video_of_caption)
    for direction, metrics in expected.items():
        assert report[direction] == pytest.approx(metrics)
        assert direction in command.format_evaluation(report)


def test_two_ranks_report_what_one_does(run, checkpoint, one_broken, tmp_path):
    embeddings, report = run(data_root=one_broken, dual_softmax=True)
    arguments = ["--checkpoint", checkpoint, "--dataset", "msrvtt", "--data-root", one_broken, "--sampling", "uniform"]
    arguments += ["--dual-softmax", "--workers", "0", "--batch-size", "2", "--json", tmp_path / "report.json"]
    arguments += ["--save-embeddings", tmp_path / "embeddings.safetensors"]
    log = tmp_path / "log"
    assert exit_codes(start(run_script, COMMAND, arguments, log=log, world=2)) == [0, 0], log.read_text()

    written = json.loads((tmp_path / "report.json").read_text())
    assert written.pop("ranks") == 2 and report.pop("ranks") == 1
    assert str(COMMAND) in written.pop("command") and written.pop("date") and "torch" in written.pop("versions")
    for direction in ("t2v", "v2t"):
        assert written.pop(direction) == pytest.approx(report.pop(direction))
    assert written == report
    saved = load_file(tmp_path / "embeddings.safetensors")
    torch.testing.assert_close(saved["video"], embeddings.video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(saved["text"], embeddings.text, atol=1e-5, rtol=1e-5)
    shown = log.read_text()
    for line in ("msrvtt/test_1k: 7 videos", "over all queries of the split", "dual softmax t2v"):
        assert shown.count(line) == 1, "one rank prints"


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_in_a_worker_ends_all_ranks_and_is_said_last(world, checkpoint, one_broken, tmp_path):
    """Of two ranks the second does not meet the broken video, and would wait for the first for ever."""
    arguments = ["--checkpoint", checkpoint, "--dataset", "msrvtt", "--data-root", one_broken, "--sampling", "uniform"]
    arguments += ["--workers", "2", "--batch-size", "1", "--on-broken", "raise"]
    log = tmp_path / "log"
    codes = exit_codes(start(run_script, COMMAND, arguments, log=log, world=world))
    assert codes[0] == 2 and None not in codes and 0 not in codes, log.read_text()
    said = [line for line in log.read_text().splitlines() if "video9.mp4: " in line]
    assert len(said) == 1 and "Traceback" not in log.read_text()


def test_the_result_is_shown_though_no_file_can_be_written(checkpoint, data, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--dataset", "msrvtt", "--data-root", data, "--workers", "0"]
    arguments += ["--json", checkpoint / "config.json" / "report.json", "--save-embeddings", tmp_path / "e.safetensors"]
    log = tmp_path / "log"
    assert exit_codes(start(run_script, COMMAND, arguments, log=log)) == [2]
    assert "plain t2v" in log.read_text()
    assert "report.json could not be written: " in log.read_text().splitlines()[-1]
    assert load_file(tmp_path / "e.safetensors")["valid"].all(), "what can be written is"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be 1 or more; got 0"),
        ({"workers": -1}, "--workers must be 0 or more; got -1"),
        ({"rerank": -1}, "--rerank must be 0 or more; got -1"),
        ({"decode_timeout": 0.0}, "--decode-timeout must be above 0; got 0.0"),
        ({"decode_timeout": float("nan")}, "--decode-timeout must be above 0; got nan"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_before_anything_starts(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command.main(RetrievalOptions(checkpoint=tmp_path / "none", dataset="msrvtt", **options))
