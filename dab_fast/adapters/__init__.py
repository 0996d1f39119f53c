"""One pure function per codebase difference: names, layout, eps, mask convention."""
