//! Evaluating code: values, output, exceptions, state, interruption, interpreters that end.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use ark_link::Connection;
use ark_types::eval::{EvalEnd, EvalException, EvalRequest, MAX_CODE, MAX_VALUE};
use ark_types::guest::{ErrorCode, Frame, GuestError, Kind};
use common::{Guestd, alive, wait_until};

/// What came of a request.
struct Said {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Result<EvalEnd, GuestError>,
}

impl Said {
    fn value(self) -> Option<String> {
        let end = self.end.unwrap();
        assert_eq!(end.exception, None);
        end.value
    }

    fn exception(self) -> EvalException {
        self.end.unwrap().exception.unwrap()
    }

    fn error(self) -> GuestError {
        self.end.unwrap_err()
    }
}

fn code(code: &str) -> EvalRequest {
    EvalRequest { code: code.to_owned(), ..EvalRequest::default() }
}

fn limited(text: &str, timeout_ms: u64) -> EvalRequest {
    EvalRequest { timeout_ms: Some(timeout_ms), ..code(text) }
}

/// Reads to the end of an evaluation.
fn finish(connection: &mut Connection) -> Said {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let end = loop {
        let frame = connection.recv().unwrap().expect("an end comes before the connection's");
        match frame.kind {
            Kind::Stdout => stdout.extend(frame.payload),
            Kind::Stderr => stderr.extend(frame.payload),
            Kind::Evaluated => break Ok(frame.parse().unwrap()),
            Kind::Error => break Err(frame.parse().unwrap()),
            other => panic!("{other:?} during an evaluation"),
        }
    };
    Said { stdout, stderr, end }
}

fn ask(guestd: &Guestd, request: &EvalRequest) -> Said {
    finish(&mut guestd.ask(Kind::Eval, request))
}

fn eval(guestd: &Guestd, text: &str) -> Said {
    ask(guestd, &code(text))
}

fn value(guestd: &Guestd, text: &str) -> Option<String> {
    eval(guestd, text).value()
}

/// Process id of the interpreter.
fn interpreter(guestd: &Guestd) -> u32 {
    value(guestd, "__import__('os').getpid()").unwrap().parse().unwrap()
}

#[test]
fn values_output_and_state_come_back() {
    let guestd = Guestd::with_evaluator();
    assert_eq!(value(&guestd, "6 * 7").as_deref(), Some("42"));
    assert_eq!(value(&guestd, "x = 5"), None);
    assert_eq!(value(&guestd, "None"), None);
    assert_eq!(value(&guestd, ""), None);
    let said = eval(
        &guestd,
        "import sys\ndef f(n):\n    return n * x\nprint('out', end='')\nprint('err', file=sys.stderr)\n'é' * f(1)",
    );
    assert_eq!((said.stdout.as_slice(), said.stderr.as_slice()), (&b"out"[..], &b"err\n"[..]));
    assert!(said.end.as_ref().unwrap().duration_us > 0);
    assert_eq!(said.value().as_deref(), Some("'ééééé'"));
    assert_eq!(
        value(&guestd, "_ + 'x', f(2), __name__, input.__name__").as_deref(),
        Some("('éééééx', 10, '__main__', 'input')")
    );
    assert_eq!(eval(&guestd, "input()").exception().kind, "EOFError");
    assert_eq!(value(&guestd, "import pickle; pickle.loads(pickle.dumps(f)) is f").as_deref(), Some("True"));
    assert_eq!(guestd.children().len(), 1, "one interpreter serves all");
}

#[test]
fn requests_may_follow_each_other_on_a_connection() {
    let guestd = Guestd::with_evaluator();
    let mut connection = guestd.connect();
    for (text, expected) in [("a = 1", None), ("a + 1", Some("2")), ("1 / 0", None), ("a + 2", Some("3"))] {
        connection.send(&Frame::json(Kind::Eval, &code(text)).unwrap()).unwrap();
        assert_eq!(finish(&mut connection).end.unwrap().value.as_deref(), expected);
    }
}

