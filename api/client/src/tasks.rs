//! The routes of tasks.

use std::time::Duration;

use ark_types::label::Owner;
use ark_types::task::{CreateTask, OutputStream, Task, TaskList, TaskState};
use hyper::Method;

use crate::error::Error;
use crate::files::ByteStream;
use crate::rest::{Client, empty};
use crate::uri;

/// Which tasks; the default is all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaskQuery {
    /// In this state.
    pub state: Option<TaskState>,
    /// Belonging to this owner.
    pub owner: Option<Owner>,
    /// With these labels, as in [`ark_types::label::Selector`].
    pub labels: Option<String>,
}

/// Which output of a task; the default is standard output of the newest attempt that runs or whose output is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskLogQuery {
    /// Which stream.
    pub stream: OutputStream,
    /// Number of the attempt, from 1.
    pub attempt: Option<u32>,
    /// Without so many bytes at its beginning.
    pub from: u64,
    /// Until the attempt has ended; one that has not begun is waited for.
    pub follow: bool,
}

impl Client {
    /// `POST /v1/tasks`: the task is durable when this returns, or was there with the same key and body.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn create_task(&self, task: &CreateTask) -> Result<Task, Error> {
        self.make("/v1/tasks", task).await
    }

    /// `GET /v1/tasks`, every page of it.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn tasks_where(&self, query: &TaskQuery) -> Result<TaskList, Error> {
        let mut list = TaskList { tasks: Vec::new(), next_cursor: None };
        loop {
            let parameters = [
                ("state", query.state.map(TaskState::word)),
                ("owner", query.owner.as_ref().map(AsRef::as_ref)),
                ("labels", query.labels.as_deref()),
                ("cursor", list.next_cursor.as_deref()),
            ];
            let page: TaskList = self.get(&uri::query("/v1/tasks", &parameters)).await?;
            list.tasks.extend(page.tasks);
            list.next_cursor = page.next_cursor;
            if list.next_cursor.is_none() {
                return Ok(list);
            }
        }
    }

    /// `GET /v1/tasks/{task}`, when it has ended or `wait` is over, at most [`ark_types::task::MAX_WAIT_MS`].
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn task(&self, task: &str, wait: Duration) -> Result<Task, Error> {
        let wait = (!wait.is_zero()).then(|| wait.as_millis().to_string());
        self.get(&uri::query(&uri::task(task, ""), &[("wait_ms", wait.as_deref())])).await
    }

    /// `GET /v1/tasks/{task}/logs`: what an attempt wrote, as `query`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn task_log(&self, task: &str, query: TaskLogQuery) -> Result<ByteStream, Error> {
        let TaskLogQuery { stream, attempt, from, follow } = query;
        let stream = match stream {
            OutputStream::Stdout => "stdout",
            OutputStream::Stderr => "stderr",
        };
        let attempt = attempt.map(|attempt| attempt.to_string());
        let from = (from > 0).then(|| from.to_string());
        let parameters = [
            ("stream", Some(stream)),
            ("attempt", attempt.as_deref()),
            ("from", from.as_deref()),
            ("follow", follow.then_some("true")),
        ];
        let target = uri::query(&uri::task(task, "/logs"), &parameters);
        let response = self.send(Method::GET, &target, &[], empty()).await?;
        Ok(ByteStream::new(self.endpoint(), response.into_body()))
    }

    /// `POST /v1/tasks/{task}/cancel`: it is cancelled when this returns.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn cancel_task(&self, task: &str) -> Result<Task, Error> {
        self.order(&uri::task(task, "/cancel")).await
    }

    /// `DELETE /v1/tasks/{task}`: of one that has ended.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_task(&self, task: &str) -> Result<(), Error> {
        self.send(Method::DELETE, &uri::task(task, ""), &[], empty()).await?;
        Ok(())
    }
}
