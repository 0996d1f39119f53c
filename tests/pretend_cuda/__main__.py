"""Builds the pretend CUDA device and runs a command with it: python -m tests.pretend_cuda COMMAND..."""

import os
import sys

from tests import pretend_cuda

if len(sys.argv) < 2:
    sys.exit(__doc__)
if problem := pretend_cuda.why_not():
    sys.exit(problem)
library = pretend_cuda.build(pretend_cuda.ROOT / "build" / "pretend_cuda")
os.execvpe(sys.argv[1], sys.argv[1:], pretend_cuda.environment(library))
