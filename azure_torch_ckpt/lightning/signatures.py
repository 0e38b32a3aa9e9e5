"""Keeps shared access signatures out of Lightning's log."""

from __future__ import annotations

import logging
import re

from .stock import CheckpointIO, pytorch

__all__ = ["keep_signatures_out_of_logs"]

# The query of a URL with a signature in it.
_QUERY = re.compile(r"\?[^\s?\"'`]*\bsig=[^\s\"'`]*", re.IGNORECASE)


class _WithoutSignatures(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if _QUERY.search(message) is not None:
            record.msg, record.args = _QUERY.sub("", message), ()
        return True


_filter = _WithoutSignatures()


def keep_signatures_out_of_logs() -> None:
    """From now on, URLs in what Lightning logs have no query if that has a signature.

    Lightning logs the ``ckpt_path`` that it was given ("Restoring states from the checkpoint path at ...") before it
    asks a plugin, a strategy or a callback for anything. So this is the only place where the signature can be removed.
    """
    roots = {module.partition(".")[0] for module in (pytorch.__name__, CheckpointIO.__module__)}
    for name, logger in list(logging.root.manager.loggerDict.items()):
        # Filters of a logger do not hold for those below it.
        if name.partition(".")[0] in roots and isinstance(logger, logging.Logger):
            logger.addFilter(_filter)  # a second time changes nothing
