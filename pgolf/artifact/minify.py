"""Python without what it does not need to run: comments, docstrings, blank lines, deep indents and broken lines.

It works on the tokens, not on the syntax tree, because `ast.unparse` writes differently in each version of Python, and
one source must count the same number of bytes everywhere.
"""

import ast
import io
import tokenize

Position = tuple[int, int]  # line from 1, letter from 0
LEFT_OUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE)
# Since Python 3.12 a formatted string is several tokens; between them every character counts.
STRING_START = getattr(tokenize, "FSTRING_START", -1)
STRING_END = getattr(tokenize, "FSTRING_END", -1)


def minified(source: str) -> str:
    """The same program in fewer bytes, the same text for every version of Python."""
    lines = list(io.StringIO(source))
    docstrings = _docstrings(source, lines)
    written: list[str] = []
    line, level, strings = "", 0, 0  # `strings`: how many formatted strings are open
    before: tokenize.TokenInfo | None = None
    docstring_end = 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        level += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type == tokenize.NEWLINE and line:
            written.append(line)
            line = ""
        if token.type in LEFT_OUT or token.start < docstring_end:
            continue
        text = _between(lines, token.start, token.end)
        if token.start in docstrings:
            docstring_end, needed = docstrings[token.start]
            if not needed:
                continue
            text = "pass"
        if before is None or not line:
            line = " " * level + text
        else:
            line += _space(lines, before, token, bool(strings)) + text
        strings += (token.type == STRING_START) - (token.type == STRING_END)
        before = token
    return "\n".join(written) + "\n"


def _docstrings(source: str, lines: list[str]) -> dict[Position, tuple[Position, bool]]:
    """Where each docstring begins and ends, and whether something has to stand in its place."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            first, *rest = node.body
            assert first.end_lineno is not None
            assert first.end_col_offset is not None
            shares_line = bool(rest) and rest[0].lineno == first.end_lineno
            start, end = (
                (line, len(lines[line - 1].encode()[:column].decode()))  # from bytes, as ast counts, to letters
                for line, column in ((first.lineno, first.col_offset), (first.end_lineno, first.end_col_offset))
            )
            found[start] = end, not rest or shares_line
    return found


def _space(lines: list[str], before: tokenize.TokenInfo, token: tokenize.TokenInfo, in_string: bool) -> str:
    """What stands between two tokens of a line; where the source breaks the line, a blank or nothing."""
    if in_string:
        return _between(lines, before.end, token.start)
    if before.end[0] == token.start[0]:
        return " " * (token.start[1] > before.end[1])
    return "" if before.string in "([{" or token.string in ")]}" else " "


def _between(lines: list[str], start: Position, end: Position) -> str:
    (first, column), (last, stop) = start, end
    if first == last:
        return lines[first - 1][column:stop]
    return "".join([lines[first - 1][column:], *lines[first : last - 1], lines[last - 1][:stop]])
