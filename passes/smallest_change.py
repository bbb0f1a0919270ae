"""The smallest change of the user's source that lets a line be captured, as code where it can be known.

The statement is found by its file and line, rewritten as a syntax tree, and shown on one line.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from copy import deepcopy

from .source_lines import UserLine
from .source_place import Place, names_in, targets_of

_LONGEST = 120
_NUMBERS = ("int", "float", "bool")
_SHAPED = (
    "view",
    "reshape",
    "expand",
    "zeros",
    "ones",
    "full",
    "empty",
    "randn",
    "rand",
    "new_zeros",
    "new_ones",
    "arange",
)
#: Methods that make numbers of a tensor's elements.
_TO_PYTHON = ("item", "tolist")
_EXPORTING = "if not torch.compiler.is_exporting():"


def for_values(line: UserLine) -> str:
    """What to do where control flow or a size depends on the values of a tensor."""
    place = Place.of(line)
    if place is None:
        return "rewrite it with torch.where, or move it out of forward"
    statement = place.statement
    if isinstance(statement, ast.Assert):
        return f"delete the assert, or put it below {_shown(_EXPORTING)}"
    if isinstance(statement, ast.While):
        return "loop a fixed number of times and choose with torch.where what each pass keeps"
    if isinstance(statement, ast.For):
        return "loop a fixed number of times, whatever the values are"
    if isinstance(statement, ast.If):
        where = _where_of_branches(statement, place.next)
        test = ast.unparse(_as_tensor(statement.test))
        way = (
            f"write {_shown(where)}"
            if where
            else f"compute both cases and choose: {_shown(f'torch.where({test}, ..., ...)')}"
        )
        return way + _made_before(place, statement.test)
    chosen = next((one for one in ast.walk(statement) if isinstance(one, ast.IfExp)), None)
    if chosen is not None:
        call = _where(chosen.test, chosen.body, chosen.orelse)
        before = _made_before(place, chosen.test)
        return f"write {_shown(_replaced(statement, chosen, call))}{before}"
    if any(place.is_size(name) for name in targets_of(statement)) or any(
        isinstance(one, ast.Slice) and _makes_number(one) for one in ast.walk(statement)
    ):
        return "a size cannot depend on values: keep the full size and mask what is not wanted"
    if _makes_number(statement):
        return f"keep it a tensor: {_shown(ast.unparse(_as_tensor(statement)))}"
    return "rewrite it with torch.where, or move it out of forward"


def makes_list(line: UserLine) -> bool:
    """Whether a line of the user's makes a list of a tensor's elements."""
    place = Place.of(line)
    calls = [one for one in ast.walk(place.statement) if isinstance(one, ast.Attribute)] if place else []
    return any(one.attr == "tolist" for one in calls)


def for_batch(line: UserLine, size: int | None, dim: int = 0) -> str:
    """What to do where the size of the batch, or of another open dimension, is written as a number."""
    place = Place.of(line)
    purpose = "so that it takes any batch" if dim == 0 else "so that it takes any size"
    generic = f"use x.shape[{dim}] or -1 instead of the number, {purpose}"
    if place is None:
        return generic
    if dim == 0 and (
        isinstance(place.statement, (ast.For, ast.AsyncFor))
        or any(isinstance(one, ast.comprehension) for one in ast.walk(place.statement))
    ):
        return "this is a loop over the batch: call the layers once, on all samples together"
    if isinstance(place.statement, (ast.If, ast.While)):
        return "do the same for every size"
    before, statement = ast.unparse(place.statement), place.statement
    for call in [one for one in ast.walk(statement) if isinstance(one, ast.Call)]:
        _open_size(call, size, dim, place.first_input)
    after = ast.unparse(ast.fix_missing_locations(statement))
    if after != before and not isinstance(statement, _BLOCKS):
        return f"write {_shown(after)}, {purpose}"
    return generic


def for_numpy(line: UserLine) -> str:
    """What to do where a tensor becomes a numpy array."""
    place = Place.of(line)
    if place is not None:
        changed = _InTorch().visit(deepcopy(place.statement))
        text = ast.unparse(changed)
        left = any(isinstance(one, ast.Name) and one.id in ("np", "numpy") for one in ast.walk(changed))
        if not left and text != ast.unparse(place.statement) and not isinstance(place.statement, _BLOCKS):
            return f"write {_shown(text)}"
    return "use functions of torch in place of numpy's"


def for_text(line: UserLine) -> str:
    """What to do where the value of a tensor is printed."""
    return f"delete this line, or put it below {_shown(_EXPORTING)}"


def for_autocast(line: UserLine) -> str:
    """What to do with a block of autocast."""
    place = Place.of(line)
    block = place.around(ast.With) if place is not None else None
    if block is None:
        return "use it outside of forward"
    items = ", ".join(ast.unparse(item) for item in block.items)
    return f"delete {_shown(f'with {items}:')} (line {block.lineno}) and put it around the call of the model"


def for_cond(line: UserLine) -> str:
    """What to do with `torch.cond`."""
    place = Place.of(line)
    for call in ast.walk(place.statement) if place is not None else ():
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("cond") and len(call.args) == 4:
            test, yes, no, operands = call.args
            if not isinstance(operands, (ast.Tuple, ast.List)):
                break
            cases = [
                ast.Call(one, list(operands.elts), [])
                if not isinstance(one, ast.Lambda)
                else _applied(one, operands.elts)
                for one in (yes, no)
            ]
            assert place is not None
            return f"write {_shown(_replaced(place.statement, call, _where(test, *cases)))}"
    return "choose with torch.where between the results of both branches"


_BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef)


def _shown(code: str) -> str:
    joined = " ".join(code.split())
    return f"`{joined if len(joined) <= _LONGEST else joined[: _LONGEST - 3] + '...'}`"


def _replaced(statement: ast.stmt, old: ast.AST, new: ast.AST) -> str:
    """The statement, parsed for this message alone, with one node replaced; of blocks, their first line."""

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if node is old else self.generic_visit(node)

    text = ast.unparse(ast.fix_missing_locations(Replace().visit(statement)))
    return text.splitlines()[0] if isinstance(statement, _BLOCKS) else text


class _AsTensor(ast.NodeTransformer):
    """Numbers made of tensors become the tensors again, conditions of Python those of torch."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _TO_PYTHON and not node.args:
            return node.func.value
        if isinstance(node.func, ast.Name) and node.func.id in _NUMBERS and len(node.args) == 1:
            return node.args[0]
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        joined = node.values[0]
        for value in node.values[1:]:
            joined = ast.BinOp(joined, ast.BitAnd() if isinstance(node.op, ast.And) else ast.BitOr(), value)
        return joined

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not):
            return ast.Call(ast.parse("torch.logical_not", mode="eval").body, [node.operand], [])
        return node


