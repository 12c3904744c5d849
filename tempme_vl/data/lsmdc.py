"""LSMDC (Rohrbach et al., 2015): clips of movies with one sentence each. The data are given out under a licence."""

from __future__ import annotations

from pathlib import Path

from tempme_vl.data.splits import RetrievalSplit, check_split_name, find_annotations, make_split

FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}


def read_split(root: str | Path, split: str, video_root: str | Path | None = None) -> RetrievalSplit:
    """Reads the split's file: tab-separated, without quoting: clip, four times, sentence. 32 words, 12 frames.

    Only three lines of the test file were at hand when this was written; a line of another form is a ValueError
    that names it. Several sentences of one clip become its captions.
    """
    check_split_name("lsmdc", split, FILES)
    (path,) = find_annotations(root, [FILES[split]], ("lsmdc_data",))
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 6 or not fields[0].strip() or not fields[5].strip():
            raise ValueError(f"{path}, line {number}: expected clip, 4 times and a sentence between tabs; got {line!r}")
        captions.setdefault(fields[0].strip(), []).append(fields[5])
    return make_split(f"lsmdc/{split}", captions, root, video_root, ("LSMDC_Videos", "avi"))
