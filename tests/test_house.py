"""The rules of the house, measured: density of lines, comments, exported names, local names.

Nothing of curvax is imported: its source is read as text, tokens and syntax trees. A broken rule
is reported with file and line. CONTRIBUTING.md has the rules.
"""

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parent.parent / "curvax"

MAX_TOKENS_PER_LINE = 9.3  # matfree's; lineax, optimistix, optax and equinox have 6.7 to 7.2
MIN_COMMENTS_PER_100_LINES = 6  # the same libraries have 9.5 to 22
MAX_LINE_LENGTH = 100
MAX_LINES_WITHOUT_DOCSTRING = 10
MAX_FIELDS_BY_POSITION = 4

# Words that can mean anything. `left` may stand beside `right`, for the sides of a product.
BANNED = {
    *("own", "made", "found", "held", "given", "taken", "kept", "done"),
    *("some", "whole", "rest", "strength", "left"),
}

LAYOUT_TOKENS = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


class Module(NamedTuple):
    """A file of the library."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self):
        """The dotted name that an import uses; for an `__init__.py` that of its package."""
        parts = self.path.relative_to(SOURCE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def group(self):
        """The floor that the file is on: a package, or the modules beside the packages."""
        folder, *below = self.path.relative_to(SOURCE).parts
        return f"curvax/{folder}" if below else "curvax/*.py"

    def at(self, node):
        """Return `file:line` of a node of the syntax tree, or of a line by its number."""
        line = 1 if isinstance(node, ast.Module) else getattr(node, "lineno", node)
        return f"{self.path.relative_to(SOURCE.parent)}:{line}"


def read(path):
    text = path.read_text()
    return Module(path, text, ast.parse(text))


MODULES = [read(path) for path in sorted(SOURCE.rglob("*.py"))]
PAGES = {module.name: module for module in MODULES if module.path.name == "__init__.py"}
GROUPS = sorted({module.group for module in MODULES})

every_group = pytest.mark.parametrize("group", GROUPS)
every_package = pytest.mark.parametrize("package", PAGES)


def modules_of(group):
    return [module for module in MODULES if module.group == group]


def expect_none(problems):
    """Fail with a list of problems, one on a line."""
    problems = sorted(set(problems))
    if problems:
        pytest.fail(f"{len(problems)} of them:\n" + "\n".join(problems), pytrace=False)


# --- lines and comments ---------------------------------------------------------------------------


class Count(NamedTuple):
    """Tokens of code, the lines that hold them, and comments. Docstrings are not code."""

    tokens: int
    lines: int
    comments: int

    @property
    def tokens_per_line(self):
        return self.tokens / max(self.lines, 1)

    @property
    def comments_per_100_lines(self):
        return 100 * self.comments / max(self.lines, 1)


def count(module):
    docstring_lines = set()
    for node in ast.walk(module.tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                docstring_lines.update(range(node.lineno, node.end_lineno + 1))
    tokens, comments, lines = 0, 0, set()
    for token in with_whole_f_strings(module.text):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.type not in LAYOUT_TOKENS and token.start[0] not in docstring_lines:
            tokens += 1
            lines.add(token.start[0])
    return Count(tokens, len(lines), comments)


def with_whole_f_strings(text):
    """Yield tokens; an f-string is one token on every Python, as it was before Python 3.12."""
    start, end = getattr(tokenize, "FSTRING_START", None), getattr(tokenize, "FSTRING_END", None)
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if depth == 0:
            yield token
        depth += (token.type == start) - (token.type == end)


def count_all(group):
    """Return the `Count` of a group of modules together, and a table of each."""
    counts = {module.at(1): count(module) for module in modules_of(group)}
    total = Count(*map(sum, zip(*counts.values(), strict=True)))
    table = [
        f"{name}: {each.tokens_per_line:.1f} tokens on each of {each.lines} lines, "
        f"{each.comments_per_100_lines:.1f} comments on 100 lines"
        for name, each in counts.items()
    ]
    return total, "\n".join(table)


@every_group
def test_a_line_of_code_holds_few_tokens(group):
    total, table = count_all(group)
    assert total.tokens_per_line <= MAX_TOKENS_PER_LINE, (
        f"{group} has {total.tokens_per_line:.2f} tokens on a line of code; "
        f"at most {MAX_TOKENS_PER_LINE} can be read. Name the intermediate results.\n{table}"
    )


@every_group
def test_comments_say_why_and_which_equation(group):
    total, table = count_all(group)
    assert total.comments_per_100_lines >= MIN_COMMENTS_PER_100_LINES, (
        f"{group} has {total.comments_per_100_lines:.1f} comments on 100 lines of code; at least "
        f"{MIN_COMMENTS_PER_100_LINES} should say why, or which equation is computed.\n{table}"
    )


@every_group
def test_no_line_is_long(group):
    expect_none(
        f"{module.at(number)}: {len(line)} characters"
        for module in modules_of(group)
        for number, line in enumerate(module.text.splitlines(), start=1)
        if len(line) > MAX_LINE_LENGTH
    )


# --- exported names -------------------------------------------------------------------------------


def imported(page):
    """Return `{name: module it is imported from}` of a package's page."""
    statements = [node for node in page.tree.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: statement.module
        for statement in statements
        for alias in statement.names
    }


