"""The targets `x86` and `arm`: compiled packed low-bit code through TVM, run without TVM.

The way of a model: `rules` and `kernel_graph` turn an integer graph into a graph of kernels on `maps`;
`families` is the registry that picks the kernel of a layer for a kind of processor (`processors`);
`packing` puts weights into the order that kernels read; `lowering` imports the graph into Relax, where each
call becomes a kernel of `kernels/` and what is left is legalised and fused by TVM; `plan` reads the static
plan off the result; `objects` compiles kernels, each different one once; `build` links those for every kind
of processor with the driver `driver.c`; `artefact` does all that; `executable` runs it, in this process
(`library`) or under emulation (`emulated`), `export` writes it. `specs` says what a kernel computes, `api`
holds TVM's names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qcompile.backends.target import LoweringRequest, Target, needs_extra

if TYPE_CHECKING:
    from .executable import CompiledExecutable

_EXTRA = ("tvm", "tvm_ffi")


class _CompiledTarget(Target):
    takes_processors: ClassVar[bool] = True

    def compile(self, request: LoweringRequest) -> CompiledExecutable:
        """Lower one mode to a shared object.

        Raises:
            InvalidArgument: for an unknown cpu or feature.
            LoweringError: if an operator has no kernel here.
            MissingExtra: if the packages of the extra `tvm` or a C compiler are not installed.
        """
        with needs_extra(self.name, "tvm", _EXTRA):
            from . import processors
            from .executable import CompiledExecutable
        return CompiledExecutable(request, getattr(processors, self.name.upper()))


class X86Target(_CompiledTarget):
    """Machine code for x86-64: packed weights, integer epilogues, no Python and no TVM on the device."""

    name: ClassVar[str] = "x86"
    summary: ClassVar[str] = "machine code for x86-64 (AMX, AVX-512 VNNI or AVX2), with a C interface"


class ArmTarget(_CompiledTarget):
    """The same for 64-bit ARM: cross-compiled, run under emulation where the machine is another."""

    name: ClassVar[str] = "arm"
    summary: ClassVar[str] = "machine code for aarch64 (NEON, with or without SDOT), with a C interface"