def _as_tensor(node: ast.AST) -> ast.AST:
    return ast.fix_missing_locations(_AsTensor().visit(deepcopy(node)))


def _makes_number(node: ast.AST) -> bool:
    return ast.unparse(_as_tensor(node)) != ast.unparse(node)


def _where(test: ast.expr, yes: ast.expr, no: ast.expr) -> ast.Call:
    function = ast.parse("torch.where", mode="eval").body
    return ast.Call(function, [_as_tensor(test), yes, no], [])  # type: ignore[list-item]


def _where_of_branches(statement: ast.If, after: ast.stmt | None) -> str | None:
    """One statement in place of an `if` that only chooses a value."""
    if len(statement.body) != 1 or len(statement.orelse) > 1:
        return None
    yes, no = statement.body[0], statement.orelse[0] if statement.orelse else None
    if isinstance(yes, ast.Return) and yes.value is not None:
        other = no if no is not None else after
        if isinstance(other, ast.Return) and other.value is not None:
            return f"return {ast.unparse(_where(statement.test, yes.value, other.value))}"
        return None
    first = _assigned(yes)
    second = None if no is None else _assigned(no)
    if first is None or (no is not None and (second is None or second[0] != first[0])):
        return None
    name, value = first
    other_value = ast.Name(name) if second is None else second[1]
    return f"{name} = {ast.unparse(_where(statement.test, value, other_value))}"


def _assigned(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and len(targets_of(statement)) == 1:
        return targets_of(statement)[0], statement.value
    if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, ast.BinOp(ast.Name(statement.target.id), statement.op, statement.value)
    return None


def _made_before(place: Place, test: ast.expr) -> str:
    """Where a number in a condition was made of a tensor, which it must stay."""
    for name in sorted(names_in(test)):
        made = place.made(name)
        if made is not None and _makes_number(made):
            return f", with {_shown(ast.unparse(_as_tensor(made)))} in line {made.lineno}"
    return ""


def _open_size(call: ast.Call, number: int | None, dim: int, first_input: str) -> None:
    """Put `x.shape[dim]` in place of a number in a call that makes a shape."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in _SHAPED:
        return
    owner = call.func.value
    of_torch = isinstance(owner, ast.Name) and owner.id == "torch"
    name = owner.id if isinstance(owner, ast.Name) and not of_torch else first_input
    arguments: Sequence[ast.expr] = call.args
    for held in (call.args, *(one.elts for one in arguments if isinstance(one, (ast.Tuple, ast.List)))):
        if held and ast.unparse(held[0]) == "-1" and dim == 0:
            continue
        for index, one in enumerate(held[: dim + 3]):
            if isinstance(one, ast.Constant) and type(one.value) is int and one.value == number:
                held[index] = ast.parse(f"{name}.shape[{dim}]", mode="eval").body
                return


class _InTorch(ast.NodeTransformer):
    """Calls of numpy become those of torch of the same name."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        import torch

        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute):
            return node
        name, owner = node.func.attr, node.func.value
        if name in ("numpy", "cpu", "detach") and not node.args:
            return owner
        if not isinstance(owner, ast.Name) or not node.args:
            return node
        if owner.id == "torch" and name in ("from_numpy", "tensor", "as_tensor"):
            return node.args[0]
        if owner.id in ("np", "numpy"):
            if name in ("array", "asarray"):
                return node.args[0]
            if hasattr(torch, name):
                owner.id = "torch"
        return node


def _applied(function: ast.Lambda, operands: Sequence[ast.expr]) -> ast.expr:
    values = {one.arg: value for one, value in zip(function.args.args, operands, strict=False)}

    class Substitute(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return values.get(node.id, node)

    return Substitute().visit(function.body)  # type: ignore[no-any-return]
