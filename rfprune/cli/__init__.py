"""The command line: flags and their checks, one run, its outputs, console and exit codes."""
