//! Running a program for the host.
//!
//! | file | what |
//! |---|---|
//! | [`plan`] | checks the request and works out what execve(2) needs |
//! | [`stdio`] | three pipes or one terminal |
//! | [`spawn`] | makes the child |
//! | [`session`] | one poll(2) loop per program: frames in, output out, time limit, end |

use std::path::Path;
use std::time::{Duration, Instant};

use ark_link::Connection;
use ark_types::exec::ExecRequest;

use crate::children::Children;
use crate::failure::{Failure, system_failure};

pub(crate) mod plan;
mod session;
pub(crate) mod spawn;
pub(crate) mod stdio;

/// Serves one `Exec` operation to its end.
pub(crate) fn serve(
    connection: &mut Connection,
    request: ExecRequest,
    children: &Children,
) -> Result<(), Failure> {
    let begun = Instant::now();
    let limit = request.timeout_ms.map(Duration::from_millis);
    let plan = plan::Plan::new(request, Path::new("/"))?;
    let (ours, theirs) = match plan.tty {
        None => stdio::pipes(),
        Some(size) => stdio::terminal(size, plan.user.as_ref().map(|u| u.uid)),
    }
    .map_err(|e| system_failure("the program's standard streams could not be made", &e))?;
    let child = spawn::spawn(children, &plan, &theirs.child_stdio())?;
    drop(theirs);
    drop(plan);
    Ok(session::Session::new(connection, child, ours, begun, limit).run()?)
}
