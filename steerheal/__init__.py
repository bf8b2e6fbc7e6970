"""Search over steer-heal loops: inject a persona with a steering vector, heal the damage, fold, repeat.

Importing the package is free: torch, transformers and Ray load only in the modules that use them.
"""

__version__ = "0.1.0"

import logging

# On some CPUs it tells at every import that an optional kernel is missing; nobody who types a command can use that.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
