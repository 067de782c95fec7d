"""The ideas behind convolutional nets as pictures: a file is a subject, and each demo in it draws one of its ideas.

Importing this package registers every demo, and draws nothing: what is slow to import, the functions that draw import.
"""

import importlib
import pkgutil

from cnnlib.demo import DEMOS

__all__ = ["DEMOS"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
