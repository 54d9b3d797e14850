"""Frames: what a chat template writes around the texts of turns, kept where it provably decides nothing by them.

A template is a program, and most only join the texts of turns with others. `joins_contents` proves that of one from its
syntax tree: no content is compared, tested, searched, cut or counted, so that all conversations of the same roles have
the same text around their contents. That text is rendered once, with marks in place of contents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum, auto

from jinja2 import Environment, TemplateError, nodes
from jinja2.visitor import NodeVisitor

from simpo_megatron.data.bounded_dict import BoundedDict
from simpo_megatron.data.records import CONTENT_MARK, BadRecord, Message
from simpo_megatron.data.rendering.templates import ChatTemplate, bounds_of_templates
from simpo_megatron.limits import LimitError

# A blank that `trim` takes away.
_BLANK = "\u2003"
_MARKED = re.compile(rf"({_BLANK}?){CONTENT_MARK}(\d+){CONTENT_MARK}({_BLANK}?)")

Frame = tuple[str | tuple[int, bool], ...]
"""Texts of the template and, between them, numbers of turns, each with whether its content is trimmed."""


class TemplateFrames:
    """The frames of a template, by the roles of a conversation."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._joins = joins_contents(template.default)
        self._frames: BoundedDict[tuple, Frame | None] = BoundedDict()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str | None:
        """Returns what the template renders of turns that are text alone; None where no frame is proven.

        Raises: EndlessTemplateError.
        """
        roles = tuple(turn["role"] for turn in messages if len(turn) == 2)
        if len(roles) != len(messages):
            return None
        frame = self.of(roles, add_generation_prompt=add_generation_prompt)
        if frame is None:
            return None
        return "".join([piece if isinstance(piece, str) else _content(messages, *piece) for piece in frame])

    def of(self, roles: tuple[str, ...], *, add_generation_prompt: bool) -> Frame | None:
        """Returns the frame of conversations of these roles, whose turns are text alone; None where none is proven.

        Raises: EndlessTemplateError.
        """
        if not self._joins:
            return None
        shape = (add_generation_prompt, roles)
        if shape not in self._frames:
            self._frames[shape] = self._frame(roles, add_generation_prompt)
        return self._frames[shape]

    def _frame(self, roles: Sequence[str], add_generation_prompt: bool) -> Frame | None:
        contents = (f"{_BLANK}{CONTENT_MARK}{number}{CONTENT_MARK}{_BLANK}" for number in range(len(roles)))
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            rendered = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        except BadRecord:
            return None  # The one that fails says why.
        frame: list[str | tuple[int, bool]] = []
        text, *found = _MARKED.split(rendered)
        frame.append(text)
        for before, number, behind, text in zip(*[iter(found)] * 4, strict=True):
            if before != behind or _BLANK in text:
                return None
            frame += [(int(number), not before), text]
        return tuple(frame)


def _content(messages: Sequence[Message], number: int, is_trimmed: bool) -> str:
    content: str = messages[number]["content"]
    return content.strip() if is_trimmed else content


def joins_contents(template: str) -> bool:
    """Returns whether a template provably does no more with contents of messages than to write them, whole or trimmed.

    That holds for messages of a role and a content alone. Templates with macros or other blocks are not looked at.
    """
    if _BLANK in template or CONTENT_MARK in template:
        return False
    try:
        with bounds_of_templates():
            tree = Environment(autoescape=True, extensions=["jinja2.ext.loopcontrols"]).parse(template)  # not rendered
            flow = _ContentFlow()
            known: dict[str, _Kind] = {}
            while known != flow.kinds:  # A name may be read in front of where it is set, in a loop.
                known = dict(flow.kinds)
                flow.visit(tree)
    except (_UsesContentError, TemplateError, RecursionError, LimitError, MemoryError):
        return False
    return True


class _UsesContentError(Exception):
    """A template of which it is not proven that it only joins contents."""


class _Kind(Enum):
    """The part that contents have in a value."""

    PLAIN = auto()
    """None: the value is the same whatever the contents are."""
    CONTENT = auto()
    """The content of one message, whole or trimmed."""
    TEXT = auto()
    """Contents and plain texts, joined."""
    MESSAGE = auto()
    MESSAGES = auto()
    """A list of messages."""


_PLAIN, _CONTENT, _TEXT, _MESSAGE, _MESSAGES = _Kind
_WRITTEN = frozenset({_PLAIN, _CONTENT, _TEXT})
# Tests of a value's type, which contents do not change.
_TYPE_TESTS = frozenset({"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number"})
_LOOP_FACTS = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"})