#[test]
fn exceptions_show_the_code_and_not_the_evaluator() {
    let guestd = Guestd::with_evaluator();
    eval(&guestd, "def f(n):\n    return 1 / n");
    let zero = eval(&guestd, "print('before')\nf(0)");
    assert_eq!(zero.stdout, b"before\n");
    let zero = zero.exception();
    assert_eq!((zero.kind.as_str(), zero.message.as_str()), ("ZeroDivisionError", "division by zero"));
    assert!(
        zero.traceback.contains("return 1 / n") && !zero.traceback.contains("evaluator"),
        "{}",
        zero.traceback
    );
    let syntax = eval(&guestd, "y = 1\nif:").exception();
    assert_eq!(syntax.kind, "SyntaxError");
    assert!(syntax.traceback.contains("line 2") && !syntax.traceback.contains(".py"), "{}", syntax.traceback);
    assert_eq!(eval(&guestd, "y").exception().kind, "NameError", "nothing ran");
    for (text, kind) in [
        ("import sys; sys.exit(3)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os, time; os.kill(os.getpid(), 2); time.sleep(5)", "KeyboardInterrupt"),
        ("class Odd(BaseException):\n    def __str__(self): raise self\nraise Odd", "Odd"),
        (
            "class Meta(type):\n    @property\n    def __name__(self): raise OSError\n\
             class Nameless(Exception, metaclass=Meta): pass\nraise Nameless",
            "Nameless",
        ),
        ("'\\ud800'.encode()", "UnicodeEncodeError"),
        ("raise ValueError('\\ud800')", "ValueError"),
        ("def g(): g()\ng()", "RecursionError"),
        ("raise ExceptionGroup('two', [ValueError(1), TypeError(2)])", "ExceptionGroup"),
    ] {
        assert_eq!(eval(&guestd, text).exception().kind, kind);
    }
    let long = eval(&guestd, "raise ValueError('x' * 1000000)").exception();
    assert_eq!((long.message.len(), long.traceback.len()), (MAX_VALUE, MAX_VALUE));
    assert_eq!(value(&guestd, "'still here'").as_deref(), Some("'still here'"));
}

#[test]
fn much_output_is_complete_and_in_order() {
    let guestd = Guestd::with_evaluator();
    let said = eval(
        &guestd,
        "import sys\nfor n in range(131072): sys.stdout.write(f'{n:07}\\n')\nsys.stderr.write('e' * 300000)",
    );
    let expected: String = (0..131_072).map(|n| format!("{n:07}\n")).collect();
    assert!(said.stdout == expected.as_bytes(), "{} bytes came", said.stdout.len());
    assert_eq!(said.stderr.len(), 300_000);
    assert!(said.end.is_ok());
}

#[test]
fn all_that_writes_is_heard() {
    let guestd = Guestd::with_evaluator();
    let said = eval(
        &guestd,
        "import ctypes, os, subprocess, sys\nctypes.CDLL(None).puts(b'from C')\nsubprocess.run(['echo', 'child'])\n\
         os.system('echo shell >&2')\nsys.stdout.buffer.write(b'\\xff\\x00')\nif os.fork() == 0: print('fork')\nelse: os.wait()",
    );
    for text in [&b"from C\n"[..], b"child\n", b"\xff\x00", b"fork\n"] {
        let heard = said.stdout.windows(text.len()).any(|part| part == text);
        assert!(heard, "{text:?} in {:?}", String::from_utf8_lossy(&said.stdout));
    }
    assert_eq!(said.stderr, b"shell\n");
    assert!(said.end.is_ok());
    eval(&guestd, "sys.stdout.close()");
    assert_eq!(value(&guestd, "1").as_deref(), Some("1"), "closing its output is the code's choice");
}

#[test]
fn output_arrives_while_the_code_runs() {
    let guestd = Guestd::with_evaluator();
    let mut connection = guestd.ask(Kind::Eval, &code("import time\nprint('now')\ntime.sleep(60)"));
    let first = connection.recv().unwrap().unwrap();
    assert_eq!((first.kind, first.payload.as_slice()), (Kind::Stdout, &b"now\n"[..]));
}

#[test]
fn requests_out_of_bounds_are_refused_and_long_values_cut() {
    let guestd = Guestd::with_evaluator();
    let long = format!("{}1", " \n".repeat(MAX_CODE / 2));
    for bad in [long.as_str(), "a\0b"] {
        assert_eq!(eval(&guestd, bad).error().code, ErrorCode::BadRequest);
    }
    assert!(guestd.children().is_empty(), "no interpreter was started for that");
    assert_eq!(value(&guestd, &format!("'{}'[:1]", "\u{1}é".repeat(20_000))).as_deref(), Some(r"'\x01'"));
    assert_eq!(value(&guestd, "'x' * 10_000_000").unwrap().len(), MAX_VALUE);
    assert_eq!(value(&guestd, "'é' * 100_000").unwrap().len(), MAX_VALUE - 1, "no character is cut in two");
    let odd = "class Odd:\n    def __repr__(self): return chr(1) * 100_000\nOdd()";
    assert_eq!(value(&guestd, odd).unwrap(), "\u{1}".repeat(MAX_VALUE));
}

