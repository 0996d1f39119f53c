"""The model around the decoder, in fast exact maths: shared by all codebases, which their adapters read."""
