"""Rows of a comparison on one video-language model: how they are written, and what each one runs; on tiny hosts."""

from __future__ import annotations

import pytest
from integrations import tiny_post

from tempme_vl.evaluation.videollm.rows import (
    ALWAYS,
    Case,
    Inputs,
    Row,
    all_cases,
    all_rows,
    build,
    fewer_inputs,
    in_words,
)
from tempme_vl.integrations import compress
from tempme_vl.integrations.base import Where
from tempme_vl.integrations.tiny import tiny_host
from tempme_vl.registries import COMPRESSORS, METHODS

WHOLE = Inputs(8, 32)
KEEPS_SIZE = "Qwen2_5_VL"  # the others bring frames to one size


@pytest.mark.parametrize("text", ["none", "tempme@tower", "evs", "tome@behind:r=4,budget=0.5", "frames", "resolution"])
def test_a_row_is_read_and_named(text: str) -> None:
    assert Row.parse(text).name == text


@pytest.mark.parametrize("text", ["tomy", "tome@head", "tome:r", "none@tower", "frames:r=3", ""])
def test_other_rows_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^row "):
        Row.parse(text)


def test_places_and_options_are_those_of_compress() -> None:
    places = [Row.parse(text).where for text in ("tempme", "tempme@tower", "random", "random@tower", "evs")]
    assert places == ["auto", "tower", "behind", "tower", "auto"]
    given = Row.parse("tempme:merge_layers=16/18/20,r=4,attend=clip,share=0.5").given
    assert given == {"merge_layers": (16, 18, 20), "r": 4, "attend": "clip", "share": 0.5}
    assert in_words(given) == "merge_layers=16/18/20,r=4,attend=clip,share=0.5"


def test_plain_baselines_are_in_whatever_is_asked_for() -> None:
    assert [row.name for row in all_rows(["evs", "pool"])] == [*ALWAYS, "evs"]
    names = {row.method for row in all_rows([])}
    assert names == {*ALWAYS, *METHODS, *COMPRESSORS}
    with pytest.raises(ValueError, match="each row once; got evs, evs"):
        all_rows(["evs", "evs"])


def test_each_row_is_run_at_each_budget_unless_nothing_can_be_solved_for() -> None:
    rows = [Row("none"), Row("frames"), Row("sttm"), Row.parse("evs:budget=0.3"), Row.parse("evs")]
    names = [case.name for case in all_cases(rows, (0.1, 0.5, 0.1))]
    assert names == ["none", "frames 0.5", "frames 0.1", "sttm", "evs:budget=0.3", "evs 0.5", "evs 0.1"]
    assert len({case.file for case in all_cases(rows, (0.1, 0.5))}) == 7


# ---- what a case runs


def test_frames_are_fewer_and_smaller_up_to_the_budget() -> None:
    if not tiny_post.PLACED:
        pytest.skip("compress refuses this host with this transformers")
    model, processor = tiny_host(KEEPS_SIZE, ["what"])  # 4 x 4 tokens of 2 frames of 32 x 32 pixels
    assert fewer_inputs(model, processor, "frames", 0.5, WHOLE) == Inputs(4, 32)
    small = fewer_inputs(model, processor, "resolution", 0.25, WHOLE)
    costs = [compress(model, processor, "none", 8).counts((side, side)).native for side in range(28, 15, -1)]
    wanted = next(28 - i for i, count in enumerate(costs) if count <= 16)
    assert small == Inputs(8, wanted)
    with pytest.raises(ValueError, match="6 tokens cannot be reached by fewer or smaller frames: the lowest is 16"):
        fewer_inputs(model, processor, "frames", 0.1, WHOLE)


@pytest.mark.skipif(not tiny_post.NEW, reason="compress refuses this host with this transformers")
def test_a_tower_that_joins_two_frames_gets_two_at_least() -> None:
    model, processor = tiny_post.build("Qwen3-VL")  # whose processor refuses one
    assert fewer_inputs(model, processor, "frames", 0.5, WHOLE) == Inputs(4, 32)


def test_a_host_that_resizes_all_frames_has_no_smaller_ones() -> None:
    model, processor = tiny_host("VideoLlava", ["what"])
    with pytest.raises(ValueError, match="as many tokens of frames of 32 x 32 pixels as of those of 16 x 16"):
        fewer_inputs(model, processor, "resolution", 0.5, WHOLE)
    built = build(model, processor, Case(Row("frames"), 0.5), WHOLE)
    assert built.inputs == Inputs(4, 32) and built.compressed.counts() == (68, 68)


def test_what_a_case_runs_is_what_compress_makes() -> None:
    model, processor = tiny_host("VideoLlava", ["what"])
    places: dict[str, Where] = {"tempme@tower": "tower", "tempme@behind": "behind", "random": "behind"}
    for text, where in places.items():
        built = build(model, processor, Case(Row.parse(text), 0.25), WHOLE)
        expected = compress(model, processor, text.split("@")[0], 8, where, budget=0.25)
        assert built.compressed.host.config() == expected.host.config()
        assert built.compressed.counts().ours == expected.counts().ours
    own = build(model, processor, Case(Row.parse("evs:budget=0.6")), WHOLE)
    assert own.compressed.counts() == compress(model, processor, "evs", 8, budget=0.6).counts()