#[test]
fn signals_between_requests_end_nothing() {
    let guestd = Guestd::with_evaluator();
    let set = "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\nkept = os.getpid()";
    assert_eq!(value(&guestd, set), None);
    let pid = interpreter(&guestd);
    // As an interruption that comes when the code has just ended.
    let pid_t = libc::pid_t::try_from(pid).unwrap();
    // SAFETY: kill touches no memory; the interpreter is this test's own.
    assert_eq!(unsafe { libc::kill(pid_t, libc::SIGINT) }, 0);
    let late = "def late(*_): raise TimeoutError('too late')\nsignal.signal(signal.SIGALRM, late)\n\
                _ = signal.setitimer(signal.ITIMER_REAL, 0.05)";
    assert_eq!(value(&guestd, late), None);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(value(&guestd, "kept"), Some(pid.to_string()));
}

#[test]
fn a_time_limit_interrupts_and_keeps_the_state() {
    let guestd = Guestd::with_evaluator();
    let pid = interpreter(&guestd);
    for text in ["kept = 1\nprint('begun')\nimport time\ntime.sleep(60)", "while True: pass"] {
        let begun = Instant::now();
        let late = ask(&guestd, &limited(text, 300)).error();
        assert_eq!(late.code, ErrorCode::DeadlinePassed);
        assert!(late.message.contains("300 ms") && late.message.contains("stays"), "{}", late.message);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(value(&guestd, "kept").as_deref(), Some("1"));
    assert_eq!(interpreter(&guestd), pid);
    let program = ask(&guestd, &limited("import os\nos.system('sleep 60')", 200)).error();
    assert!(
        program.message.contains("stays"),
        "a program that keeps SIGINT to itself ends, too: {}",
        program.message
    );
    assert_eq!(interpreter(&guestd), pid);
    assert_eq!(ask(&guestd, &limited("kept", 20_000)).value().as_deref(), Some("1"));
}

#[test]
fn code_that_cannot_be_interrupted_is_ended_with_its_interpreter() {
    let guestd = Guestd::with_evaluator();
    let pid = interpreter(&guestd);
    let stubborn = "import signal, subprocess, time\nkept = 1\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n\
                    p = subprocess.Popen(['sh', '-c', 'trap \"\" INT; sleep 60; :'])\nprint(p.pid)\nwhile True: time.sleep(60)";
    let said = ask(&guestd, &limited(stubborn, 1000));
    let child: u32 = String::from_utf8_lossy(&said.stdout).trim().parse().unwrap();
    let late = said.error();
    assert_eq!(late.code, ErrorCode::DeadlinePassed);
    assert!(late.message.contains("begins with a new one"), "{}", late.message);
    wait_until("interpreter and program are gone", || !alive(pid) && !alive(child));
    assert_eq!(eval(&guestd, "kept").exception().kind, "NameError");
    assert_ne!(interpreter(&guestd), pid);
}

#[test]
fn an_interpreter_that_ends_is_told_before_the_next_begins() {
    let guestd = Guestd::with_evaluator();
    for (text, how) in [
        ("print('last')\nimport os, sys\nsys.stdout.flush()\nos._exit(3)", "exit code 3"),
        ("print('last')\nimport ctypes\nctypes.string_at(0)", "signal 11"),
        ("print('last')\nimport os\nos.kill(os.getpid(), 9)", "memory"),
        ("print('last')\nimport os\nos.execvp('sleep', ['sleep', '60'])", "took the pipes"),
        (
            "print('last')\nimport os\nfor n in range(3, 100):\n    try: os.close(n)\n    except OSError: pass",
            "ended",
        ),
    ] {
        let said = eval(&guestd, text);
        assert_eq!(said.stdout, b"last\n", "{text}");
        let error = said.error();
        assert!(error.message.contains(how) && error.message.contains("new one"), "{}", error.message);
        assert_eq!(value(&guestd, "'new'").as_deref(), Some("'new'"));
    }
    let pid = interpreter(&guestd);
    eval(&guestd, "import os, threading\nthreading.Timer(0.2, os._exit, [4]).start()");
    wait_until("the interpreter has ended", || !alive(pid));
    let error = eval(&guestd, "1").error();
    assert!(
        error.message.contains("exit code 4") && error.message.contains("after its last"),
        "{}",
        error.message
    );
    assert_eq!(value(&guestd, "1").as_deref(), Some("1"));
}

#[test]
fn what_the_code_writes_to_the_pipes_breaks_nothing() {
    let guestd = Guestd::with_evaluator();
    let ends =
        "import os, sys\nfds = [int(fd) for fd in open('/proc/self/cmdline').read().split('\\0')[2:4]]";
    eval(&guestd, ends);
    for junk in
        ["b'\\xff\\x00junk'", "b'null\\n[]\\n{\"id\": 1}\\n'", "b'{\"id\": 99, \"value\": 3}\\n' * 100"]
    {
        let text = format!("os.write(fds[1], {junk}); 'fine'");
        assert_eq!(value(&guestd, &text).as_deref(), Some("'fine'"), "{text}");
    }
    let flood = "for n in range(100): os.write(fds[1], b'x' * 10000)\nimport time\ntime.sleep(60)";
    let error = eval(&guestd, flood).error();
    assert!(error.message.contains("new one"), "{}", error.message);
    assert_eq!(value(&guestd, "1").as_deref(), Some("1"));
}

#[test]
fn one_request_is_evaluated_at_a_time() {
    let guestd = Guestd::with_evaluator();
    eval(&guestd, "import time\nrunning = 0\nmost = 0\ntotal = 0");
    let text = "running += 1\nmost = max(most, running)\ntime.sleep(0.05)\ntotal += 1\nrunning -= 1\ntotal";
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| value(&guestd, text).unwrap());
        }
    });
    assert_eq!(value(&guestd, "most, total").as_deref(), Some("(1, 8)"));
}

