"""Sentences from templates.

A file of templates has sections, `[name]`, with a template on each line; `#` begins a comment line. In a template
`{name}` stands for a line of that section, and `(one|other|)` for one of its alternatives, which may be empty.
`{request}` is bound when the template is expanded. `\\` takes a bracket's meaning away.
"""

MAX_DEPTH = 12  # of sections in each other; a section that names itself would else never end


class GrammarError(ValueError):
    """A file of templates is malformed; the message names the line."""


class Grammar:
    """Sections of templates, by name; a section that stands in several files has the lines of all."""

    def __init__(self, *files):
        self.sections = {}
        for text in files:
            self._read(text)
        for section, templates in self.sections.items():
            for slot in set().union(*map(_slots, templates)) - {"request"}:
                if slot not in self.sections:
                    raise GrammarError(f"section [{section}] uses {{{slot}}}, which no file defines")

    def _read(self, text):
        section = None
        for line in filter(None, map(str.strip, text.splitlines())):
            if line.startswith("#"):
                continue
            if line.startswith("[") and line.endswith("]"):
                section = line[1:-1]
            elif section is None:
                raise GrammarError(f"line {line!r} stands before the first [section]")
            else:
                self.sections.setdefault(section, []).append(parse(line))

    def section(self, name):
        """The templates of a section; none when there is no such section."""
        return self.sections.get(name, [])

    def expand(self, template, rng, request="", depth=MAX_DEPTH):
        """A sentence from a template."""
        if depth == 0:
            return ""
        out = []
        for kind, value in template:
            if kind == "text":
                out.append(value)
            elif kind == "choice":
                out.append(self.expand(_pick(value, rng), rng, request, depth - 1))
            elif value == "request":
                out.append(request)
            else:
                out.append(self.expand(_pick(self.sections[value], rng), rng, request, depth - 1))
        return "".join(out)

    def sentence(self, section, rng, request=""):
        """A sentence from a random template of a section."""
        return self.expand(_pick(self.sections[section], rng), rng, request)


def _pick(items, rng):
    return items[int(rng.random() * len(items))]


def parse(line):
    """A template as a list of ("text", str), ("slot", name) and ("choice", [template, ...])."""
    parts, at = _parse(line, 0, inside=False)
    if at != len(line):
        raise GrammarError(f"template {line!r} has a bracket that was not opened")
    return parts


def _parse(line, at, inside):
    parts, begin = [], at

    def text(end):
        if end > begin:
            parts.append(("text", line[begin:end]))

    while at < len(line):
        char = line[at]
        if char == "\\" and at + 1 < len(line):
            text(at)
            begin, at = at + 1, at + 2
        elif char == "{":
            text(at)
            end = line.find("}", at)
            if end < 0:
                break
            parts.append(("slot", line[at + 1 : end]))
            at = begin = end + 1
        elif char == "(":
            text(at)
            alternatives = []
            while True:
                alternative, at = _parse(line, at + 1, inside=True)
                alternatives.append(alternative)
                if line[at] == ")":
                    break
            parts.append(("choice", alternatives))
            at = begin = at + 1
        elif char in "|)" and inside:
            text(at)
            return parts, at
        elif char in "|)}":
            raise GrammarError(f"template {line!r} has a bracket that was not opened")
        else:
            at += 1
    if inside or at < len(line):
        raise GrammarError(f"template {line!r} has a bracket that is not closed")
    text(at)
    return parts, at


def _slots(template):
    out = set()
    for kind, value in template:
        if kind == "slot":
            out.add(value)
        elif kind == "choice":
            out.update(*map(_slots, value))
    return out
