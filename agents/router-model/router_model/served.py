"""The model as ark-inference serves it: asked over MCP, by the engine that agents get their answers from."""

import json
import os
import subprocess

from .evaluate import LONGEST_REPLY


class Served:
    """A server with the model, which answers like `evaluate.Router`. Ended by `close`."""

    def __init__(self, program, model):
        arguments = [program, "--stdio", "--model", f"router={model}"]
        quiet = os.environ | {"RUST_LOG": "error"}
        self.server = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)
        self.asked = 0
        me = {"name": "router_model", "version": "0"}
        self._call("initialize", {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": me})
        self._send({"method": "notifications/initialized"})

    def close(self):
        """Ends the server."""
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()

    def ask(self, messages):
        """The greedy reply to a conversation; None when it does not end."""
        arguments = {
            "messages": [{"role": role, "content": content} for role, content in messages],
            "max_tokens": LONGEST_REPLY,
            "sampling": {"temperature": 0},
        }
        said = self._call("tools/call", {"name": "chat", "arguments": arguments})["structuredContent"]
        return said["message"]["content"] if said["finish_reason"] == "stop" else None

    def _send(self, message):
        self.server.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self.server.stdin.flush()

    def _call(self, method, params):
        self.asked += 1
        self._send({"id": self.asked, "method": method, "params": params})
        while line := self.server.stdout.readline():
            answer = json.loads(line)
            if answer.get("id") != self.asked:
                continue
            if "error" in answer:
                raise ValueError(f"the server refused {method}: {answer['error']['message']}")
            return answer["result"]
        raise ValueError("the server has ended")
