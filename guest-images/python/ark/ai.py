"""Models, from within an agent that is allowed to use them; no network is needed.

    import ark

    print(ark.ai.chat("Which agent should sort invoices into folders?"))
    for more in ark.ai.stream("Tell me more.", model="qwen"):
        print(more, end="", flush=True)
    answer = ark.ai.chat("Is it late?", schema={"type": "object", "properties": {"late": {"type": "boolean"}}})
    vectors = ark.ai.embed(["one text", "another"])

The host is spoken to in MCP (one JSON-RPC message a line) at its vsock port 1031. Each call has a connection of its own: calls of
several threads do not wait for each other, a fork's calls are its own, and a call whose caller leaves is cancelled.
"""

import json
import socket

__all__ = [
    "AIError", "BadRequest", "Broken", "BudgetExceeded", "Cancelled", "ContextOverflow", "DeadlinePassed", "Failed", "NotAllowed",
    "Overloaded", "Reply", "Unavailable", "UnknownModel", "chat", "embed", "generate", "models", "stream", "tokenize",
]

#: Where the host listens: a (context id, port) of vsock, or the path of a Unix socket.
ADDRESS = (2, 1031)
#: Revision of MCP that is spoken.
REVISION = "2025-11-25"
#: Longest line that is read, bytes.
MAX_LINE = 64 << 20


class AIError(Exception):
    """A call came to nothing. ``reason`` is a word for programs, ``data`` what else the host said."""

    def __init__(self, message, reason=None, data=None):
        super().__init__(message)
        self.reason = reason
        self.data = data if isinstance(data, dict) else {}

    @property
    def text(self):
        """What the model had said by then."""
        return self.data.get("text") or ""


class Unavailable(AIError):
    """The host does not answer."""


class Broken(AIError):
    """The connection broke, or what came is not MCP."""


class NotAllowed(AIError):
    """This agent may not use inference, or not that model."""


class UnknownModel(AIError):
    """There is no model of that name."""


class ContextOverflow(AIError):
    """Prompt and reply do not fit the model's context."""


class BadRequest(AIError):
    """A parameter is wrong."""


class Overloaded(AIError):
    """Too many calls wait; a later try may do."""


class BudgetExceeded(AIError):
    """The agent, or its owner, has used up its budget for now."""


class DeadlinePassed(AIError):
    """The call took longer than it was given; ``text`` has what there was."""


class Failed(AIError):
    """The model, or its VM, could not go on; ``text`` has what there was."""


class Cancelled(AIError):
    """The call was cancelled."""


_BY_REASON = {
    "not_allowed": NotAllowed, "unknown_model": UnknownModel, "model_not_found": UnknownModel, "context_overflow": ContextOverflow,
    "budget_used": BudgetExceeded,
}
_BY_CODE = {
    -32602: BadRequest, -32010: Overloaded, -32011: DeadlinePassed, -32012: Failed, -32013: Cancelled, -32014: Overloaded,
    -32015: NotAllowed,
}


def _refused(error):
    """The exception that an error of JSON-RPC is."""
    if not isinstance(error, dict):
        return Broken("the host refused without a word")
    message, code, data = error.get("message"), error.get("code"), error.get("data")
    reason = data.get("reason") if isinstance(data, dict) else None
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code) or AIError
    return kind(str(message), reason=reason, data=data)


class Reply(str):
    """What a model said, as a string; ``model``, ``finish_reason``, ``usage``, ``timings`` and ``tool_calls`` say more."""

    def __new__(cls, text, result):
        reply = super().__new__(cls, text)
        reply.model = result.get("model")
        reply.finish_reason = result.get("finish_reason")
        reply.usage = result.get("usage") or {}
        reply.timings = result.get("timings") or {}
        message = result.get("message")
        reply.tool_calls = message.get("tool_calls") or [] if isinstance(message, dict) else []
        return reply


