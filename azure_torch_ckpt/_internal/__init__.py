"""Which helpers does every folder need? Every folder may import them, users do not.

Checksums, units of messages, the pause of the garbage collector, torch's private names, local files that
are written atomically, the tokens of a process.
"""
