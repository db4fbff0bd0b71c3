"""Modelled engines allocate whole KV blocks and keep one null block, as vLLM does."""

import asyncio

from agents.role import Message
from runtime.engines.request import GenerateRequest
from runtime.simulation import load, virtual_time
from runtime.simulation.load import EngineModel, Model

MIB = 1 << 20
MODEL = Model(
    lanes=1,
    engines=dict.fromkeys("ab", EngineModel(step_s=0.01, token_s=0, block_bytes=MIB, block_tokens=16, max_num_seqs=8)),
)


def test_engine_with_five_blocks_runs_four_sequences() -> None:
    async def work() -> int:
        scripts = dict.fromkeys("ab", lambda request: "one two")
        async with load.engines(MODEL, scripts, 10 * MIB) as (engines, sharing):
            assert sum(sharing.ledger.held.values()) == 10 * MIB
            running = []

            async def ask(number: int) -> None:
                request = GenerateRequest(f"r{number}", (Message("user", "hello"),), 0.0, 1.0, 16)
                running.extend([engines["a"].stats().running async for _ in engines["a"].generate(request)])

            await asyncio.gather(*map(ask, range(8)))
            assert engines["a"].limits.block_bytes == MIB
            return max(running)

    assert virtual_time.run(work()) == 4
