"""Constants follow from published figures, shipped files hold them, and an engine does the work that they predict."""

import asyncio
from pathlib import Path

import pytest

from agents.role import Message
from runtime import config as configuration
from runtime.bench import workload
from runtime.bench.plan import phase_teams
from runtime.bench.workload import Lengths, Source
from runtime.config import SHIPPED
from runtime.engines.request import GenerateRequest
from runtime.simulation import load, roofline, virtual_time
from runtime.simulation.calls import calls_per_s
from runtime.simulation.lengths import drawn
from runtime.simulation.roofline import GPU, REGIMES, Shape, SharingMode
from tests.runtime.bench.benchmarks import invoke

BILLION = 10**9
FIXED = Lengths(prompt=(1000, 1000), reply=(200, 200))
CALLS = {"quiet": dict.fromkeys(("planner", "solver", "critic"), 1.0), "busy": {"solver": 8.0}}


def shape(name: str) -> Shape:
    return Shape.read(SHIPPED / "shapes" / f"{name}.json")


def derive(gpu: str, mode: SharingMode = SharingMode.TIME_SLICING) -> load.Model:
    return roofline.derive(REGIMES[gpu], "mine", dict.fromkeys(REGIMES[gpu].shapes, FIXED), CALLS, mode)


@pytest.mark.parametrize(
    ("name", "billions", "layers_billions"),
    [
        ("qwen2.5-0.5b", 0.49, 0.36),  # as stated by the models' cards
        ("qwen2.5-1.5b", 1.54, 1.31),
        ("qwen2.5-7b", 7.61, 6.53),
        ("qwen2.5-14b", 14.7, 13.1),
        ("qwen2.5-32b", 32.5, 31.0),
        ("qwen3-4b", 4.0, 3.6),
        ("phi-4", 14.7, 13.6),
    ],
)
def test_parameters_are_those_of_the_model_card(name: str, billions: float, layers_billions: float) -> None:
    assert shape(name).parameters / BILLION == pytest.approx(billions, rel=0.015)
    assert shape(name).layer_parameters / BILLION == pytest.approx(layers_billions, rel=0.015)


def test_token_takes_a_key_and_a_value_in_each_layer() -> None:
    assert shape("qwen2.5-7b").token_bytes == 56 * 1024  # as in configs/README.md
    assert shape("qwen3-4b").token_bytes == 2 * 36 * 8 * 128 * 2  # its head size is not hidden / heads


@pytest.mark.parametrize(
    ("gpu", "config"), [("l4", "gpu-24gb"), ("a100", "gpu-80gb"), ("h100", "gpu-80gb"), ("h200", "gpu-h200")]
)
def test_models_and_sequences_are_those_of_the_configuration(gpu: str, config: str) -> None:
    engines = configuration.load(config).engines
    assert engines.keys() == REGIMES[gpu].shapes.keys()
    for name, engine in engines.items():
        assert engine.model.rpartition("/")[2].lower().startswith(REGIMES[gpu].shapes[name])
        assert engine.max_num_seqs == REGIMES[gpu].max_num_seqs


def test_decode_step_reads_the_weights_and_each_sequence_s_cache() -> None:
    gpu, model = GPU(24 * BILLION, 300e9, 121e12, 32e9), shape("qwen3-4b")
    engine = roofline.engine_model(model, gpu, 1000, 32)
    read_bytes = model.decode_parameters * 2 + 32 * 1000 * model.token_bytes
    assert engine.decode_step_s(32) == pytest.approx(roofline.LAUNCH_S + read_bytes / (300e9 * 0.8))
    assert engine.token_s == pytest.approx(1000 * model.token_bytes / (300e9 * 0.8))


