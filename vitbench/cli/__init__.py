"""The command line: it parses arguments and calls the rooms below.

No room imports it.
A new command is a module with `add_command(commands)`, named in `vitbench.cli.program`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
