"""One file per codebase: its names, its layout, its eps, its mask convention.

An adapter is a module with two functions:

    fast_class(module) -> type | None    the class that `module` should become, None if it is not this codebase's
    why_not(module) -> str | None        for a module that looks like this codebase's but cannot be replaced

A fast class subclasses the original class and `adapters._fast.Fast`. To add a codebase: write its file, name it here.
"""

ADAPTERS = ("huggingface", "idea_research")
