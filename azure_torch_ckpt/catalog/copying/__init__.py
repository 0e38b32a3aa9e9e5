"""`copy`: checkpoints to another container, to a disk or from one."""
