"""The module `ark` of image python against a host that speaks MCP over a Unix socket: module.py DIRECTORY-OF-THE-MODULE"""

import json
import os
import socket
import sys
import tempfile
import threading
import unittest

sys.path.insert(0, sys.argv.pop(1))
import ark


class Host(threading.Thread):
    """Serves connections one after another; `reply(message)` gives what a request is answered with, ids filled in."""

    def __init__(self, reply):
        super().__init__(daemon=True)
        self.dir = tempfile.TemporaryDirectory()
        ark.ai.ADDRESS = os.path.join(self.dir.name, "mcp")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(ark.ai.ADDRESS)
        self.listener.listen()
        self.reply, self.asked, self.left = reply, [], threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.join()
        self.dir.cleanup()

    def run(self):
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            with connection, connection.makefile("rwb") as lines:
                try:
                    self.converse(lines)
                except OSError:
                    pass
            self.left.set()

    def converse(self, lines):
        for line in lines:
            message = json.loads(line)
            self.asked.append(message)
            if message.get("method") == "initialize":
                replies = [{"result": {"protocolVersion": ark.ai.REVISION}}]
            elif "id" in message and "method" in message:
                replies = self.reply(message)
            else:
                continue
            for said in replies:
                if isinstance(said, bytes):
                    lines.write(said)
                else:
                    own = {} if "method" in said or "id" in said else {"id": message["id"]}
                    lines.write(json.dumps({"jsonrpc": "2.0", **own, **said}).encode() + b"\n")
            lines.flush()


def progress(message, text):
    token = message["params"]["_meta"]["progressToken"]
    return {"method": "notifications/progress", "params": {"progressToken": token, "progress": 1, "message": text}}


def result(content):
    return {"result": {"content": [], "structuredContent": content}}


def chatted(text, **more):
    message = {"role": "assistant", "content": text, **more}
    return result({"model": "m", "message": message, "finish_reason": "stop", "usage": {"total_tokens": 3}})


def error(code, reason, **data):
    return {"error": {"code": code, "message": f"no: {reason}", "data": {"reason": reason, **data}}}


class Ai(unittest.TestCase):
    def test_a_reply_is_a_string_that_knows_more(self):
        with Host(lambda m: [progress(m, "Hi"), {"method": "ping", "id": "p"}, chatted("Hi there")]) as host:
            schema = {"type": "string"}
            reply = ark.ai.chat("hello", model="m", system="be kind", schema=schema, seed=7, temperature=0, stop="!", timeout=1.5)
        self.assertEqual(reply, "Hi there")
        self.assertEqual((reply.model, reply.finish_reason, reply.usage, reply.tool_calls), ("m", "stop", {"total_tokens": 3}, []))
        self.assertEqual([m.get("method") for m in host.asked], ["initialize", "notifications/initialized", "tools/call", None])
        self.assertEqual(host.asked[3], {"jsonrpc": "2.0", "id": "p", "result": {}})
        self.assertEqual(host.asked[2]["params"]["arguments"], {
            "model": "m", "stop": ["!"], "timeout_ms": 1500, "sampling": {"json_schema": schema, "seed": 7, "temperature": 0},
            "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
        })

    def test_only_what_is_given_is_sent(self):
        messages = [{"role": "user", "content": "hello"}]
        with Host(lambda m: [chatted("x", tool_calls=[{"id": "1"}])]) as host:
            reply = ark.ai.chat(messages, tools=[{"type": "function"}])
        self.assertEqual(host.asked[2]["params"]["arguments"], {"messages": messages, "tools": [{"type": "function"}]})
        self.assertEqual(reply.tool_calls, [{"id": "1"}])

    def test_a_stream_comes_in_pieces_and_who_leaves_it_cancels_the_call(self):
        with Host(lambda m: [progress(m, "a"), progress(m, "b"), progress({"params": {"_meta": {"progressToken": 99}}}, "no"), chatted("ab")]):
            self.assertEqual(list(ark.ai.stream("x")), ["a", "b"])
        with Host(lambda m: [progress(m, "a")]) as host:
            stream = ark.ai.stream("x")
            self.assertEqual(next(stream), "a")
            self.assertFalse(host.left.is_set())
            stream.close()
            self.assertTrue(host.left.wait(30))

    def test_the_other_tools(self):
        with Host(lambda m: [result({"embeddings": [[0.5, 1]] * len(m["params"]["arguments"]["input"])})]):
            self.assertEqual(ark.ai.embed("one"), [0.5, 1])
            self.assertEqual(ark.ai.embed(["one", "two"]), [[0.5, 1], [0.5, 1]])
        with Host(lambda m: [result({"tokens": [1, 2], "count": 2})]):
            self.assertEqual(ark.ai.tokenize("one"), [1, 2])
        with Host(lambda m: [result({"text": m["params"]["arguments"]["prompt"] + "!"})]):
            self.assertEqual(ark.ai.generate("\ud800one\n"), "?one\n!")
        with Host(lambda m: [{"result": {"resources": [{"uri": "model://m", "name": "m"}, {}, 7]}}]):
            self.assertEqual(ark.ai.models(), ["m"])

    def test_what_is_refused_is_an_exception_of_its_kind(self):
        for code, reason, kind in [
            (-32015, "not_allowed", ark.ai.NotAllowed), (-32602, "unknown_model", ark.ai.UnknownModel),
            (-32602, "context_overflow", ark.ai.ContextOverflow), (-32602, "temperature", ark.ai.BadRequest), (-32602, "model_not_found", ark.ai.UnknownModel),
            (-32602, "not_allowed", ark.ai.NotAllowed), (-32010, "budget_used", ark.ai.BudgetExceeded), (-32012, "replica_gone", ark.ai.Failed),
            (-32010, "overloaded", ark.ai.Overloaded), (-32014, "stopping", ark.ai.Overloaded), (-32013, "cancelled", ark.ai.Cancelled),
            (-32011, "deadline", ark.ai.DeadlinePassed), (-32012, "failed", ark.ai.Failed), (-1, "new", ark.ai.AIError),
        ]:
            with Host(lambda m: [error(code, reason, text="half")]), self.assertRaises(ark.ai.AIError) as raised:
                ark.ai.chat("x")
            self.assertIs(type(raised.exception), kind)
            self.assertEqual((raised.exception.reason, raised.exception.text), (reason, "half"))
        with Host(lambda m: [progress(m, "half"), error(-32012, "failed", text="half")]):
            stream = ark.ai.stream("x")
            self.assertEqual(next(stream), "half")
            with self.assertRaises(ark.ai.Failed):
                next(stream)

    def test_whatever_comes_is_told_in_an_exception(self):
        for nonsense in [
            [b"\xff\n"], [b"[]\n"], [b"\n{\n"], [{"result": 7}], [result(7)], [{"result": {}}], [{"id": None, "error": 7}],
        ]:
            with Host(lambda m: nonsense), self.assertRaises(ark.ai.Broken):
                ark.ai.chat("x")
        with Host(lambda m: [{"result": {"isError": True, "content": [{"text": "it failed"}]}}]):
            with self.assertRaisesRegex(ark.ai.Failed, "it failed"):
                ark.ai.chat("x")
        with Host(lambda m: [result({"embeddings": []})]), self.assertRaises(ark.ai.Broken):
            ark.ai.embed("x")

    def test_a_host_that_is_not_there_is_told(self):
        ark.ai.ADDRESS = "/nonexistent"
        with self.assertRaisesRegex(ark.ai.Unavailable, "does not answer"):
            ark.ai.chat("x")


unittest.main()
