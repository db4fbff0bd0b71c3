"""Plots have content at one load and at several."""

from pathlib import Path

import pytest
from PIL import Image, ImageChops

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


def test_plots_show_that_the_device_is_emulated(tmp_path: Path) -> None:
    plain = plots.draw(write_benchmark(tmp_path / "a"))
    emulated = plots.draw(write_benchmark(tmp_path / "b", emulation="emulated device: 8 ms"))
    for without, with_line in zip(plain, emulated, strict=True):
        with Image.open(without.path) as left, Image.open(with_line.path) as right:
            difference = ImageChops.difference(left.convert("RGB"), right.convert("RGB"))
            assert difference.crop((0, right.height - 20, right.width, right.height)).getbbox(), with_line.title
