"""Keeps shared access signatures out of Lightning's log."""

from __future__ import annotations

import logging
import re

from .stock import CheckpointIO, pytorch

__all__ = ["keep_signatures_out_of_logs"]

# The query of a URL that has a signature.
_SIGNED_QUERY = re.compile(r"\?[^\s?\"'`]*\bsig=[^\s\"'`]*", re.IGNORECASE)


class _SignatureFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if _SIGNED_QUERY.search(message) is not None:
            record.msg, record.args = _SIGNED_QUERY.sub("", message), ()
        return True


_filter = _SignatureFilter()


def keep_signatures_out_of_logs() -> None:
    """From now on, remove queries with a signature from the URLs in Lightning's log.

    Lightning logs the ``ckpt_path`` that it was given ("Restoring states from the checkpoint path at ...") before it
    calls a plugin, a strategy or a callback. So the signature can only be removed here.
    """
    roots = {module.partition(".")[0] for module in (pytorch.__name__, CheckpointIO.__module__)}
    for name, logger in list(logging.root.manager.loggerDict.items()):
        # A logger's filters do not apply to the loggers below it.
        if name.partition(".")[0] in roots and isinstance(logger, logging.Logger):
            logger.addFilter(_filter)  # a second time changes nothing
