"""Search over steer-heal loops: inject a persona with a steering vector, heal the damage, fold, repeat.

Importing the package is free: torch, transformers and Ray load only in the modules that use them.
"""

__version__ = "0.1.0"

import logging
import os

# Read when CUDA's allocator starts: with fixed segments, going from generation to healing can fail from fragments alone.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# As nvidia-smi counts cards, which is asked for their memory; CUDA's own order is by speed.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
# On some CPUs it tells at every import that an optional kernel is missing; nobody who types a command can use that.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
