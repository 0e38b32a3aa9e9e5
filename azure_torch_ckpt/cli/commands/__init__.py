"""What does each subcommand print and do? One module a subcommand; `cli.app` collects them."""
