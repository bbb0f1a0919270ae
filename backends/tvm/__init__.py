"""Compiled kernels through TVM: layouts, packed weights, kernels, and the import of integer graphs.

The way of a model: `rules` and `kernel_graph` turn an integer graph into a graph of kernels on `maps`;
`packing` puts weights into the order that kernels read; `lowering` imports the graph into Relax, where each
call becomes a kernel of `kernels/` and what is left is legalised and fused by TVM. `specs` says what a kernel
computes, `api` holds TVM's names.

No target is registered yet: what is missing is the static plan and the driver that run without TVM.
"""
