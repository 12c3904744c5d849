"""MSVD (Chen and Dolan, ACL 2011): 1,970 videos, about 40 captions each, many of them per test video too."""

from __future__ import annotations

from tempme_vl.data.dataset import DataSet, Place, Texts
from tempme_vl.data.files import AnnotationError, as_file_id, as_texts, errors_at, load_json, read_lines
from tempme_vl.data.splits import RetrievalSplit, find_annotations, make_split
from tempme_vl.messages import few, shown

VIDEO_FOLDERS = ("MSVD_Videos", "YouTubeClips")


def read_split(place: Place, split: str) -> RetrievalSplit:
    """Reads captions_msvd.json (`{id: [captions]}`) and {train,val,test}_list.txt under `root`.

    1,200 / 100 / 670 videos. Pickled captions of other layouts are not read: unpickling runs foreign code.
    """
    captions_path, list_path = find_annotations(place.root, ["captions_msvd.json", f"{split}_list.txt"], ("msvd_data",))
    data = load_json(captions_path)
    if not isinstance(data, dict):
        raise AnnotationError(f"{captions_path}: expected {{id: [captions]}}; got {shown(data)}")
    captions: dict[str, list[str]] = {}
    for video_id, texts in data.items():
        with errors_at(f"{captions_path}, entry {shown(video_id)}"):
            captions[as_file_id(video_id)] = list(as_texts("captions", texts))
    chosen: dict[str, list[str]] = {}
    unknown = []
    for where, line in read_lines(list_path):
        with errors_at(where):
            video_id = as_file_id(line.strip())
            if video_id in chosen:
                raise ValueError(f"{video_id} again")
        if video_id in captions:
            chosen[video_id] = captions[video_id]
        else:
            unknown.append(video_id)
    if unknown:
        raise AnnotationError(
            f"{list_path}: {len(unknown)} ids have no captions in {captions_path}, e.g. {few(unknown)}"
        )
    return make_split(f"msvd/{split}", list_path, chosen, place, VIDEO_FOLDERS)


DATASET = DataSet(
    title="MSVD (Chen and Dolan, ACL 2011)",
    files="captions_msvd.json and {train,val,test}_list.txt",
    captions=Texts(read_split),
)
