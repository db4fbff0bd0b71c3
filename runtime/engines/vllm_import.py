"""Import vLLM without holding up the other threads of the process."""

import gc
import importlib
import sys
import threading
from types import ModuleType

from runtime.errors import EngineError

_importing = threading.Lock()


def import_with_vllm(module: str) -> ModuleType:
    """Import a module that imports vLLM. Raises EngineError if vLLM cannot be imported.

    This takes seconds, so call it in a thread. The import creates a million objects, and none is garbage. So the
    collector does not run meanwhile. A collection would hold up all threads for a second, and on a busy machine for
    many. Afterwards all objects of the process are frozen, and stay frozen: the collector never looks at them. Without
    this, the interpreter's exit would search them, which takes 2 s.
    """
    with _importing:
        if module in sys.modules:
            return sys.modules[module]
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            importlib.import_module("runtime.engines.torch_logging").propagate()
            return importlib.import_module(module)
        except ImportError as error:
            raise EngineError(f"vLLM cannot be imported ({error}); run `troupe doctor` to see how to fix it") from error
        finally:
            gc.freeze()
            if enabled:
                gc.enable()
