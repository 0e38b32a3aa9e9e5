"""How does a checkpoint get to another container, to a disk or from one? `copy.copy` is for others."""
