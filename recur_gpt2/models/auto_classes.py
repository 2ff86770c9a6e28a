"""Registers our classes with transformers' Auto classes once these are imported, so that `import recur_gpt2` is quick.

modeling.py and classification.py register them at their ends, and take seconds to import. They are imported here when
transformers' Auto classes have been, in whichever order a user imports the two packages: not before the outermost
import of a module of either has ended, since they need what may be halfway then.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder

AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # imported with any of them
OURS = "recur_gpt2.models.classification"


class _Finder(MetaPathFinder):
    """Finds nothing itself: it follows the execution of the two packages' modules, which others find."""

    def __init__(self):
        self.running = 0

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("transformers", "recur_gpt2"):
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                self.running += 1
                try:
                    execute(module)
                finally:
                    self.running -= 1
                self.register()

            spec.loader.exec_module = exec_module
        return spec

    def register(self):
        if self.running == 0 and AUTO_CLASSES in sys.modules and OURS not in sys.modules:
            import_module(OURS)


def register_when_needed() -> None:
    """Now, where the Auto classes are there already; when they come, otherwise."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    finder.register()
