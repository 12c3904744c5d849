"""Condensed Movies (Bain et al., ACCV 2020): key scenes of films with a description each, as its challenge gives
them."""

from __future__ import annotations

from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.files import as_file_id, as_text, csv_rows, errors_at
from tempme_vl.data.splits import RetrievalSplit, find_annotations, make_split, noted
from tempme_vl.messages import shown

FILES = {"train_val_challf0.csv": ("train", "val"), "test_challf0.csv": ("test",)}
COLUMNS = ("videoid", "split", "caption")
UNSCORED = "the challenge tells nobody which caption is of which video: no scores, the similarities are what it wants"


def read_split(place: Place, split: str) -> RetrievalSplit:
    """Reads train_val_challf0.csv or test_challf0.csv: columns `videoid`, `split` and `caption`, others ignored.

    Several captions of one video are all its captions. The videos are whole files, in public copies VIDEOID.mkv.
    Neither file was at hand when this was written.
    """
    file, there = next((file, there) for file, there in FILES.items() if split in there)
    (path,) = find_annotations(place.root, [file])
    captions: dict[str, list[str]] = {}
    seen: set[tuple[str, ...]] = set()
    for where, row in csv_rows(path, COLUMNS):
        with errors_at(where):
            if row["split"] not in there:
                raise ValueError(f"expected a split {' or '.join(there)}; got {shown(row['split'])}")
            if tuple(row.values()) in seen:
                raise ValueError(f"the row of {row['videoid']} again")
            seen.add(tuple(row.values()))
            video_id, caption = as_file_id(row["videoid"]), as_text("caption", row["caption"])
            if row["split"] == split:
                captions.setdefault(video_id, []).append(caption)
    found = make_split(f"condensed_movies/{split}", path, captions, place)
    return noted(found, UNSCORED) if split == "test" else found


DATASET = DataSet(
    title="Condensed Movies (Bain et al., ACCV 2020), as its challenge",
    files=" and ".join(FILES),
    captions=Texts(read_split, usual=SplitNames("train", None, "val", holdout=500)),
    num_frames=32,
)
