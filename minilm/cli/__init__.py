"""The command line.

- `parser.py`    the arguments of each command, and their help
- `commands.py`  what each command does

May import everything but `adapters/`. Nothing imports it.
"""

from minilm.cli.parser import main

__all__ = ["main"]