#[test]
fn a_host_that_closes_interrupts_its_request_or_gives_up_its_turn() {
    let guestd = Guestd::with_evaluator();
    eval(&guestd, "import time\nkept = 1");
    let mut long = guestd.ask(Kind::Eval, &code("print('begun')\ntime.sleep(60)"));
    assert_eq!(long.recv().unwrap().unwrap().kind, Kind::Stdout);
    let waiting = guestd.ask(Kind::Eval, &code("kept = 2"));
    thread::sleep(Duration::from_millis(300));
    drop(waiting);
    thread::sleep(Duration::from_millis(300));
    let begun = Instant::now();
    drop(long);
    assert_eq!(value(&guestd, "kept").as_deref(), Some("1"));
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn an_interpreter_that_is_ended_for_a_closed_host_is_told_to_the_next() {
    let guestd = Guestd::with_evaluator();
    let stubborn = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('begun')\nwhile True: time.sleep(60)";
    let mut first = guestd.ask(Kind::Eval, &code(stubborn));
    assert_eq!(first.recv().unwrap().unwrap().kind, Kind::Stdout);
    drop(first);
    let error = eval(&guestd, "1").error();
    assert!(error.message.contains("host closed") && error.message.contains("new one"), "{}", error.message);
    assert_eq!(value(&guestd, "1").as_deref(), Some("1"));
}

#[test]
fn a_guest_without_an_evaluator_says_so() {
    let guestd = Guestd::start();
    let error = eval(&guestd, "1").error();
    assert_eq!(error.code, ErrorCode::NoEvaluator);
    assert!(error.message.contains("/usr/lib/ark/evaluator.py"), "{}", error.message);
}

#[test]
fn renewal_and_clock_are_for_guests() {
    let guestd = Guestd::start();
    let order = serde_json::json!({
        "generation": "0".repeat(32), "nonce": "1".repeat(32), "hostname": "fork", "machine_id": "2".repeat(32),
        "seed": "3".repeat(64), "unix_ns": 1,
    });
    let answer = guestd.answer(Kind::Renew, &order);
    assert_eq!(answer.kind, Kind::Error);
    assert_eq!(answer.parse::<GuestError>().unwrap().code, ErrorCode::BadRequest);
    assert_eq!(guestd.answer(Kind::Renew, &1).parse::<GuestError>().unwrap().code, ErrorCode::BadRequest);
}
