"""The command line: flags, one run, console."""
