"""One folder per codebase: its names, its layout, its eps, its mask convention, and what its checkpoints say.

An adapter is a package of that name with

    INVERSE_SIGMOID_EPS                  of its decoder
    fast_class(module) -> type | None    the class that `module` would become, None if it is not this codebase's

A fast class subclasses the original class and `adapters._fast.Fast`, and may refuse a module (`dab_fast_why_not`).

The package's module `checkpoint` translates between the codebase's names of tensors and the canonical ones, which
`adapters._names` describes:

    CODEBASE: str                        its name in messages
    MODELS: str                          the models that `load_checkpoint` can load, in words, with their article
    INVERSE_SIGMOID_EPS: float           the same number again
    recognise(names) -> str | None       the prefix of the decoder among these names of tensors, None if they are not
                                         this codebase's
    owns(model) -> bool                  whether `model` is one of MODELS
    to_canonical(tensors, prefix)        the tensors of a checkpoint, whatever part of a model it holds, by their
                                         canonical names; `prefix` is what `recognise` gave
    from_canonical(tensors, model)       those of them that `model` holds, by its names
    stated(config, args) -> dict         what a checkpoint says beside its tensors: fields of `DecoderConfig`, and
                                         `encoder_nhead`, `position_temperatures` (height, width) and `dilation`; None
                                         for what it does not say. `config` is the config.json beside the tensors, None
                                         without one; `args` are the training script's, in the same file

Neither module imports the codebase's library at its top, so that `import dab_fast` does not. To add a codebase: write
its folder, name it here.
"""

ADAPTERS = ("huggingface", "idea_research")
