"""Search over steer-heal loops: inject a persona with a steering vector, heal the damage, fold, repeat.

Importing the package is free: torch, transformers and Ray load only in the modules that use them.
"""

__version__ = "0.1.0"
