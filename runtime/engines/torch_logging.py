"""PyTorch's logging, which PyTorch sends to stderr by itself."""

import logging

import torch  # noqa: F401 (importing it adds the handlers)


def propagate() -> None:
    """Let the records of PyTorch's loggers reach the root logger's handlers, and nothing else.

    Importing PyTorch gives each of its loggers a handler for stderr and stops propagation, so a program that sends its
    logging to a file still shows, for example, "No CUDA runtime is found". Call it before importing vLLM.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if not name.startswith("torch") or not isinstance(logger, logging.Logger):
            continue
        for handler in [one for one in logger.handlers if type(one) is logging.StreamHandler]:
            logger.removeHandler(handler)
            logger.propagate = True
