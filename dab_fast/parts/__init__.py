"""The fast maths of the model around the decoder, independent of any codebase."""
