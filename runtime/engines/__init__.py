"""Engines behind one seam: `base` is the contract, `vllm_engine` the real one, `fake` the shipped stand-in."""
