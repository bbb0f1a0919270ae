"""Walk an expected graph over pieces of the inputs, layer by layer and end to end at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..errors import QCompileError
from .chain import ReferenceGraph, as_array, substitute
from .checks import NodeCheck
from .end_to_end import EndToEndCheck, values_equal
from .real_chain import RealChain
from .report import Flip, VerificationReport
from .subject import Subject


class Walk:
    """One verification in progress.

    Args:
        graph: the expected graph.
        subject: what is checked.
        chain: the trained parameters' own float64 chain; None if the model holds none.
    """

    def __init__(self, graph: ReferenceGraph, subject: Subject, chain: RealChain | None) -> None:
        self.graph, self.subject, self.chain = graph, subject, chain
        self.checks = {
            node.name: NodeCheck(graph, node, subject)
            for node in graph.nodes
            if graph.kinds[node.name] in ("integer", "moved", "float")
        }
        self.end_to_end = EndToEndCheck(graph, subject)
        self.crash: str | None = None

    def piece(self, first: int, inputs: Sequence[Tensor]) -> bool:
        """Check one piece.

        Args:
            first: index of its first sample.
            inputs: flat inputs.

        Returns:
            False if the artefact does not run on them; then there is nothing more to check.
        """
        try:
            observation, untapped = self.subject.tapped(inputs), self.subject.untapped(inputs)
        except QCompileError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            # a graph whose shapes no longer fit fails somewhere inside torch or the runtime
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.crash = f"{self.subject.name} does not run: {reason}"
            return False
        wanted = len(self.graph.nodes[-1].args[0])
        if len(observation.outputs) != wanted or len(untapped) != wanted:
            self.crash = f"{self.subject.name} has {len(observation.outputs)} outputs, expected {wanted}"
            return False
        observed = {name: value for name, value in observation.values.items() if name in self.checks}
        self.end_to_end.start_piece()
        # what the target produced, as far as it shows it, and what the reference makes of the inputs; both
        # refer to one object where the numbers are equal, so that nothing is computed twice
        fed: dict[str, Any] = {}
        own: dict[str, Any] = {}
        results: dict[str, Any] = {}
        remaining = iter(inputs)
        for node in self.graph.nodes:
            kind = self.graph.kinds[node.name]
            if kind == "input":
                fed[node.name] = own[node.name] = results[node.name] = next(remaining).cpu()
            elif kind == "constant":
                results[node.name] = own[node.name] = self.graph.constants[node.name]
            elif kind == "output":
                ours = substitute(node.args[0], lambda one: own[one.name])
                theirs = substitute(node.args[0], lambda one: results[one.name])
                self.end_to_end.compare_outputs(ours, theirs, observation.outputs, untapped)
                if self.chain is not None:
                    self.chain.run(inputs, own, [as_array(one) for one in ours])
            else:
                self._node(node, fed, own, results, observed, first)
        return True

    def _node(
        self,
        node: fx.Node,
        fed: dict[str, Any],
        own: dict[str, Any],
        results: dict[str, Any],
        observed: dict[str, Any],
        first: int,
    ) -> None:
        name = node.name
        result = results[name] = self.graph.evaluate(node, fed)
        same = all(
            own.get(one.name) is fed.get(one.name) for one in node.all_input_nodes if one.op != "get_attr"
        )
        actual = observed.get(name)
        check = self.checks.get(name)
        if check is None:  # a size
            fed[name] = result
            own[name] = result if same else self.graph.evaluate(node, own)
            return
        flips = len(check.flips)
        fed[name] = result
        check.several = not _is_array(result)
        if actual is not None and _is_array(actual) and _is_array(result):
            fed[name] = check.compare(result, actual, fed, observed, first)
        mine = result if same else self.graph.evaluate(node, own)
        own[name] = fed[name] if _is_array(mine) and values_equal(mine, fed[name]) else mine
        if mine is result and fed[name] is result:
            own[name] = result  # tuples, too
        self.end_to_end.compare(node, own[name], actual, check, flips)

    def report(self, mode: int | str, samples: int, failures: Sequence[str]) -> VerificationReport:
        """Sum up.

        Args:
            mode: as users write it.
            samples: number of samples checked.
            failures: what was found before the walk.
        """
        lines = list(failures)
        errors = {} if self.chain is None else self.chain.fold_errors
        layers, flips = [], list[Flip]()
        for check in self.checks.values():
            flips += check.flips
            failure = check.failure()
            if failure is not None:
                lines.append(failure)
            if self.graph.kinds[check.node.name] != "float" and not check.several:
                layers.append(check.result(errors.get(check.node.name)))
        lines += self._unseen() if self.crash is None else [self.crash]
        end_to_end = self.end_to_end.result(bool(flips))
        lines += self.end_to_end.failures
        if self.chain is not None:
            lines += self.chain.failures()
        return VerificationReport(
            exact=not lines,
            mode=mode,
            target=self.subject.name,
            samples=samples,
            recomputed=self.chain is not None and self.chain.recomputed,
            layers=tuple(layers),
            end_to_end=end_to_end,
            flips=tuple(flips),
            logits_error=end_to_end.logits_error,
            failures=tuple(lines),
        )

    def _unseen(self) -> list[str]:
        """A line for every layer of which the target shows no trace before the next layer."""
        lines = []
        for check in self.checks.values():
            if check.operator.startswith("accumulate_") and not self._shows(check.node):
                lines.append(f"layer {check.layer!r}: the target's trace shows nothing that depends on it")
        return lines

    def _shows(self, node: fx.Node) -> bool:
        seen, queue = {node}, [node]
        for one in queue:  # grows while it is walked
            if one.op == "output" or (one.name in self.checks and self.checks[one.name].tapped):
                return True
            for user in one.users:
                again = self.graph.model.operator_name(user).startswith("accumulate_")
                if user not in seen and not again:
                    seen.add(user)
                    queue.append(user)
        return False


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
