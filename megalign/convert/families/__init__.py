"""Registers the model families: importing this package imports all its modules, one for each family."""

from megalign.modules import import_modules

import_modules(__name__, __path__)
