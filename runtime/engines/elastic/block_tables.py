"""Keeps blocks that are about to be released out of the block tables of vLLM's model runners.

A block table lists the KV blocks of each request. vLLM's scheduler frees blocks of a running request, for example once
a sliding window has passed them. Its worker keeps their ids in the table, and attention kernels read some of them and
mask what they read: Triton's and FlashAttention's kernels the rest of the tile in which the window begins, FlashInfer's
decode kernel all of them. vLLM can allow that, because its blocks always have memory.
"""

from typing import Any

import torch

NULL_BLOCK = 0
"""The id that vLLM itself puts in place of such blocks when it resumes a request. The block always has memory."""


def forget_blocks(runner: Any, first: int, is_v2: bool) -> None:
    """Replace the ids from `first` up in a model runner's block tables by the null block. No request may use them.

    Call it in the thread that runs the steps. Steps that the device was given before may see either id.
    """
    if is_v2:
        _forget_v2(runner.block_tables, first)
    else:
        _forget_v1(runner, first)


@torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not analysed: see pyproject.toml
def _forget_v2(tables: Any, first: int) -> None:
    """Change the tables on the device, of which the V2 model runner keeps no copy."""
    for table in (*(staged.gpu for staged in tables.block_tables), *tables.input_block_tables):
        table.masked_fill_(table >= first, NULL_BLOCK)


def _forget_v1(runner: Any, first: int) -> None:
    """Change the tables on the host, which each step copies to the device, and the lists from which vLLM fills them."""
    batch = runner.input_batch
    for group, table in enumerate(batch.block_table.block_tables):
        rows = table.get_numpy_array()[: batch.num_reqs]
        released = rows >= first
        rows[released] = NULL_BLOCK
        changed = released.any(axis=1)
        for request_id, request in runner.requests.items():
            row = batch.req_id_to_index.get(request_id)
            if row is None or changed[row]:  # a request that the last step left out has no row
                ids = request.block_ids[group]
                ids[:] = [block if block < first else NULL_BLOCK for block in ids]
