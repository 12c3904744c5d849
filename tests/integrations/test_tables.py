"""What the pages say of hosts is what the hosts say of themselves."""

from __future__ import annotations

import re
from pathlib import Path

from tempme_vl.integrations import HOSTS, Host
from tempme_vl.integrations.in_encoder import InEncoderHost
from tempme_vl.integrations.perception_lm import PerceptionLMHost, RotaryPerceptionLMHost
from tempme_vl.integrations.post_encoder import PostEncoderHost

ROOT = Path(__file__).parents[2]
OWN = {name: host for name, host in HOSTS.items() if host.__module__.startswith("tempme_vl.")}


def plain(name: str) -> str:
    """Qwen2_5_VLForConditionalGeneration and "Qwen2.5-VL as published" are one."""
    first = name.split(" ")[0].removesuffix("ForConditionalGeneration")
    return re.sub(r"\W|_", "", first).lower()


def names(cell: str) -> set[str]:
    return {plain(name.strip()) for name in cell.split(",")}


def those(kind: type[Host]) -> set[str]:
    found = {plain(name) for name, host in OWN.items() if issubclass(host, kind)}
    if issubclass(RotaryPerceptionLMHost, kind):  # which of the two its model gets depends on its tower
        found |= {plain(name) for name, host in OWN.items() if host is PerceptionLMHost}
    return found


def test_the_readme_lists_all_hosts_where_they_merge() -> None:
    head = "| merged inside the encoder | merged behind the encoder |\n|---|---|\n"
    row = (ROOT / "README.md").read_text().split(head)[1].split("\n")[0]
    inside, behind = (names(cell) for cell in row.strip("| ").split(" | "))
    assert inside == those(InEncoderHost) and behind == those(PostEncoderHost)
    assert inside | behind == {plain(name) for name in OWN}


def test_the_page_of_lmms_eval_lists_those_that_are_told_times() -> None:
    (listed,) = re.findall(
        r"Hosts that write times into the prompt \((.*?)\)", (ROOT / "docs/lmms_eval.md").read_text(), re.DOTALL
    )
    assert names(listed) == {plain(name) for name, host in OWN.items() if host.uses_time}