class _ContentFlow(NodeVisitor):
    """Visits a template's syntax tree; each visit of an expression returns its _Kind.

    Attributes:
        kinds: of each name, whatever it is set to anywhere in the template.

    Raises: _UsesContentError at the first use of a content that is more than joining and writing it.
    """

    def __init__(self) -> None:
        self.kinds = {"messages": _MESSAGES}

    def generic_visit(self, node: nodes.Node, *args: object, **kwargs: object) -> _Kind:
        """The kind of any other expression: plain, for its parts must be."""
        if not isinstance(node, (nodes.Expr, nodes.Helper)):
            raise _UsesContentError
        self._require(node.iter_child_nodes(), _PLAIN)
        return _PLAIN

    def visit_Template(self, node: nodes.Template) -> None:
        self._visit_all(node.body)

    def visit_Output(self, node: nodes.Output) -> None:
        self._require(node.nodes, *_WRITTEN)

    def visit_If(self, node: nodes.If) -> None:
        self._require([node.test], _PLAIN, _MESSAGE, _MESSAGES)
        self._visit_all([*node.body, *node.elif_, *node.else_])

    def visit_For(self, node: nodes.For) -> None:
        kind = self._require([node.iter], _PLAIN, _MESSAGES)
        if node.recursive:
            raise _UsesContentError
        self._set(node.target, _MESSAGE if kind is _MESSAGES else _PLAIN)
        if node.test is not None:
            self._require([node.test], _PLAIN, _MESSAGE)
        self._visit_all([*node.body, *node.else_])

    def visit_Break(self, node: nodes.Break) -> None:
        """It depends on nothing itself."""

    visit_Continue = visit_Break

    def visit_Assign(self, node: nodes.Assign) -> None:
        self._set(node.target, self.visit(node.node))

    def visit_Name(self, node: nodes.Name) -> _Kind:
        if node.name in ("loop", "lipsum"):  # The loop holds its items; the other is another text each time.
            raise _UsesContentError
        return self.kinds.get(node.name, _PLAIN)

    def visit_Getattr(self, node: nodes.Getattr) -> _Kind:
        return self._part(node.node, node.attr)

    def visit_Getitem(self, node: nodes.Getitem) -> _Kind:
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._part(node.node, node.arg.value)
        kind = self._require([node.node], _PLAIN, _MESSAGES)
        self._require([node.arg], _PLAIN)
        return _MESSAGE if kind is _MESSAGES and not isinstance(node.arg, nodes.Slice) else kind

    def visit_Add(self, node: nodes.Add) -> _Kind:
        return self._joined([node.left, node.right])

    def visit_Concat(self, node: nodes.Concat) -> _Kind:
        return self._joined(node.nodes)

    def visit_CondExpr(self, node: nodes.CondExpr) -> _Kind:
        self._require([node.test], _PLAIN, _MESSAGE, _MESSAGES)
        kind: _Kind = self.visit(node.expr1)
        return kind if node.expr2 is None else _either(kind, self.visit(node.expr2))

    def visit_Not(self, node: nodes.Not) -> _Kind:
        self._require([node.node], _PLAIN, _MESSAGE, _MESSAGES)
        return _PLAIN

    def visit_Compare(self, node: nodes.Compare) -> _Kind:
        asks_for_key = isinstance(node.expr, nodes.Const) and all(found.op in ("in", "notin") for found in node.ops)
        self._require([node.expr], _PLAIN)
        for found in node.ops:
            self._require([found.expr], _PLAIN, *([_MESSAGE] if asks_for_key else []))
        return _PLAIN

    def visit_Test(self, node: nodes.Test) -> _Kind:
        if node.name not in _TYPE_TESTS:
            return self.generic_visit(node)
        self.visit(node.node)
        return _PLAIN

    def visit_Filter(self, node: nodes.Filter) -> _Kind:
        if node.node is None or node.name == "random":
            raise _UsesContentError
        value, *arguments = node.iter_child_nodes()
        kind = self._require([value], *_Kind)
        self._require(arguments, _PLAIN)
        if kind is _PLAIN or (kind is _CONTENT and node.name == "trim" and not arguments):
            return kind
        if kind is _MESSAGES and node.name in ("length", "count", "first", "last"):
            return _PLAIN if node.name in ("length", "count") else _MESSAGE
        raise _UsesContentError

    def visit_Call(self, node: nodes.Call) -> _Kind:
        function, *arguments = node.iter_child_nodes()
        if isinstance(function, nodes.Getattr) and function.attr == "strip" and not arguments:
            return self._require([function.node], _PLAIN, _CONTENT)
        return self.generic_visit(node)

    def _part(self, node: nodes.Expr, name: str) -> _Kind:
        """Returns the kind of an attribute or item of a value, which Jinja looks for in the same way."""
        if isinstance(node, nodes.Name) and node.name == "loop":
            if name in _LOOP_FACTS:
                return _PLAIN
            if name in ("previtem", "nextitem"):
                return _MESSAGE
            raise _UsesContentError
        kind = self._require([node], _PLAIN, _MESSAGE)
        if kind is _PLAIN or name == "role":
            return _PLAIN
        if name == "content":
            return _CONTENT
        if hasattr(dict, name):
            raise _UsesContentError
        return _PLAIN  # There is none: messages have a role and a content alone.

    def _joined(self, parts: Iterable[nodes.Expr]) -> _Kind:
        kinds = {self._require([part], *_WRITTEN) for part in parts}
        return _PLAIN if kinds == {_PLAIN} else _TEXT

    def _set(self, target: nodes.Node, kind: _Kind) -> None:
        if isinstance(target, nodes.Name):
            self.kinds[target.name] = _either(kind, self.kinds.get(target.name, kind))
        elif kind is not _PLAIN:  # parts of a value, or an attribute of a namespace
            raise _UsesContentError
        else:
            for name in target.find_all(nodes.Name):
                self._set(name, _PLAIN)

    def _visit_all(self, parts: Iterable[nodes.Node]) -> None:
        for part in parts:
            self.visit(part)

    def _require(self, parts: Iterable[nodes.Node], *allowed: _Kind) -> _Kind:
        """Visits `parts`, each of a kind that is allowed; returns the kind of the last one."""
        kind = _PLAIN
        for part in parts:
            kind = self.visit(part)
            if kind not in allowed:
                raise _UsesContentError
        return kind


def _either(kind: _Kind, other: _Kind) -> _Kind:
    """Returns the kind of a value that is of the one or of the other."""
    if kind is other:
        return kind
    if {kind, other} <= _WRITTEN:
        return _TEXT
    raise _UsesContentError