def test_decode_step_is_bound_by_arithmetic_if_that_is_slower() -> None:
    model = shape("qwen2.5-0.5b")
    engine = roofline.engine_model(model, GPU(24 * BILLION, 300e12, 1e12, 32e9), 1000, 32)
    assert engine.decode_step_s(32) == pytest.approx(roofline.LAUNCH_S + 32 * 2 * model.decode_parameters / 0.5e12)


@pytest.mark.parametrize("gpu", REGIMES)
def test_memory_bounds_every_decode_step_of_the_regimes(gpu: str) -> None:
    for name, engine in derive(gpu).engines.items():
        model, bytes_per_s = shape(REGIMES[gpu].shapes[name]), REGIMES[gpu].gpu.bytes_per_s * 0.8
        assert engine.step_s == pytest.approx(roofline.LAUNCH_S + model.decode_parameters * 2 / bytes_per_s)


def test_kv_cache_is_what_weights_and_buffers_leave() -> None:
    expected = 0.9 * 141 - 3 * 2 - 2 * sum(shape(name).parameters for name in roofline.LARGE.values()) / BILLION
    assert derive("h200").kv_cache_bytes == pytest.approx(expected * BILLION)


def test_critic_of_14b_does_not_fit_80_gb() -> None:
    shapes = [shape(name) for name in ("qwen2.5-7b", "qwen2.5-14b", "phi-4")]
    assert roofline.kv_cache_bytes(REGIMES["h100"].gpu, shapes) < 0


def test_engine_with_full_batches_takes_the_time_that_the_rates_assume() -> None:
    derived = derive("l4")
    device_s_per_call = roofline.UTILIZATION / derived.rate_factors["mine"] / CALLS["busy"]["solver"]
    calls = 32 * 10

    async def work() -> float:
        scripts = dict.fromkeys(derived.engines, lambda request: "done")
        async with load.engines(derived, scripts, 100 * BILLION, lengths={"solver": drawn(FIXED)}) as (engines, _):

            async def ask(number: int) -> None:
                request = GenerateRequest(f"r{number}", (Message("user", "x"),), 0.0, 1.0, 16)
                async for _ in engines["solver"].generate(request):
                    pass

            started = asyncio.get_running_loop().time()
            await asyncio.gather(*map(ask, range(calls)))
            return asyncio.get_running_loop().time() - started

    assert virtual_time.run(work()) == pytest.approx(calls * device_s_per_call, rel=0.1)


def test_mps_lanes_are_what_one_engine_leaves_of_the_busiest_resource() -> None:
    model, gpu = shape("qwen3-4b"), REGIMES["l4"].gpu
    steps = 200 / 32  # of one call, in a batch of 32
    memory_s = steps * (model.decode_parameters * 2 + 32 * 1100 * model.token_bytes) / (gpu.bytes_per_s * 0.8)
    compute_s = 1000 * 2 * model.layer_parameters / (gpu.flops_per_s * 0.5)
    serial_s = memory_s + compute_s + steps * roofline.LAUNCH_S
    assert derive("l4", SharingMode.MPS).lanes == pytest.approx(serial_s / memory_s)
    assert derive("l4", SharingMode.MPS).rate_factors == derive("l4").rate_factors
    assert derive("l4").lanes == 1


@pytest.fixture(scope="module")
def realistic() -> Source:
    return workload.load("realistic")


@pytest.fixture(scope="module")
def calls(realistic: Source) -> dict[str, dict[str, float]]:
    """Return the calls of the shipped workload, which take seconds to count."""
    return virtual_time.run(calls_per_s(realistic, phase_teams(configuration.load("embedded"), realistic)))


@pytest.fixture(scope="module")
def gaps() -> Source:
    return workload.load("gaps-long")


@pytest.fixture(scope="module")
def calls_in_gaps(gaps: Source) -> dict[str, dict[str, float]]:
    return virtual_time.run(calls_per_s(gaps, phase_teams(configuration.load("embedded-serverless"), gaps)))


