"""The ideas behind convolutional nets as pictures: one subject per file, one idea per demo.

Importing this package registers every demo and draws nothing. Slow imports are inside the functions that draw.
"""

import importlib
import pkgutil

from cnnlib.demos.demo import DEMOS

__all__ = ["DEMOS"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
