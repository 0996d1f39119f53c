"""What a kernel module says of its kernels so that they can be compiled without a GPU and without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration that is shipped; each kernel module lists its own in `compile_cases()`.

    Integer arguments count as multiples of 16, which strides of real tensors are, except where the kernel is told not
    to specialize on them.
    """

    name: str
    kernel: Any  # the function under @triton.jit
    pointers: Mapping[str, str | None]  # argument: element type such as "bf16"; None where the tensor is absent
    floats: tuple[str, ...]  # scalar arguments in floating point
    options: Mapping[str, Any]  # the constexpr arguments and those of the compiler, as the launch passes them
    tensor_cores: bool  # its dots must be tensor-core instructions
    default: bool = False  # compiled in `make test`, the others in `make sweep`
    wide_loads: float = 1.0  # at least, of the bytes of its tiles in 16-byte loads

    def signature(self) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[Any]]]:
        """Types, constants and alignments as `triton.compiler.ASTSource` takes them."""
        types: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        alignments: dict[tuple[int], list[Any]] = {}
        for i, parameter in enumerate(self.kernel.params):
            name = parameter.name
            if parameter.is_constexpr or (name in self.pointers and self.pointers[name] is None):
                types[name], constants[i,] = "constexpr", self.options.get(name)
            elif name in self.pointers:
                types[name], alignments[i,] = f"*{self.pointers[name]}", [["tt.divisibility", 16]]
            elif name in self.floats:
                types[name] = "fp32"
            else:
                types[name] = "i32"
                if not parameter.do_not_specialize:
                    alignments[i,] = [["tt.divisibility", 16]]
        return types, constants, alignments
