"""Python runs this at its start where it is on the path: with PRETEND_CUDA set, torch gets the pretend device."""

import os

if os.environ.get("PRETEND_CUDA"):
    from tests import pretend_cuda

    pretend_cuda.install()
