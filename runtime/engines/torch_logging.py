"""Redirects PyTorch's logging, which PyTorch sends to stderr by itself."""

import logging

import torch  # noqa: F401 (importing it adds the handlers)


def propagate() -> None:
    """Send the records of PyTorch's loggers to the root logger's handlers only.

    Importing PyTorch gives each of its loggers a handler for stderr and stops propagation, so a program that sends its
    logging to a file still shows, for example, "No CUDA runtime is found". Call it before importing vLLM.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if not name.startswith("torch") or not isinstance(logger, logging.Logger):
            continue
        for handler in [h for h in logger.handlers if type(h) is logging.StreamHandler]:
            logger.removeHandler(handler)
            logger.propagate = True
