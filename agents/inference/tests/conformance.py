"""The MCP server against the official Python SDK as its peer, in both lifecycles of the protocol.

    python3 conformance.py ARK-INFERENCE MODEL.gguf
"""

import asyncio
import json
import sys

from mcp import Client, MCPError, StdioServerParameters


async def refused(client, reason, arguments):
    try:
        await client.call_tool("generate", arguments)
    except MCPError as error:
        assert error.error.data["reason"] == reason, error.error
        return
    raise AssertionError(f"{arguments} were taken")


async def converse(program, model, mode):
    server = StdioServerParameters(command=program, args=["--stdio", "--model", f"m={model}"])
    async with Client(server, mode=mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"chat", "generate", "embed", "tokenize"}, tools
        resources = (await client.list_resources()).resources
        assert [str(r.uri) for r in resources] == ["model://m"], resources
        described = json.loads((await client.read_resource("model://m")).contents[0].text)
        assert described["architecture"] == "llama", described

        parts = []

        async def heard(progress, total, message):
            parts.append(message)

        sampling = {"temperature": 0}
        said = await client.call_tool(
            "generate", {"prompt": "Hello", "max_tokens": 12, "sampling": sampling}, progress_callback=heard
        )
        assert not said.is_error and said.structured_content["usage"]["completion_tokens"] >= 1, said
        # The SDK hands progress on in tasks of their own; the last may come after the result.
        for _ in range(100):
            if "".join(parts) == said.structured_content["text"]:
                break
            await asyncio.sleep(0.05)
        assert "".join(parts) == said.structured_content["text"], (parts, said)

        messages = [{"role": "user", "content": "Hello"}]
        replied = await client.call_tool("chat", {"messages": messages, "max_tokens": 4, "sampling": sampling})
        assert replied.structured_content["message"]["role"] == "assistant", replied
        vectors = await client.call_tool("embed", {"input": ["a", "b"]})
        assert len(vectors.structured_content["embeddings"]) == 2, vectors
        tokens = await client.call_tool("tokenize", {"text": "Hello"})
        assert tokens.structured_content["count"] == len(tokens.structured_content["tokens"]), tokens

        await refused(client, "temperature", {"prompt": "x", "sampling": {"temperature": -1}})
        await refused(client, "context_overflow", {"prompt": "x y " * 4000})
        await refused(client, "unknown_model", {"prompt": "x", "model": "other"})
        return client.protocol_version


async def main():
    program, model = sys.argv[1:]
    spoken = {await converse(program, model, mode) for mode in ("auto", "legacy")}
    assert spoken == {"2026-07-28", "2025-11-25"}, spoken
    print("conformance:", ", ".join(sorted(spoken)))


asyncio.run(main())
