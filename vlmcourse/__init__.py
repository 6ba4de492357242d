"""vlmcourse: a course in Jupyter notebooks, and a library, for training vision-language models after pretraining.

`import vlmcourse` imports nothing else; `vlmcourse.sft` and the other modules are imported when first asked for.
"""
__version__ = "0.1.0"


def __getattr__(name):  # PEP 562
    from importlib import import_module
    if name.startswith("_") or name not in __dir__():
        raise AttributeError(f"module 'vlmcourse' has no attribute {name!r}; it has the modules {', '.join(__dir__())}")
    return import_module(f"{__name__}.{name}")


def __dir__():
    from pkgutil import iter_modules
    return [m.name for m in iter_modules(__path__) if not m.name.startswith("_")]
