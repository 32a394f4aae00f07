"""scripts/parts/fault_node.py: a node is lost, and the spare takes its place."""

from pathlib import Path

import pytest

from scripts.parts.fault_node import lose_node


@pytest.mark.slow
@pytest.mark.parametrize("way", ["killed", "cut"])
def test_a_spare_takes_the_place_of_a_lost_node(way: str, tokens: Path, tmp_path: Path) -> None:
    lost = lose_node(tmp_path, tokens, way)
    if lost.skipped:
        pytest.skip(lost.skipped)
    assert lost.started_s is not None
    assert lost.trained_s is not None, "the spare was started, and no step was done"
    logs = {log.name: log.read_text() for log in tmp_path.glob("node-*.txt")}
    assert "resumes from" in logs["node-a.txt"]
    silence = "flashtrain: nothing is heard of node 1" in logs["node-a.txt"]
    assert silence == (way == "cut")
