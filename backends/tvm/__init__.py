"""The target `x86`: compiled packed low-bit code through TVM, run without TVM.

The way of a model: `rules` and `kernel_graph` turn an integer graph into a graph of kernels on `maps`;
`packing` puts weights into the order that kernels read; `lowering` imports the graph into Relax, where each
call becomes a kernel of `kernels/` and what is left is legalised and fused by TVM; `plan` reads the static
plan off the result; `build` links kernels for every kind of processor (`variants`) with the driver
`driver.c`; `artefact` does all that; `executable` runs it, `export` writes it. `specs` says what a kernel
computes, `api` holds TVM's names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qcompile.backends.target import LoweringRequest, Target
from qcompile.errors import MissingExtra

if TYPE_CHECKING:
    from .executable import X86Executable

_EXTRA = ("tvm", "tvm_ffi")


class X86Target(Target):
    """Machine code for x86-64: packed weights, integer epilogues, no Python and no TVM on the device."""

    name: ClassVar[str] = "x86"
    summary: ClassVar[str] = "machine code for x86-64 (AVX-512 VNNI or AVX2), with a C interface"

    def compile(self, request: LoweringRequest) -> X86Executable:
        """Lower one mode to a shared object and load it.

        Raises:
            LoweringError: if an operator has no kernel here, or the processor lacks AVX2.
            MissingExtra: if the packages of the extra `tvm` or a C compiler are not installed.
        """
        try:
            from .executable import X86Executable
        except ModuleNotFoundError as cause:
            if (cause.name or "").partition(".")[0] not in _EXTRA:
                raise
            raise MissingExtra(
                f"the target {self.name} needs the package {cause.name}: pip install 'qcompile[tvm]'"
            ) from cause
        return X86Executable(request)