class _Session:
    """A connection on which one call is made."""

    def __init__(self):
        self.next = 0
        self.socket = socket.socket(socket.AF_UNIX if isinstance(ADDRESS, str) else socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            self.socket.connect(ADDRESS)
        except OSError as error:
            self.socket.close()
            raise Unavailable(f"the host does not answer at {ADDRESS}: {error}; inference is for agents of a host that has it") from error
        self.lines = self.socket.makefile("rb")

    def __enter__(self):
        client = {"name": "ark.ai", "version": "1"}
        params = {"protocolVersion": REVISION, "capabilities": {}, "clientInfo": client}
        try:
            self.result("initialize", params)
            self.send({"method": "notifications/initialized"})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.lines.close()
        self.socket.close()

    def send(self, message):
        line = json.dumps({"jsonrpc": "2.0", **message}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            self.socket.sendall(line)
        except BrokenPipeError:
            # Who was refused may find that out by writing, and the reason is there to be read.
            pass
        except OSError as error:
            raise Broken(f"the connection to the host broke: {error}") from error

    def receive(self):
        while True:
            try:
                line = self.lines.readline(MAX_LINE)
            except OSError as error:
                raise Broken(f"the connection to the host broke: {error}") from error
            if not line:
                raise Broken("the host closed the connection without an answer")
            if not line.strip():
                continue
            try:
                message = json.loads(line)
            except ValueError as error:
                raise Broken(f"the host's answer is not understood: {error}") from error
            if isinstance(message, dict):
                return message
            raise Broken("the host's answer is not understood: it is no object")

    def events(self, method, params):
        """Yields texts as they come, and at last the result, an object."""
        number, self.next = self.next, self.next + 1
        self.send({"id": number, "method": method, "params": params})
        while True:
            message = self.receive()
            kind, theirs = message.get("method"), message.get("id")
            if kind is not None and theirs is not None:
                self.answer(kind, theirs)
            elif kind == "notifications/progress":
                told = message.get("params")
                if isinstance(told, dict) and told.get("progressToken") == number and isinstance(told.get("message"), str):
                    yield told["message"]
            elif kind is None and "error" in message:
                raise _refused(message["error"])
            elif kind is None and theirs == number:
                result = message.get("result")
                if not isinstance(result, dict):
                    raise Broken("the host's answer is not understood: it has no result")
                yield result
                return

    def answer(self, kind, theirs):
        """Answers a request of the host's."""
        if kind == "ping":
            self.send({"id": theirs, "result": {}})
        else:
            self.send({"id": theirs, "error": {"code": -32601, "message": "this client has no such method"}})

    def result(self, method, params):
        for event in self.events(method, params):
            if isinstance(event, dict):
                return event

    def call(self, tool, arguments):
        """Yields texts as they come, and at last the tool's structured result."""
        params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": self.next}}
        for event in self.events("tools/call", params):
            if isinstance(event, str):
                yield event
                continue
            if event.get("isError"):
                content = event.get("content")
                words = [part.get("text", "") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
                raise Failed(" ".join(words) or "the tool failed")
            structured = event.get("structuredContent")
            if not isinstance(structured, dict):
                raise Broken(f"the host's answer is not understood: the result of {tool} has no structured content")
            yield structured


def _call(tool, arguments):
    with _Session() as session:
        for event in session.call(tool, arguments):
            if isinstance(event, dict):
                return event


def _given(**parameters):
    return {key: value for key, value in parameters.items() if value is not None}


def _saying(model, max_tokens, stop, timeout, schema, sampling):
    """The parameters that ``chat`` and ``generate`` have in common; ``timeout`` is in seconds."""
    sampling = _given(json_schema=schema, **sampling)
    return _given(
        model=model, max_tokens=max_tokens, stop=[stop] if isinstance(stop, str) else stop,
        timeout_ms=None if timeout is None else max(1, round(timeout * 1000)), sampling=sampling or None,
    )


def _messages(messages, system):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return ([{"role": "system", "content": system}] if system is not None else []) + list(messages)


def chat(messages, *, model=None, system=None, schema=None, tools=None, max_tokens=None, stop=None, timeout=None, **sampling):
    """A model's reply to a text, or to a conversation: a list of ``{"role": ..., "content": ...}``.

    ``schema`` is a JSON schema that the reply matches. ``sampling``: temperature, top_p, top_k, min_p, seed, grammar.
    """
    arguments = _saying(model, max_tokens, stop, timeout, schema, sampling)
    arguments.update(_given(messages=_messages(messages, system), tools=tools))
    result = _call("chat", arguments)
    message = result.get("message")
    return Reply(message.get("content") or "" if isinstance(message, dict) else "", result)


def stream(messages, *, model=None, system=None, schema=None, max_tokens=None, stop=None, timeout=None, **sampling):
    """The same, piece by piece as the model says it. Leaving the loop cancels the call."""
    arguments = _saying(model, max_tokens, stop, timeout, schema, sampling)
    arguments["messages"] = _messages(messages, system)
    with _Session() as session:
        for event in session.call("chat", arguments):
            if isinstance(event, str):
                yield event


def generate(prompt, *, model=None, schema=None, max_tokens=None, stop=None, timeout=None, **sampling):
    """The text with which a model goes on after ``prompt``."""
    arguments = _saying(model, max_tokens, stop, timeout, schema, sampling)
    arguments["prompt"] = prompt
    result = _call("generate", arguments)
    return Reply(result.get("text") or "", result)


def embed(texts, *, model=None):
    """A vector for each of ``texts``, at most 64; for a single string its vector."""
    several = [texts] if isinstance(texts, str) else list(texts)
    vectors = _call("embed", _given(model=model, input=several)).get("embeddings")
    if not isinstance(vectors, list) or len(vectors) != len(several):
        raise Broken("the host's answer is not understood: there is not one vector for each text")
    return vectors[0] if isinstance(texts, str) else vectors


def tokenize(text, *, model=None):
    """The numbers of the tokens of ``text``, as the model reads it."""
    return _call("tokenize", _given(model=model, text=text)).get("tokens") or []


def models():
    """The names of the models that this agent may use."""
    with _Session() as session:
        resources = session.result("resources/list", {}).get("resources")
    return [r["name"] for r in resources or [] if isinstance(r, dict) and isinstance(r.get("name"), str)]
