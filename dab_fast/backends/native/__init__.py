"""The backend `native`: one module per op, calling `dab_fast._C` with the addresses and strides of tensors."""
