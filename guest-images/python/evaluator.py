"""The interpreter that an agent keeps warm: it evaluates code for ark-guestd, one request after another.

    evaluator.py REQUESTS REPLIES

Both arguments are descriptors of pipes that carry JSON, one object on a line. Standard input, output and error belong to the
evaluated code alone.

| request                            | reply                                                                  |
|------------------------------------|------------------------------------------------------------------------|
| (start)                            | {"id": 0}: ready                                                       |
| {"id": N, "code": C, "limit": L}   | {"id": N, "value": V} or {"id": N, "exception": {...}}; texts of at    |
|                                    | most L bytes; what the code wrote has been flushed before              |
| {"id": N, "seed": HEX}             | {"id": N, "random": HEX} or {"id": N, "error": TEXT}                   |

SIGINT interrupts code while it is evaluated and does nothing at any other time.
"""

import ast
import builtins
import json
import linecache
import os
import random
import signal
import sys
import traceback
import types

HERE = __file__
PID = os.getpid()
# Sources kept so that tracebacks show lines of earlier requests.
KEPT_SOURCES = 256


def cut(text, limit):
    """At most `limit` bytes of `text`, as UTF-8 can carry it."""
    return text.encode("utf-8", "backslashreplace")[:limit].decode("utf-8", "ignore")


def hide_evaluator(told):
    """Takes the frames of this file out of a TracebackException and all that it followed from."""
    todo, seen = [told], set()
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.stack[:] = [frame for frame in one.stack if frame.filename != HERE]
        todo += [one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ())]


def describe(error, limit):
    """`error` as the reply carries it. Its last lines say most, so those stay of a long traceback."""
    told = traceback.TracebackException(type(error), error, error.__traceback__, compact=True)
    hide_evaluator(told)
    text = "".join(told.format() if told.stack else told.format_exception_only())
    return {
        "kind": name_of(error),
        "message": cut(str(error), limit),
        "traceback": cut(text[-limit:], limit),
    }


def name_of(error):
    """Name of its class, whatever the class says of itself."""
    return cut(type.__dict__["__name__"].__get__(type(error)), 256)


def bare(error):
    """`error` without all that its class may have a say in."""
    return {"kind": name_of(error), "message": "", "traceback": ""}


def flush():
    """Brings what the code wrote to the descriptors: Python's buffers, and C's where something can reach them."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()
        except Exception:
            pass  # Closed or replaced by the code: its own choice.
    ctypes = sys.modules.get("ctypes")
    if ctypes is not None:
        ctypes.CDLL(None).fflush(None)


class Evaluator:
    def __init__(self, requests, replies):
        self.requests = open(requests, "rb")
        self.replies = replies
        self.interruptible = False
        self.count = 0
        # Programs that the code starts do not get these.
        for descriptor in (requests, replies):
            os.set_inheritable(descriptor, False)
        # The code's names live in a module __main__ of their own: pickle and multiprocessing look there.
        self.own_main = sys.modules["__main__"]
        main = types.ModuleType("__main__")
        main.__builtins__ = builtins
        sys.modules["__main__"] = main
        self.names = main.__dict__
        sys.argv, sys.path[0] = [""], ""
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)

    def interrupt(self, _signal, _frame):
        if self.interruptible:
            raise KeyboardInterrupt

    def guarded(self, function, *arguments):
        """Result of `function` and the exception that ended it. SIGINT reaches it, and nothing outside of it."""
        result = error = None
        try:
            try:
                self.interruptible = True
                result = function(*arguments)
            finally:
                self.interruptible = False
        except BaseException as caught:
            self.interruptible = False
            error = caught
        return result, error

    def run(self, code, limit):
        """Executes `code`; repr of its last expression's value, None where there is none."""
        self.count += 1
        name = f"<eval {self.count}>"
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        linecache.cache.pop(f"<eval {self.count - KEPT_SOURCES}>", None)
        # All is compiled before anything runs.
        tree, last = compile(code, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True), None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = compile(ast.Expression(tree.body.pop().value), name, "eval", dont_inherit=True)
        exec(compile(tree, name, "exec", dont_inherit=True), self.names)
        value = eval(last, self.names) if last is not None else None
        if value is None:
            return None
        builtins._ = value
        return cut(repr(value), limit)

    def evaluate(self, code, limit):
        value, error = self.guarded(self.run, code, limit)
        # The code may have set a handler of its own, and an interruption may be on its way.
        signal.signal(signal.SIGINT, self.interrupt)
        if os.getpid() != PID:
            leave_child(error)
        reply = {"value": value}
        if error is not None:
            told, failed = self.guarded(describe, error, limit)
            reply = {"exception": bare(error) if failed else told}
        self.guarded(flush)
        return reply

    @staticmethod
    def reseed(seed):
        """New state for every generator that programs share. The kernel's has been renewed before."""
        def fresh():
            return bytes.fromhex(seed) + os.urandom(32)

        random.seed(fresh())
        numpy = sys.modules.get("numpy.random")
        if numpy is not None:
            numpy.seed(list(fresh()))
        tempfile = sys.modules.get("tempfile")
        if tempfile is not None:
            # Names of files come from a generator of their own, which is made when it is missing.
            tempfile._name_sequence = None
        ssl = sys.modules.get("ssl")
        if ssl is not None:
            ssl.RAND_add(fresh(), 32.0)
        return random.randbytes(16).hex()

    def answer(self, request):
        if "seed" not in request:
            return self.evaluate(request["code"], request["limit"])
        drawn, error = self.guarded(self.reseed, request["seed"])
        return {"random": drawn} if error is None else {"error": cut(repr(error), 1024)}

    def reply(self, identity, reply):
        # The first line break ends whatever the code may have written to this pipe.
        left = memoryview(f"\n{json.dumps({'id': identity, **reply})}\n".encode())
        while left:
            left = left[os.write(self.replies, left):]

    def next_line(self):
        while True:
            try:
                return self.requests.readline()
            except Exception:
                # Of a signal handler that the code has set, for a timer that it did not stop.
                traceback.print_exc()

    def serve(self):
        signal.signal(signal.SIGINT, self.interrupt)
        self.reply(0, {})
        while line := self.next_line():
            request = json.loads(line)
            self.reply(request["id"], self.answer(request))


def leave_child(error):
    """Ends a process that the code made with os.fork and let run to its end: only its parent answers."""
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        status = 1
    flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    Evaluator(int(sys.argv[1]), int(sys.argv[2])).serve()
