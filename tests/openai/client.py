"""The OpenAI API against the official Python client as its peer, over the model `router`.

    python3 client.py            in an agent that may use inference: at its socket
    python3 client.py refused    in one that may not
    python3 client.py URL        on the host: over TCP, with the token of ARK_TOKEN
"""

import asyncio
import json
import os
import sys
from typing import Literal

import httpx2
import openai
from pydantic import BaseModel

SOCKET = "/run/ark/openai.sock"
MODEL = "router"
ASKED = [{"role": "user", "content": "Which agent should sort invoices into folders by year?"}]
# The same text from the same prompt.
SURE = {"model": MODEL, "temperature": 0, "seed": 1}
# A model that nobody has asked yet is loaded first; a hang takes longer.
WAIT = 300.0


def at_socket(kind, transport, session):
    """A client at the agent's socket: there is no network, and nobody asks for a key."""
    transport = transport(uds=SOCKET)
    return kind(base_url="http://ark/v1", api_key="none", http_client=session(transport=transport), timeout=WAIT, max_retries=0)


def clients(url):
    """A client that waits, and one that does not."""
    if url is None:
        return (
            at_socket(openai.OpenAI, httpx2.HTTPTransport, httpx2.Client),
            at_socket(openai.AsyncOpenAI, httpx2.AsyncHTTPTransport, httpx2.AsyncClient),
        )
    said = {"base_url": f"{url}/v1", "api_key": os.environ["ARK_TOKEN"], "timeout": WAIT, "max_retries": 0}
    return openai.OpenAI(**said), openai.AsyncOpenAI(**said)


def refused(kind, words, call):
    """What `call` is refused with, which is of class `kind` and says `words`."""
    try:
        reply = call()
    except openai.APIStatusError as error:
        assert type(error) is kind, (kind, error)
        assert words in error.message, (words, error.message)
        return error
    raise AssertionError(f"taken, where {kind.__name__} was due: {reply}")


class Routed(BaseModel):
    """What the bundled model answers."""

    agent: Literal["task", "code", "files", "pipeline", "inference", "unknown"]


class Colour(BaseModel):
    """What it answers only when it must."""

    colour: Literal["red", "blue"]


def models(client):
    listed = {model.id: model for model in client.models.list()}
    assert client.models.retrieve(MODEL).id == MODEL
    assert listed[MODEL].object == "model" and listed[MODEL].owned_by == "ark", listed


def chats(client):
    """Whole, and the same as it is said."""
    whole = client.chat.completions.create(messages=ASKED, **SURE)
    assert whole.object == "chat.completion" and whole.model == MODEL, whole
    [choice] = whole.choices
    assert choice.finish_reason == "stop" and choice.message.role == "assistant", choice
    assert json.loads(choice.message.content).keys() == {"agent"}, choice
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > usage.prompt_tokens > 0, usage

    chunks = list(client.chat.completions.create(messages=ASKED, stream=True, stream_options={"include_usage": True}, **SURE))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}, chunks
    assert len({chunk.id for chunk in chunks}) == 1, chunks
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == choice.message.content, chunks
    assert told[0].delta.role == "assistant" and told[-1].finish_reason == "stop", chunks
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens, chunks[-1]

    # The client's own reading of a stream, which puts the chunks together.
    with client.chat.completions.stream(messages=ASKED, **SURE) as stream:
        assert stream.get_final_completion().choices[0].message.content == choice.message.content
    cut = client.chat.completions.create(messages=ASKED, max_tokens=1, **SURE)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 1, cut
    return choice.message.content


def schemas(client):
    """Replies of a form, which the client has made of a class and reads back into it."""
    for form in (Routed, Colour):
        reply = client.chat.completions.parse(messages=ASKED, response_format=form, **SURE)
        assert isinstance(reply.choices[0].message.parsed, form), reply
    free = client.chat.completions.create(messages=ASKED, response_format={"type": "json_object"}, max_tokens=64, **SURE)
    assert free.choices[0].message.content.startswith("{"), free


