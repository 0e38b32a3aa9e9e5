"""The subcommands of ``azure-torch-ckpt``."""
