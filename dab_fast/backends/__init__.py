"""What runs an op: a folder per backend, named as `dab_fast.ops.backend` takes it, with a module per op."""
