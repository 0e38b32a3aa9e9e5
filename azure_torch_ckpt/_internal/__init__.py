"""What every layer uses and no user imports.

Checksums, units of messages, the pause of the garbage collector, torch's private names, local files that
are written atomically, the tokens of a process.
"""
