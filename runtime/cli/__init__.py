"""The command line: one module for each subcommand of `troupe`, joined in `main`."""