@pytest.mark.parametrize("gpu", REGIMES)
def test_shipped_constants_are_the_derived_ones(
    gpu: str, realistic: Source, calls: dict[str, dict[str, float]]
) -> None:
    mode = SharingMode.TIME_SLICING
    derived = roofline.derive(REGIMES[gpu], "realistic", realistic.workload.lengths, calls, mode)
    fitted = f"troupe simulate roofline {gpu} realistic --sharing time-slicing; derived, not measured"
    assert load.read(gpu) == derived.model_copy(update={"fitted": fitted})


@pytest.mark.parametrize("gpu", REGIMES)
def test_shipped_constants_of_sleeping_engines_are_the_derived_ones(
    gpu: str, gaps: Source, calls_in_gaps: dict[str, dict[str, float]]
) -> None:
    derived = roofline.derive(
        REGIMES[gpu], "gaps-long", gaps.workload.lengths, calls_in_gaps, SharingMode.TIME_SLICING, sleeping=True
    )
    command = f"troupe simulate roofline {gpu} gaps-long --config embedded-serverless --sharing time-slicing"
    assert load.read(f"{gpu}-serverless") == derived.model_copy(update={"fitted": f"{command}; derived, not measured"})


def test_an_engine_wakes_by_copying_its_weights_over_pcie(
    gaps: Source, calls_in_gaps: dict[str, dict[str, float]]
) -> None:
    derived = load.read("h100-serverless")
    weights_bytes = shape("qwen2.5-14b").parameters * 2
    solver = derived.engines["solver"]
    assert solver.fixed_bytes == weights_bytes + roofline.ENGINE_BYTES
    assert solver.wake_s == pytest.approx(0.05 + weights_bytes / 51.2e9)
    needed = {name: engine.fixed_bytes for name, engine in derived.engines.items()}
    assert derived.device_bytes is not None
    assert needed["planner"] + needed["solver"] + needed["judge"] < derived.device_bytes < sum(needed.values())
    assert derived.engines["checker"] == derived.engines["judge"]
    assert calls_in_gaps["gap-1"] == {}
    assert calls_in_gaps["burst-1"]["checker"] > 0
    assert calls_in_gaps["burst-1"]["judge"] == 0


def test_calls_are_those_of_the_workflow(calls: dict[str, dict[str, float]]) -> None:
    assert calls["planner-heavy"]["planner"] == 3 * 12
    assert calls["planner-heavy"]["critic"] == 0
    assert calls["critic-heavy"]["critic"] == pytest.approx(4 * calls["critic-heavy"]["solver"])


LENGTHS = "{planner: &l {prompt: [10, 20], reply: [10, 20]}, solver: *l, critic: *l}"


def write(folder: Path, load: str) -> Path:
    path = folder / "w.yaml"
    problems = SHIPPED / "problems" / "held-out.jsonl"
    path.write_text(f"problems: {problems}\nlengths: {LENGTHS}\nphases: [{{name: a, seconds: 5, {load}}}]\n")
    return path


def test_command_writes_constants_for_a_workload(tmp_path: Path) -> None:
    path, written = write(tmp_path, "jobs_per_s: 2"), tmp_path / "written.yaml"
    result = invoke("simulate", "roofline", "h100", path, "--sharing", "mps", "--out", written)
    assert result.exception is None, result.exception
    constants = load.read(str(written))
    assert constants.kv_cache_bytes == load.read("h100").kv_cache_bytes
    assert constants.rate_factors.keys() == {"w"}
    assert constants.lanes > 1
    assert constants.fitted.endswith("derived, not measured")


def test_workload_without_lengths_or_rates_is_refused(tmp_path: Path) -> None:
    assert "lengths.planner: this key is required" in str(invoke("simulate", "roofline", "l4", "phases").exception)
    closed = invoke("simulate", "roofline", "l4", write(tmp_path, "concurrency: 2"))
    assert "phases.a.jobs_per_s: this key is required" in str(closed.exception)