def tools(client):
    """The bundled model's template has none, which is said."""
    function = {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}
    offered = [{"type": "function", "function": function}]
    ask = client.chat.completions.create
    refused(openai.BadRequestError, "has no tools", lambda: ask(messages=ASKED, tools=offered, **SURE))
    unused = ask(messages=ASKED, tools=offered, tool_choice="none", **SURE)
    assert unused.choices[0].message.tool_calls is None, unused


def completions(client):
    prompt = "Sort the invoices"
    whole = client.completions.create(prompt=prompt, max_tokens=8, **SURE)
    assert whole.object == "text_completion" and whole.choices[0].finish_reason in ("stop", "length"), whole
    assert 1 <= whole.usage.completion_tokens <= 8, whole
    parts = client.completions.create(prompt=prompt, max_tokens=8, stream=True, **SURE)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def embeddings(client):
    """Of length 1, the same in either form that they are sent in, and the same text's alike."""
    texts = ["invoices", "bills", "invoices"]
    for form in ({}, {"encoding_format": "float"}):
        reply = client.embeddings.create(model=MODEL, input=texts, **form)
        assert [vector.index for vector in reply.data] == [0, 1, 2], reply
        first, second, third = (vector.embedding for vector in reply.data)
        assert abs(sum(x * x for x in first) - 1) < 1e-3, first
        assert max(abs(x - y) for x, y in zip(first, third, strict=True)) < 1e-3
        assert max(abs(x - y) for x, y in zip(first, second, strict=True)) > 1e-3
    assert reply.usage.prompt_tokens > 0, reply.usage


def errors(client):
    ask = client.chat.completions.create
    said = refused(openai.NotFoundError, "other", lambda: ask(model="other", messages=ASKED))
    assert (said.type, said.code) == ("invalid_request_error", "model_not_found"), said.body
    long = [{"role": "user", "content": "x y " * 4000}]
    said = refused(openai.BadRequestError, "context", lambda: ask(messages=long, **SURE))
    assert said.code == "context_length_exceeded", said.body
    # A stream that cannot begin is refused as a whole reply is.
    refused(openai.BadRequestError, "context", lambda: ask(messages=long, stream=True, **SURE))
    refused(openai.BadRequestError, "temperature", lambda: ask(model=MODEL, messages=ASKED, temperature=-1))
    refused(openai.BadRequestError, "n is 2", lambda: ask(messages=ASKED, n=2, **SURE))
    refused(openai.BadRequestError, "64", lambda: client.embeddings.create(model=MODEL, input=["x"] * 65))


async def at_once(client, alone):
    """Chats at the same time say what one alone does."""
    replies = await asyncio.gather(*(client.chat.completions.create(messages=ASKED, **SURE) for _ in range(4)))
    assert [reply.choices[0].message.content for reply in replies] == [alone] * 4, replies
    await client.close()


def not_allowed(client):
    """Who may not use inference is told so by each route."""
    for call in (
        lambda: client.models.list(),
        lambda: client.chat.completions.create(messages=ASKED, **SURE),
        lambda: client.chat.completions.create(messages=ASKED, stream=True, **SURE),
        lambda: client.completions.create(prompt="x", **SURE),
        lambda: client.embeddings.create(model=MODEL, input="x"),
    ):
        said = refused(openai.PermissionDeniedError, "may not use inference", call)
        assert "--allow inference" in said.message and said.type == "permission_error", said.body


def main():
    told = sys.argv[1] if len(sys.argv) > 1 else None
    if told == "refused":
        not_allowed(clients(None)[0])
    else:
        client, other = clients(told)
        models(client)
        alone = chats(client)
        for check in (schemas, tools, completions, embeddings, errors):
            check(client)
        asyncio.run(at_once(other, alone))
        if told is not None:
            nobody = client.with_options(api_key="wrong")
            refused(openai.AuthenticationError, "token", nobody.models.list)
    print("openai", openai.__version__, "agrees")


main()