def exported(page):
    """Return the names in a page's `__all__`; none where there is no `__all__`."""
    for node in page.tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")]):
                return ast.literal_eval(node.value)
    return []


@every_package
def test_all_lists_what_the_package_imports(package):
    page = PAGES[package]
    names, bound = exported(page), set(imported(page))
    assert names, f"{page.at(1)}: there is no __all__"
    expect_none(
        [
            *(
                f"{page.at(1)}: {name} is imported, and not in __all__"
                for name in bound - set(names)
            ),
            *(
                f"{page.at(1)}: {name} is in __all__, and not imported"
                for name in set(names) - bound
            ),
            *(
                f"{page.at(1)}: {name} is in __all__ twice"
                for name in names
                if names.count(name) > 1
            ),
        ]
    )


@every_package
def test_no_exported_name_hides_a_module(package):
    """`import curvax.solve.cg as m` would bind the function where the reader expects the module."""
    page = PAGES[package]
    modules = {module.name for module in MODULES}
    expect_none(
        f"{page.at(1)}: {name}, imported from {origin}, hides {package}.{name}; call that _{name}"
        for name, origin in imported(page).items()
        if origin != package and f"{package}.{name}" in modules
    )


def test_every_state_and_info_that_a_docstring_names_can_be_imported():
    defined_in = {}  # class name -> the page of the package that defines it
    for module in MODULES:
        page = PAGES.get(module.name) or PAGES[module.name.rpartition(".")[0]]
        classes = [node for node in module.tree.body if isinstance(node, ast.ClassDef)]
        defined_in.update((node.name, page) for node in classes)
    problems = []
    for module in MODULES:
        for node in ast.walk(module.tree):
            for name in re.findall(r"(?<![\w.])[A-Z]\w*(?:State|Info)\b", docstring(node)):
                page = defined_in.get(name)
                if page is None:
                    problems.append(f"{module.at(node)}: there is no class {name}")
                elif name not in exported(page):
                    problems.append(f"{module.at(node)}: {page.name} does not export {name}")
    expect_none(problems)


# --- functions and local names --------------------------------------------------------------------


def docstring(node):
    """Return the docstring of a node, empty where there is none."""
    can_have_one = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (isinstance(node, can_have_one) and ast.get_docstring(node)) or ""


def functions_of(node):
    """Yield the functions and methods of a module, but not those inside another function."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield from functions_of(child)


@every_group
def test_every_function_over_ten_lines_has_a_docstring(group):
    length = lambda node: node.end_lineno - node.lineno + 1
    expect_none(
        f"{module.at(node)}: {node.name} has {length(node)} lines"
        for module in modules_of(group)
        for node in functions_of(module.tree)
        if length(node) > MAX_LINES_WITHOUT_DOCSTRING and not docstring(node)
    )


def bound_name(node, function):
    """Return the name of the variable, parameter or inner function that a node binds, if any."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()):  # assignments, loops, comprehensions, `with`, `:=`
            return name
        case ast.arg(arg=name) | ast.ExceptHandler(name=name) | ast.MatchAs(name=name):
            return name
        case ast.FunctionDef(name=name) if function is not None:
            return name
    return None


def bindings(node, function=None):
    """Yield `(name, node, innermost function)` of everything bound below a node.

    The fields of a class are left out: they are read after the name of an object and a dot.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.ClassDef) and isinstance(child, (ast.Assign, ast.AnnAssign)):
            continue
        if name := bound_name(child, function):
            yield name, child, function
        is_function = isinstance(child, (ast.FunctionDef, ast.Lambda))
        yield from bindings(child, child if is_function else function)


def is_a_side(name, function):
    """Return whether `left` stands beside `right` in the same function."""
    return name == "left" and any(other == "right" for other, _, _ in bindings(function))


@every_group
def test_no_local_name_can_mean_anything(group):
    expect_none(
        f"{module.at(node)}: {name}"
        for module in modules_of(group)
        for name, node, function in bindings(module.tree)
        if name in BANNED and not is_a_side(name, function or module.tree)
    )


def fields(node):
    """Return the names of the fields of a NamedTuple or dataclass; none for any other node."""
    if not isinstance(node, ast.ClassDef):
        return []
    bases_and_decorators = map(ast.unparse, [*node.bases, *node.decorator_list])
    if not any(re.search("NamedTuple|dataclass", each) for each in bases_and_decorators):
        return []
    return [child.target.id for child in node.body if isinstance(child, ast.AnnAssign)]


def records(module):
    """Return `{class: number of fields}` of a module's NamedTuples and dataclasses."""
    return {node.name: len(fields(node)) for node in ast.walk(module.tree) if fields(node)}


@every_group
def test_records_of_many_fields_are_built_by_keyword(group):
    in_any = {name: size for module in MODULES for name, size in records(module).items()}
    problems = []
    for module in modules_of(group):
        sizes = {**in_any, **records(module)}  # a name of the module itself comes first
        calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call) and node.args]
        for call in calls:
            name = ast.unparse(call.func).rpartition(".")[2]
            if sizes.get(name, 0) > MAX_FIELDS_BY_POSITION:
                problems.append(f"{module.at(call)}: {name} has {sizes[name]} fields")
    expect_none(problems)
