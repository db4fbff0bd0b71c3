"""Importing vLLM in a process that goes on working meanwhile."""

import gc
import importlib
from types import ModuleType

from runtime.errors import EngineError


def import_with_vllm(module: str) -> ModuleType:
    """Import a module that imports vLLM. Raises EngineError if vLLM cannot be imported.

    This takes seconds, so call it in a thread. The import creates a million objects, and none is garbage. So the
    collector neither runs meanwhile nor looks at these objects later. A collection would hold up all threads for a
    second, and on a busy machine for many. The interpreter's exit would also search all objects, which takes 2 s.
    """
    gc.collect()
    gc.disable()
    try:
        importlib.import_module("runtime.engines.torch_logging").propagate()
        return importlib.import_module(module)
    except ImportError as error:
        raise EngineError(f"vLLM cannot be imported ({error}); run `troupe doctor` to see how to fix it") from error
    finally:
        gc.freeze()
        gc.enable()
