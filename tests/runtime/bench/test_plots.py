"""Plots have content at one load and at several."""

from pathlib import Path

import pytest
from PIL import Image

from runtime.bench import plots
from tests.runtime.bench.benchmarks import write_benchmark


@pytest.mark.parametrize("loads", [(1.0,), (0.5, 1.0, 1.5)])
def test_plots_are_not_blank(tmp_path: Path, loads: tuple[float, ...]) -> None:
    drawn = plots.draw(write_benchmark(tmp_path / "a", loads=loads))
    assert [plot.path.stem for plot in drawn] == ["latency", "jct-cdf", "ttft-cdf", "shares", "queues"]
    for plot in drawn:
        with Image.open(plot.path) as image:
            assert image.width >= 800
            colours = image.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert len(colours) > 50
