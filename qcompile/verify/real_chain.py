"""The training graph's eval-mode meaning in float64, from the trained parameters, against the integer codes.

Every quantised tensor restarts the chain: its value is that of the codes under test. So each tensor between
two quantisers is a real number that depends on codes and parameters alone, and its code must be the nearest
one. Nothing here knows of multipliers or shifts; a fold that lost or changed something shows up as codes
that lie beyond the rounding interval of their real value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..model import QuantModel
from ..modes import Mode
from ..passes.batchnorm import ModeBatchNorm
from ..passes.borrowed_weights import BorrowedWeights
from ..passes.eval_identities import IDENTITIES_IN_EVAL
from ..passes.integer_model import IntegerModel
from ..passes.layers import QuantizedLayer
from ..passes.mode_input import MODE_INPUT, ModeModule
from ..passes.module_tree import tensor_at
from ..passes.quantized_tensor import QuantizedTensor
from ..passes.quantizers import ActivationQuantizer
from ..passes.rprelu import ModePReLU
from ..policy import Policy
from . import reference
from .chain import QUANTISERS, as_array, substitute
from .formulas import DeclaredFormulas, SchemeFormulas, find_formulas, formulas_of
from .output_error import OutputError
from .reference_values import ReferenceGrid, ReferenceRange, ReferenceThresholds, ReferenceWeight
from .structure import array_difference

#: A code may lie this far beyond the rounding interval of its real value, in codes, ...
FOLD_ERROR = 2.0**-12

#: ... plus what rounding the multipliers to integers may do, plus this fraction of the tensor's largest
#: value, because float32 operators take part, ...
FLOAT_ERROR = 2.0**-16

#: and outputs of the float64 chain differ by at most this much of the largest.
OUTPUT_ERROR = 1e-4

#: The largest multiplier of a term has at least this many significant bits, or is exact to its last one.
MULTIPLIER_BITS = 30


class RealChain:
    """One mode, or policy, of a prepared model in float64.

    Args:
        model: the prepared model.
        mode: the mode or policy.
        expected: its integer graph; its nodes tell which codes belong to which quantiser.

    Attributes:
        recomputed: whether the scheme's formula is independent of the conversion.
        fold_errors: per node of the integer graph, how far a real value lies beyond the rounding interval of
            its code at most, in codes.
    """

    def __init__(self, model: QuantModel, mode: Mode | Policy, expected: IntegerModel) -> None:
        self.model = model
        self.graph_row, self.row_of = model.rows_at(mode)
        self._statistics = mode.statistics if isinstance(mode, Policy) else {}
        formulas = find_formulas(model.scheme.name)
        self.recomputed = formulas is not None
        self.formulas: SchemeFormulas = DeclaredFormulas() if formulas is None else formulas
        self.expected = expected
        self.fold_errors: dict[str, float] = {}
        self._outputs = OutputError()
        self._failures: dict[str, str] = {}
        self._weights: dict[str, ReferenceWeight | NDArray[np.float64]] = {}
        self._codes: dict[str, list[fx.Node]] = defaultdict(list)
        for node in expected.graph.nodes:
            if expected.operator_name(node) in QUANTISERS:
                self._codes[str(node.meta["layer"])].append(node)

    def _mode_of(self, module: ModeModule) -> Mode:
        return self.model.prepared_modes[self.row_of(module)]

    # ---- what holds the weights ---------------------------------------------------------------------------

    def weight_differences(self) -> list[str]:
        """One line per layer whose codes or offset in the integer graph are not those of the formula."""
        lines = []
        for node, constant in self.expected.weights():
            path = str(node.meta["layer"])
            weight = self._weight(path)
            if not isinstance(weight, ReferenceWeight):
                lines.append(f"layer {path!r}: its weight has codes in a float mode")
                continue
            codes = as_array(self.expected.constant(constant)).astype(np.int64)
            found = array_difference(weight.codes, codes.reshape(weight.codes.shape))
            if found is not None:
                lines.append(f"layer {path!r}: weight code {found} by the scheme's formula")
            if self.expected.operator_name(node) == "dequantize":
                lines.extend(self._scale_differences(path, node, weight))
            elif (weight.numerator, weight.shift) != (node.args[2], node.args[3]):
                lines.append(
                    f"layer {path!r}: weight offset is {node.args[2]} / 2^{node.args[3]}, "
                    f"expected {weight.numerator} / 2^{weight.shift} by the scheme's formula"
                )
            elif not self._has_multipliers(node, weight):
                lines.append(f"layer {path!r}: multipliers differ from the scheme's formula")
        return lines

    def _has_multipliers(self, node: fx.Node, weight: ReferenceWeight) -> bool:
        is_grouped = self.expected.operator_name(node) == "accumulate_groups"
        if weight.multipliers is None or not is_grouped:
            return weight.multipliers is None and not is_grouped
        return np.array_equal(as_array(self.expected.constant(node.args[4])), weight.multipliers)

    def _scale_differences(self, path: str, node: fx.Node, weight: ReferenceWeight) -> list[str]:
        """Of a weight that is multiplied in float."""
        _, scale, offset = (as_array(self.expected.constant(one)) for one in node.args)
        exact_scale = (
            weight.scale if weight.multipliers is None else weight.scale[:, None] * weight.multipliers
        )
        wanted = exact_scale, exact_scale * weight.numerator * 2.0**-weight.shift + weight.centre
        return [
            f"layer {path!r}: weight {what} differs from the scheme's formula"
            for what, found, exact in zip(("scale", "offset"), (scale, offset), wanted, strict=True)
            if not np.array_equal(found.reshape(-1), np.float32(exact).reshape(-1))
        ]

    def _weight(self, path: str) -> ReferenceWeight | NDArray[np.float64]:
        if path not in self._weights:
            layer = self.model.get_submodule(path)
            assert isinstance(layer, (QuantizedLayer, QuantizedTensor))
            formulas = formulas_of(layer.weight_quantizer, self.formulas)
            self._weights[path] = formulas.weight(self.model, layer, self._mode_of(layer))
        return self._weights[path]

    # ---- the chain ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self, inputs: Sequence[Tensor], codes: Mapping[str, Any], outputs: Sequence[NDArray[Any]]
    ) -> None:
        """Compare one piece of the inputs.

        Args:
            inputs: flat inputs.
            codes: arrays of codes by node name of the integer graph.
            outputs: the reference's outputs.
        """
        values: dict[fx.Node, Any] = {}
        steps: dict[fx.Node, float] = {}
        remaining, calls = iter(inputs), defaultdict[str, int](int)
        for node in self.model.row_graphs[self.graph_row].nodes:
            if node.op == "placeholder":
                values[node] = None if node.meta.get(MODE_INPUT) else _double(next(remaining).cpu())
            elif node.op == "output":
                self._compare_outputs(substitute(node.args[0], values.__getitem__), outputs)
            elif node.op == "call_module":
                module = self.model.get_submodule(str(node.target))
                given = [
                    one for one in node.args if not (isinstance(one, fx.Node) and one.meta.get(MODE_INPUT))
                ]
                args = substitute(given, values.__getitem__)
                if isinstance(module, ActivationQuantizer):
                    path = str(node.target)
                    values[node], step = self._quantised(path, calls[path], module, args[0], codes)
                    calls[path] += 1
                    if step is not None:
                        steps[node] = step
                elif isinstance(module, QuantizedLayer):
                    values[node] = self._layer(str(node.target), module, args[0], steps.get(given[0]))
                else:
                    values[node] = self._module(str(node.target), module, args)
            elif node.op == "get_attr":
                tensor = tensor_at(self.model, str(node.target))
                assert tensor is not None
                values[node] = _double(tensor.detach().cpu())
            else:
                args, kwargs = substitute((node.args, node.kwargs), values.__getitem__)
                function: Any = node.target
                values[node] = pytree.tree_map_only(Tensor, _double, function(*args, **kwargs))
                if len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in steps:
                    steps[node] = steps[node.all_input_nodes[0]]  # a guess: it may only move codes

    def failures(self) -> list[str]:
        """One line per quantiser, and one for the outputs, where the integer graph is not the real chain."""
        lines = list(self._failures.values())
        if self._outputs.worst() > OUTPUT_ERROR:
            lines.append(f"outputs: {self._outputs.worst():.1e} of the largest away from the trained chain")
        return lines

    def _quantised(
        self, path: str, call: int, module: ActivationQuantizer, x: Tensor, codes: Mapping[str, Any]
    ) -> tuple[Tensor, float | None]:
        """The rounded tensor, and what one code is worth."""
        grid = formulas_of(module, self.formulas).activation(self.model, module, self._mode_of(module))
        if isinstance(grid, ReferenceRange):
            return x.clamp(grid.low, grid.high), None
        nodes = self._codes[path]
        node = nodes[call] if call < len(nodes) else None
        if node is None:  # no quantised layer reads it
            assert grid is not None
            codes_of_x = np.clip(np.rint(grid.position(x.numpy())), grid.low, grid.high)
            return torch.from_numpy(codes_of_x * grid.step), grid.step
        array = as_array(codes[node.name]).astype(np.float64)
        if grid is None:
            unit = float(node.meta["unit"])
            return torch.from_numpy(array * unit), unit
        self._compare_codes(path, node, grid, x.numpy(), array, codes)
        return torch.from_numpy(array * grid.step), grid.step

    def _compare_codes(
        self,
        path: str,
        node: fx.Node,
        grid: ReferenceGrid | ReferenceThresholds,
        x: NDArray[np.float64],
        codes: NDArray[np.float64],
        values: Mapping[str, Any],
    ) -> None:
        if codes.shape != x.shape:
            self._failures[node.name] = f"layer {path!r}: codes have shape {codes.shape}, expected {x.shape}"
            return
        real = grid.position(x)
        bound = FOLD_ERROR + FLOAT_ERROR * float(np.abs(real[np.isfinite(real)]).max(initial=0.0))
        clipped = np.clip(np.nan_to_num(real, nan=0.0), grid.low, grid.high)
        beyond = np.abs(clipped - codes) - 0.5
        worst = float(beyond.max(initial=0.0))
        self.fold_errors[node.name] = max(self.fold_errors.get(node.name, 0.0), worst)
        if worst <= bound or node.name in self._failures:
            return
        excess = beyond - bound - self._multiplier_rounding(node, values)
        count = int(np.count_nonzero(excess > 0))
        if count:
            index = np.unravel_index(int(excess.argmax()), excess.shape)
            self._failures[node.name] = (
                f"layer {path!r}: {count} of {codes.size} codes are not the nearest to the trained chain's "
                f"real value; worst at {[int(i) for i in index]}: {int(codes[index])} for {real[index]:.4f}"
            )

    def _multiplier_rounding(self, node: fx.Node, values: Mapping[str, Any]) -> NDArray[np.float64] | float:
        """Half a unit in the last place of every multiplier and of the constant, in codes."""
        if self.expected.operator_name(node) != "requantize":
            return 0.0
        inputs: Any = node.args[0]
        multipliers: Any = node.args[1]
        shift: Any = node.args[3]
        total: Any = np.float64(1.0)
        for one, multiplier in zip(inputs, multipliers, strict=True):
            bits = int(np.abs(as_array(self.expected.constant(multiplier))).max()).bit_length()
            unit = 2.0 ** max(0, bits - MULTIPLIER_BITS)
            total = total + unit * np.abs(as_array(values[one.name]).astype(np.float64))
        return np.asarray(total) * 2.0 ** -(shift + 1)

    def _module(self, path: str, module: nn.Module, args: Sequence[Any]) -> Any:
        if isinstance(module, QuantizedTensor):
            found = self._weight(path)
            return torch.from_numpy(found.real if isinstance(found, ReferenceWeight) else found)
        if isinstance(module, ModeBatchNorm):
            return self._normalised(path, module, args[0])
        if isinstance(module, ModePReLU):
            return self._bent(module, args[0])
        if isinstance(module, IDENTITIES_IN_EVAL):
            return args[0]
        if isinstance(module, BorrowedWeights):
            module = module.untied()
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        doubles = {name: _double(value.detach().cpu()) for name, value in tensors.items()}
        result = torch.func.functional_call(module, doubles, tuple(args))
        return pytree.tree_map_only(Tensor, _double, result)

    def _layer(self, path: str, layer: QuantizedLayer, x: Tensor, step: float | None) -> Tensor:
        found, geometry = self._weight(path), layer.geometry
        weight = found.real if isinstance(found, ReferenceWeight) else found
        unit: Any = 1.0
        bias = 0.0 if layer.bias is None else as_array(layer.bias).astype(np.float64)
        array = as_array(x)
        if isinstance(found, ReferenceWeight) and step is not None and found.scale.size in (1, len(weight)):
            codes = np.rint(array / step)
            if np.array_equal(codes * step, array):
                # equal sums stay equal, whatever their order: what picks a maximum behind sees the same ties
                array, weight, unit = codes, found.integers, found.unit.reshape(-1) * step
        if geometry.kind == "linear":
            return torch.from_numpy(np.matmul(array, weight.T) * unit + bias)
        sums = reference.convolve(
            array, weight, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        shape = (-1, *[1] * (sums.ndim - 2))
        return torch.from_numpy(sums * np.reshape(unit, shape) + np.reshape(bias, shape))

    def _bent(self, module: ModePReLU, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        shift_in, slope, shift_out = (
            _double(one.detach().cpu()[self.row_of(module)]).reshape(shape)
            for one in (module.shift_in, module.slope, module.shift_out)
        )
        moved = x - shift_in
        return torch.where(moved >= 0, moved, slope * moved) + shift_out

    def _normalised(self, path: str, module: ModeBatchNorm, x: Tensor) -> Tensor:
        of_affine, of_statistics = module.rows_of(self.row_of(module))

        def at(value: Tensor | None, row: int) -> Tensor | None:
            return None if value is None else _double(value.detach().cpu()[row])

        mean, variance = at(module.running_mean, of_statistics), at(module.running_var, of_statistics)
        if path in self._statistics:
            mean, variance = (_double(one) for one in self._statistics[path])
        weight, bias = at(module.weight, of_affine), at(module.bias, of_affine)
        return nn.functional.batch_norm(x, mean, variance, weight, bias, mean is None, 0.0, module.eps)

    def _compare_outputs(self, real: Sequence[Any], outputs: Sequence[NDArray[Any]]) -> None:
        for index, (mine, given) in enumerate(zip(real, outputs, strict=True)):
            self._outputs.add(index, as_array(mine), given)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
